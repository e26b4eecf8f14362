"""The projected normal distribution with diagonal covariance, in any dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_contrastive.ops.precision import matmul
from pyro_contrastive.ops.projected import log_radial_integral, projected_mean
from pyro_contrastive.ops.squares import squared_length
from pyro_contrastive.ops.tiles import Pairs, Tensors

from ._checks import check_float, check_on_sphere, check_same, check_unit, check_vectors

ENTROPY_NUM_SAMPLES = 16
"""Draws per element behind ``ProjectedNormal.entropy()``, and so behind its ``kl_divergence`` to the uniform law."""


class ProjectedNormal(TorchDistribution):
    r"""Direction :math:`z = w/|w|` of a Gaussian :math:`w \sim N(\mu, \mathrm{diag}(\sigma^2))`.

    The law depends on ``loc`` and ``scale_diag`` only up to a common factor: ``(c * loc, c * scale_diag)`` is the same
    distribution for every ``c > 0``. With ``loc = 0`` and equal scales it is uniform. For ``|loc|`` much larger than
    ``scale_diag`` it is a Gaussian of standard deviation ``scale_diag / |loc|`` in the tangent space, hence comparable
    to a von Mises-Fisher concentration of ``|loc|^2 / scale_diag^2``.

    With :math:`\tilde y = y/\sigma`, :math:`m = \mu/\sigma`, :math:`\hat y = \tilde y/|\tilde y|`,
    :math:`a = m \cdot \hat y` and :math:`J_d` of :func:`~pyro_contrastive.ops.projected.log_radial_integral`,

    .. math:: \log p(y) = -\tfrac d2 \log 2\pi - \sum_i \log \sigma_i - d \log |\tilde y|
              - \tfrac12 |m - \max(a, 0) \hat y|^2 + \log J_d(a).

    Unlike :class:`pyro.distributions.ProjectedNormal` (unit covariance, density for ``d`` = 2, 3, 4 only) the density
    exists in every dimension and has a useful gradient at the antipode; the two agree where both exist.

    Args:
        loc: mean of the Gaussian, shape ``(*batch, d)`` with ``d >= 2``; not necessarily a unit vector, may be zero.
        scale_diag: standard deviations of the Gaussian, positive; any shape that broadcasts with ``loc`` without
            changing ``d``, so ``(*batch, d)``, ``(*batch, 1)`` or a scalar tensor.
        validate_args: check the arguments and the values handed to :meth:`log_prob`; the default is torch's setting.

    Raises:
        TypeError: for dtypes other than float32 and float64, or two different ones.
        ValueError: on shapes that do not fit, ``d < 2``, and under validation on non-finite parameters, on a scale that
            is not positive and on values that are not unit vectors of length ``d``.

    References:
        Hernandez-Stumpfhauser, Breidt, van der Woerd: The General Projected Normal Distribution of Arbitrary Dimension
        (Bayesian Analysis 2017), equation 3.

    Example:
        >>> posterior = ProjectedNormal(torch.tensor([0.0, 0.0, 5.0]), torch.ones(3))
        >>> posterior.rsample((7,)).shape
        torch.Size([7, 3])
        >>> posterior.log_prob(torch.tensor([0.0, 0.0, 1.0])) > 0
        tensor(True)
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "scale_diag": constraints.independent(constraints.positive, 1),
    }
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, scale_diag: Tensor, *, validate_args: bool | None = None) -> None:
        check_float("loc", loc)
        check_float("scale_diag", scale_diag)
        check_same("loc", loc, "scale_diag", scale_diag)
        dim = check_vectors("loc", loc)
        try:
            shape = torch.broadcast_shapes(loc.shape, scale_diag.shape)
        except RuntimeError:
            shape = torch.Size()
        if shape[-1:] != (dim,):
            raise ValueError(
                f"`scale_diag` must broadcast with `loc` of shape {tuple(loc.shape)}, got {tuple(scale_diag.shape)}; "
                f"pass (*batch, {dim}), (*batch, 1) for an isotropic Gaussian, or a scalar tensor"
            )
        self.loc, self.scale_diag = loc.expand(shape), scale_diag.expand(shape)
        validate = self._validate_args if validate_args is None else validate_args
        if validate:
            _require(self.loc.isfinite(), "`loc` must be finite", loc, "check the network that computes it")
            _require(
                (self.scale_diag > 0) & self.scale_diag.isfinite(),
                "`scale_diag` must be positive and finite",
                scale_diag,
                "pass for example the exponential or softplus of a network output",
            )
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    @staticmethod
    def infer_shapes(  # type: ignore[override]
        loc: tuple[int, ...], scale_diag: tuple[int, ...] = ()
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Batch and event shape from the shapes of the arguments, as Pyro's shape inference asks for."""
        shape = torch.broadcast_shapes(tuple(loc), tuple(scale_diag))
        return shape[:-1], shape[-1:]

    def expand(self, batch_shape: Any, _instance: ProjectedNormal | None = None) -> ProjectedNormal:
        """Same distribution with its batch shape expanded to ``batch_shape``, without copying."""
        new = self._get_checked_instance(ProjectedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        shape = batch_shape + self.event_shape
        new.loc, new.scale_diag = self.loc.expand(shape), self.scale_diag.expand(shape)
        super(ProjectedNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean_direction(self) -> Tensor:
        """Direction ``loc/|loc|`` of the mean of the Gaussian, shape ``(*batch, d)``; zero where ``loc`` is zero.

        The embedding to use for an input. By symmetry it is also the direction of the :attr:`mean` of ``z``, and the
        mode, if the scales are equal; if they differ, both are pulled towards the axes with the larger ratio of mean to
        scale.
        """
        return _normalize(self.loc)

    @property
    def mean(self) -> Tensor:
        """Mean E[z], inside the sphere, shape ``(*batch, d)``, by quadrature (``ops.projected.projected_mean``)."""
        return projected_mean(self.loc, self.scale_diag)

    @property
    def mean_resultant_length(self) -> Tensor:
        """Length of the mean, shape ``batch``: 1 for a point, 0 for a law without a preferred direction."""
        return torch.linalg.vector_norm(self.mean, dim=-1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from the distribution, with the pathwise gradient to both parameters.

        Args:
            sample_shape: leading shape of independent draws.

        Returns:
            Unit vectors of shape ``(*sample_shape, *batch, d)``.
        """
        return _normalize(self._rsample_gaussian(sample_shape))

    def _rsample_gaussian(self, sample_shape: Any) -> Tensor:
        """The Gaussian ``w`` before projection, shape ``(*sample_shape, *batch, d)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.addcmul(self.loc, self.scale_diag, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to the surface measure of the sphere (which integrates to its area).

        Args:
            value: unit vectors, shape broadcastable to ``(*sample, *batch, d)``.

        Returns:
            Tensor of shape ``(*sample, *batch)``.
        """
        check_on_sphere("value", value, self.event_shape[0])
        if self._validate_args:
            check_unit("value", value)
        dim = self.event_shape[0]
        whitening = self._whitening()
        whitened = value * whitening
        length = torch.linalg.vector_norm(whitened, dim=-1, keepdim=True)
        direction = whitened / length
        location = self.loc / self.scale_diag
        a = (location * direction).sum(-1, keepdim=True)
        # The vector difference, not |m|^2 - a^2, which cancels: float32 would lose 0.1 nats at |m| = 1000.
        quadratic = squared_length(location - a.clamp_min(0.0) * direction)
        gaussian = whitening.log().sum(-1) - 0.5 * dim * math.log(2 * math.pi) - 0.5 * quadratic
        return gaussian - dim * length.squeeze(-1).log() + log_radial_integral(dim, a.squeeze(-1))

    def cross_log_prob(self, value: Tensor) -> Tensor:
        """Log density of every value under every member of the batch, by two matrix products.

        Lighter than :meth:`log_prob` on a grid by a factor ``d`` in memory. The square of the distance to the ray is a
        difference here, so the rounding error is that of the dtype times ``|loc / scale_diag|^2``.

        Args:
            value: ``(..., N, d)`` points of the sphere.

        Returns:
            ``(..., N, M)`` for a batch of shape ``(..., M)``: entry (i, j) scores value i under member j.
        """
        return self.cross_pairs(value).grid()

    def cross_pairs(self, value: Tensor) -> Pairs:
        """:meth:`cross_log_prob`, unevaluated."""
        check_on_sphere("value", value, self.event_shape[0])
        whitening, location = self._whitening(), self.loc / self.scale_diag
        constants = (location.square().sum(-1, keepdim=True), whitening.log().sum(-1, keepdim=True))
        return Pairs(_cross, (value,), (whitening.square(), location * whitening, *constants))

    def _whitening(self) -> Tensor:
        """``c / scale_diag`` with a constant ``c``: the law does not see a common factor, but the dtype does."""
        return self.scale_diag.detach().amax(-1, keepdim=True) / self.scale_diag

    def entropy(self) -> Tensor:
        r"""Differential entropy in nats: an unbiased Monte-Carlo estimate, as no closed form exists.

        With the Gaussian :math:`w = r u`, :math:`N(w) r^d = p(u) p(\log r | u)`. The entropy of the Gaussian is known
        and the conditional law of the log radius is in closed form but for :math:`J_d`, so

        .. math:: H(u) = H(w) - E[d \log r - \log p(\log r | u)]

        has a far smaller variance than minus the log density of the direction. A control variate of mean zero,
        :math:`\tfrac d2 (r^2 / E r^2 - 1)`, removes most of what is left: for a uniform law nothing is.
        :data:`ENTROPY_NUM_SAMPLES` draws per element come from torch's generator.

        Returns:
            Tensor of shape ``batch`` with the pathwise gradient to both parameters.
        """
        dim = self.event_shape[0]
        whitening = self._whitening()
        unit = self.scale_diag * whitening  # the constant c: measured in it, no square under- or overflows
        gaussian = self._rsample_gaussian((ENTROPY_NUM_SAMPLES,)) / unit
        whitened = gaussian * whitening

        squared_radius = squared_length(gaussian)
        length = torch.linalg.vector_norm(whitened, dim=-1)
        a = (self.loc / self.scale_diag * whitened).sum(-1) / length
        # d log r - log p(log r | u): the law of the log length is that of the log radius, shifted
        log_ratio = 0.5 * squared_radius.log() - length.log()
        quadratic = 0.5 * (length - a).square() - 0.5 * a.clamp_max(0.0).square()
        conditional = dim * log_ratio + quadratic + log_radial_integral(dim, a)
        expected = ((self.loc / unit).square() + whitening.reciprocal().square()).sum(-1)
        control = 0.5 * dim * (squared_radius / expected - 1.0)
        gaussian_entropy = 0.5 * dim * (1.0 + math.log(2 * math.pi)) - whitening.log().sum(-1)
        return gaussian_entropy - (conditional - control).mean(0)


def _cross(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    (value,), (squared_whitening, whitened_location, squared_location, log_whitening) = rows, columns
    dim = value.shape[-1]
    length = matmul(value.square(), squared_whitening.mT).sqrt()
    a = matmul(value, whitened_location.mT) / length
    quadratic = squared_location.mT - a.clamp_min(0.0).square()
    gaussian = log_whitening.mT - 0.5 * dim * math.log(2 * math.pi) - 0.5 * quadratic
    return gaussian - dim * length.log() + log_radial_integral(dim, a)


def _normalize(vector: Tensor) -> Tensor:
    """``vector/|vector|`` over the last axis; the square neither under- nor overflows, and zero maps to zero."""
    tiny = torch.finfo(vector.dtype).tiny
    largest = vector.detach().abs().amax(-1, keepdim=True).clamp_min(tiny)
    vector = vector / largest  # a constant factor: the gradient of the direction does not see it
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp_min(tiny)


def _require(ok: Tensor, rule: str, got: Tensor, way_out: str) -> None:
    if not ok.all():
        raise ValueError(
            f"{rule}, got {int((~ok).sum())} bad entries in a tensor of shape {tuple(got.shape)}; {way_out}"
        )
