"""The two branches of a Siamese network: where a view lies, and where it predicts the other view to lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import pyro
import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.nn import PyroParam
from torch import Tensor, nn

from pyro_contrastive import distributions as dist
from pyro_contrastive.nets import ConcentrationHead
from pyro_contrastive.ops.bessel import inverse_bessel_ratio
from pyro_contrastive.ops.constraints import scale_parameter

from .base import INITIAL_RESULTANT_LENGTH, RecognitionGuide

__all__ = ["Branch", "Siamese"]

Density = Literal["power_spherical", "von_mises_fisher", "projected_normal"]
Width = Literal["head", "learned", "fixed"]
WidthInput = Literal["features", "projection"]


class Branch(NamedTuple):
    """What one view is mapped to.

    Attributes:
        point: Unit vectors g(x), ``(N, d)``: where the view lies.
        prediction: Law of the point of another view of the same thing, batch ``(N,)``, event ``(d,)``.
    """

    point: Tensor
    prediction: TorchDistribution


def _initial_concentration(density: Density, dim: int) -> float:
    """The concentration with a mean resultant length of 0.6, as in the guides of each family."""
    rho = INITIAL_RESULTANT_LENGTH
    if density == "power_spherical":
        return rho / (1 - rho) * (dim - 1)
    if density == "von_mises_fisher":
        return inverse_bessel_ratio(dim, torch.tensor(rho, dtype=torch.float64)).item()
    return dim / (1 / rho**2 - 1)


def _projected_normal(mean_direction: Tensor, concentration: Tensor) -> dist.ProjectedNormal:
    return dist.ProjectedNormal(mean_direction, concentration.rsqrt())


def _rotational(law: Callable[..., TorchDistribution]) -> Callable[[Tensor, Tensor], TorchDistribution]:
    return lambda mean_direction, concentration: law(mean_direction, concentration.squeeze(-1))


_LAWS: dict[str, Callable[[Tensor, Tensor], TorchDistribution]] = {
    "power_spherical": _rotational(dist.PowerSpherical),
    "von_mises_fisher": _rotational(dist.VonMisesFisher),
    "projected_normal": _projected_normal,
}


class Siamese(RecognitionGuide):
    r"""Point embeddings with a law that predicts the point of another view: projector, predictor and a width.

    A view is mapped to a *point*, the normalised output of the projector, and to a *prediction*, a law on the sphere
    around the normalised output of the predictor:

    .. math::  g(x) = \frac{p(f(x))}{|p(f(x))|}, \qquad \mu(x) = \frac{h(p(f(x)))}{|h(p(f(x)))|}, \qquad
               R(z|x) = PS(z; \mu(x), \kappa(x)).

    ``posterior(x)`` is the prediction, the law with a width, so that embedding, retrieval, reports and calibration
    checks work with it; ``branch(x)`` gives both. As a Pyro guide the module puts the latent of every view at its point
    (``Delta`` sites "z1", "z2"); :meth:`predictions` is the Pyro guide that draws from the predictions instead, for
    ArviZ.

    With ``stop_gradient`` the points are constants of the loss: the encoder learns through the predictions only, as in
    SimSiam. A network whose points are all the same would predict them perfectly, and it is this asymmetry, with the
    predictor and the standardised projection, that keeps it from being found.

    Args:
        encoder: any module ``x -> (N, features)``.
        dim: d >= 2.
        features: width of the encoder's output; read off its last layer when omitted.
        batch_norm: standardise features, projections and the predictor's hidden layer over the batch.
        density: family of the prediction. ``"projected_normal"`` has a width per axis with ``width="head"``.
        width: ``"head"``: kappa(x), a network's output; ``"learned"``: one number for all inputs; ``"fixed"``: stated.
        concentration: kappa > 0, at the start unless it is fixed; for ``"projected_normal"`` 1 / sigma^2. By default
            where the mean resultant length is 0.6, as in the guide of each family.
        width_input: what the head reads: the ``"features"`` (default) or the ``"projection"``.
        projector: module ``(N, features) -> (N, d)``. Default: a linear map, standardised.
        predictor: module ``(N, d) -> (N, d)``. Default: two layers with 2 d hidden units; ``nn.Identity()`` for none.
        stop_gradient: see above.

    Raises:
        ValueError: for an unknown option or a concentration that is not positive and finite; when called, for a
            projector or predictor that returns another width than d; see
            :class:`~pyro_contrastive.guides.base.RecognitionGuide` for the rest.

    References:
        Chen and He, SimSiam, CVPR 2021, arXiv 2011.10566; Nakamura, Okada and Taniguchi, ICCV 2023, arXiv 2203.11437.

    Example:
        >>> guide = Siamese(nn.Linear(8, 32), dim=5)
        >>> x = torch.randn(4, 8)
        >>> guide.branch(x).point.shape, guide.posterior(x).batch_shape
        (torch.Size([4, 5]), torch.Size([4]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        *,
        features: int | None = None,
        batch_norm: bool = True,
        density: Density = "power_spherical",
        width: Width = "head",
        concentration: float | None = None,
        width_input: WidthInput = "features",
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__(encoder, dim, features=features, batch_norm=batch_norm)
        for name, value, known in (
            ("density", density, Density),
            ("width", width, Width),
            ("width_input", width_input, WidthInput),
        ):
            if value not in get_args(known):
                raise ValueError(f"`{name}` must be one of {', '.join(get_args(known))}, got {value!r}")
        if concentration is None:
            concentration = _initial_concentration(density, dim)
        elif not 0 < concentration < math.inf:
            raise ValueError(
                f"`concentration` of the predictions must be positive and finite, got {concentration!r}; "
                "leave it out for a mean resultant length of 0.6"
            )
        self.density, self.width, self.width_input = density, width, width_input
        self.stop_gradient = stop_gradient
        if projector is None:
            standardise = [nn.BatchNorm1d(dim, affine=False)] if batch_norm else []
            projector = nn.Sequential(nn.Linear(self.features, dim), *standardise)
        if predictor is None:
            norm = [nn.BatchNorm1d(2 * dim)] if batch_norm else []
            predictor = nn.Sequential(nn.Linear(dim, 2 * dim), *norm, nn.ReLU(), nn.Linear(2 * dim, dim))
        self.projector, self.predictor = projector, predictor
        self.concentration: Any
        if width == "head":
            outputs = dim if density == "projected_normal" else 1
            inputs = self.features if width_input == "features" else dim
            self.concentration = ConcentrationHead(inputs, concentration, outputs=outputs)
        elif width == "learned":
            self.concentration = PyroParam(torch.tensor(float(concentration)), constraint=scale_parameter)
        else:
            self.register_buffer("concentration", torch.tensor(float(concentration)))

    def _posterior(self, features: Tensor) -> Branch:
        projection = self._checked("projector", self.projector(features))
        direction = nn.functional.normalize(self._checked("predictor", self.predictor(projection)), dim=-1)
        kappa = self.concentration
        if self.width == "head":
            kappa = kappa(features if self.width_input == "features" else projection)
        else:
            kappa = kappa.to(direction).expand(len(features), 1)
        return Branch(nn.functional.normalize(projection, dim=-1), _LAWS[self.density](direction, kappa))

    def _checked(self, name: str, output: Tensor) -> Tensor:
        if output.shape[1:] != (self.dim,):
            raise ValueError(
                f"`{name}` must return (N, {self.dim}), the dimension of the latents, got {tuple(output.shape)}; "
                "change its last layer, or `dim`"
            )
        return output

    def branch(self, x: Tensor) -> Branch:
        """Point and prediction of every input, from one pass of the encoder.

        Args:
            x: ``(N, ...)``, whatever the encoder takes.

        Returns:
            Both; see :class:`Branch`. Within an inference step those of the guide's own pass.

        Raises:
            ValueError: see :meth:`~pyro_contrastive.guides.base.RecognitionGuide.posterior`.
        """
        found: Any = super().posterior(x)
        return found

    def posterior(self, x: Tensor) -> TorchDistribution:
        """Law of the point of another view, given this one; see :meth:`branch`.

        Args:
            x: ``(N, ...)``.

        Returns:
            The prediction, batch ``(N,)``, event ``(d,)``.
        """
        return self.branch(x).prediction

    def branches(self, *views: Tensor) -> list[Branch]:
        """Encode the views of one inference step, as :meth:`posteriors`, points included.

        Args:
            views: tensors with one leading dimension N, paired by rows.

        Returns:
            One branch per view.

        Raises:
            ValueError: see :meth:`~pyro_contrastive.guides.base.RecognitionGuide.posteriors`.
        """
        found: Any = super().posteriors(*views)
        return found

    def posteriors(self, *views: Tensor) -> list[TorchDistribution]:
        """Predictions of the views of one inference step; see :meth:`branches`."""
        return [branch.prediction for branch in self.branches(*views)]

    def forward(self, *views: Tensor) -> None:
        """The Pyro guide: sites "z1", "z2", ... at the points of the views, in the plate "pairs".

        Args:
            views: tensors with one leading dimension N, paired by rows.

        Raises:
            ValueError: see :meth:`branches`.
        """
        branches = self.branches(*views)
        with pyro.plate("pairs", len(views[0]), dim=-1):
            for j, branch in enumerate(branches, start=1):
                point = branch.point.detach() if self.stop_gradient else branch.point
                pyro.sample(f"z{j}", Delta(point, event_dim=1))

    def predictions(self, *views: Tensor) -> None:
        """A Pyro guide that draws "z1", "z2", ... from the predictions made from the same view; not for training.

        Args:
            views: tensors with one leading dimension N, paired by rows.

        Raises:
            ValueError: see :meth:`branches`.
        """
        super().forward(*views)
