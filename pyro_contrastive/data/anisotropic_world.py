"""Pairs whose latents vary more along some axes than along others, from one or several augmentation families."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import pyro.distributions as pyro_dist
import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

from pyro_contrastive.data.sphere_world import World
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.ops.anisotropic import sample_anisotropic
from pyro_contrastive.ops.random import derived_seed, seeded

__all__ = ["AnisotropicBatch", "AnisotropicWorld", "bimodal_precision", "linear_precision"]

_LAYERS, _CANDIDATES, _SLOPE = 3, 4096, 0.2

Precision = Sequence[float] | Tensor


def bimodal_precision(dim: int, content: float = 12.5, style: float = 2.5) -> Tensor:
    """Precisions of which the first half (rounded down) are `content` and the others `style`.

    Args:
        dim: d, >= 2.
        content: Precision of the first axes, in the paper's convention; the authors' code counts twice as much, 25.
        style: Of the last axes; 5 in the authors' code.

    Returns:
        ``(dim,)``.

    Example:
        >>> bimodal_precision(4)
        tensor([12.5000, 12.5000,  2.5000,  2.5000])
    """
    return torch.tensor([content] * (dim // 2) + [style] * (dim - dim // 2))


def linear_precision(dim: int, low: float = 2.5, high: float = 12.5) -> Tensor:
    """Evenly spaced precisions, all different: every axis is identified.

    Args:
        dim: d, >= 2.
        low: Precision of the first axis, in the paper's convention (5 in the authors' code).
        high: Of the last axis (25 in the authors' code).

    Returns:
        ``(dim,)``.

    Example:
        >>> linear_precision(3)
        tensor([ 2.5000,  7.5000, 12.5000])
    """
    return torch.linspace(low, high, dim)


class AnisotropicBatch(NamedTuple):
    """What an :class:`AnisotropicWorld` drew. The first axis counts the views: anchor, partners, hard negatives.

    Attributes:
        x: Views, ``(V, N, observed_dim)``.
        z: Their true latents, ``(V, N, dim)``, on the unit sphere.
        mean_direction: What each view shows of its latent, ``(V, N, dim)``: the mean direction of the exact posterior
            of the anchor's; the latent itself where views are injective.
        concentration: Concentrations of the same, ``(V, N)``; infinite where views are injective.
    """

    x: Tensor
    z: Tensor
    mean_direction: Tensor
    concentration: Tensor

    @property
    def x1(self) -> Tensor:
        """Anchors, ``(N, observed_dim)``."""
        return self.x[0]

    @property
    def x2(self) -> Tensor:
        """Partners of the first family."""
        return self.x[1]

    @property
    def z1(self) -> Tensor:
        """Latents of the anchors, ``(N, dim)``."""
        return self.z[0]

    @property
    def z2(self) -> Tensor:
        """Latents of the partners of the first family."""
        return self.z[1]


class AnisotropicWorld(World):
    r"""Views of a point on the sphere and of points around it, scattered by one precision per axis.

    .. math::
        z \sim \mathrm{Uniform}(S^{d-1}), \quad
        p(z_k \mid z) = \frac{1}{C_k(z)} e^{-(z_k - z)^\top \mathrm{diag}(\Lambda_k)\, (z_k - z)}, \quad x = g(z)

    with one partner :math:`z_k` per augmentation family, drawn exactly
    (:func:`~pyro_contrastive.ops.anisotropic.sample_anisotropic`), and, if asked for, hard negatives of the same form.
    Axes with a large precision are "content", those with a small one "style".

    Precisions are the paper's, without a factor 1/2; the authors' code has the factor, and its precisions are twice as
    large. Since :math:`C_k(z)` depends on z, the partners are not uniform on the sphere and (z, z_k) is not
    exchangeable: the likelihood of a partner is exactly AnInfoNCE's with *anchors* as negatives.

    ``g`` is square and invertible: three linear layers without bias, columns of unit length, the best conditioned of
    4,096 random ones, with LeakyReLU(0.2) between them.

    With a finite `concentration` views are ambiguous as in :class:`~pyro_contrastive.data.SphereWorld`: each shows
    :math:`m \sim \mathrm{vMF}(z, \kappa)` with a :math:`\kappa` of its own, through :math:`x = g(m, \log \kappa)`. The
    posterior of an *anchor's* latent is then exactly vMF(m, kappa) (:meth:`posterior`), that of a partner's nearly.

    Args:
        precision: Lambda, >= 0, ``(d,)`` with d >= 2; or ``(K, d)``: one row per family.
        negative_precision: Lambda of hard negatives, ``(d,)``; None: there are none.
        num_negatives: Hard negatives per anchor, >= 1.
        concentration: ``math.inf`` (injective views), a number > 0, or a pair ``(low, high)``: log-uniform.
        generator: ``"network"``, or ``"identity"``: x is the latent itself, as an oracle encoder wants it.
        seed: Seed of the network, >= 0. Another seed is another world.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Rusak, Reizinger, Juhos, Bringmann, Zimmermann and Brendel, "InfoNCE: Identifying the Gap Between Theory and
        Practice", AISTATS 2025, arXiv 2407.00143. Their public code draws from a thick shell, which is 2 % off.

    Example:
        >>> world = AnisotropicWorld(linear_precision(3), negative_precision=[1.0, 1.0, 1.0])
        >>> batch = world.sample(5, seed=0)
        >>> batch.x.shape, batch.z1.shape, len(next(world.batches(5)))
        (torch.Size([3, 5, 3]), torch.Size([5, 3]), 3)
    """

    precision: Tensor
    negative_precision: Tensor | None
    weights: Tensor

    def __init__(
        self,
        precision: Precision | Sequence[Precision],
        *,
        negative_precision: Precision | None = None,
        num_negatives: int = 1,
        concentration: float | tuple[float, float] = math.inf,
        generator: Literal["network", "identity"] = "network",
        seed: int = 0,
    ) -> None:
        super().__init__()
        families = _checked("precision", precision)
        families = families.unsqueeze(0) if families.dim() == 1 else families
        if families.dim() != 2 or families.shape[-1] < 2 or not len(families):
            raise ValueError(f"`precision` must be (d,) or (K, d) with d >= 2, got shape {tuple(families.shape)}")
        dim = families.shape[-1]
        negative = None if negative_precision is None else _checked("negative_precision", negative_precision)
        if negative is not None and negative.shape != (dim,):
            raise ValueError(f"`negative_precision` must be ({dim},), got shape {tuple(negative.shape)}")
        if not isinstance(num_negatives, int) or num_negatives < 1:
            raise ValueError(f"`num_negatives` must be an integer >= 1, got {num_negatives!r}")
        low, high = concentration if isinstance(concentration, tuple) else (concentration, concentration)
        if not 0 < low <= high or (low < high and high == math.inf):
            raise ValueError(
                "`concentration` must be > 0 (math.inf: injective views) or (low, high) with 0 < low <= high < inf, "
                f"got {concentration!r}"
            )
        if generator not in ("network", "identity"):
            raise ValueError(f"`generator` must be 'network' or 'identity', got {generator!r}")
        self.dim = dim
        self.num_negatives = 0 if negative is None else num_negatives
        self._range = (low, high)
        self.observed_dim = dim if low == math.inf else dim + 1
        self.register_buffer("precision", families)
        self.register_buffer("negative_precision", negative)
        layers = _LAYERS if generator == "network" else 0
        self.register_buffer("weights", _well_conditioned(layers, self.observed_dim, seed))

    def observe(self, mean_direction: Tensor, concentration: Tensor) -> Tensor:
        """Apply the network ``g``.

        Args:
            mean_direction: Unit vectors, ``(..., dim)``.
            concentration: ``(...)``, not used where views are injective.

        Returns:
            Views, ``(..., observed_dim)``.
        """
        x = mean_direction
        if self._range[0] < math.inf:
            centre = 0.5 * (math.log(self._range[0]) + math.log(self._range[1]))
            x = torch.cat([x, concentration.log().unsqueeze(-1) - centre], dim=-1)
        for number, weight in enumerate(self.weights):
            x = (leaky_relu(x, _SLOPE) if number else x) @ weight
        return x

    def sample(self, num_items: int, seed: int | None = None) -> AnisotropicBatch:
        """Draw anchors with their partners and hard negatives.

        Args:
            num_items: Number of anchors ``N``, ``>= 1``.
            seed: Give the same seed for the same batch; the global random state is then left alone. None: draw from it.

        Returns:
            The batch, on the world's device.

        Raises:
            ValueError: If ``num_items`` or ``seed`` is out of its range.
        """
        if num_items < 1:
            raise ValueError(f"`num_items` must be >= 1, got {num_items!r}")
        if seed is not None:
            with seeded(derived_seed(seed), self.precision.device):
                return self.sample(num_items)
        with torch.no_grad():
            anchor = normalize(self.precision.new_empty(num_items, self.dim).normal_(), dim=-1)
            parts = [anchor] + [sample_anisotropic(anchor, row) for row in self.precision]
            if self.negative_precision is not None:
                parts += sample_anisotropic(anchor.expand(self.num_negatives, -1, -1), self.negative_precision)
            z = torch.stack(parts)
            low, high = self._range
            kappa = low * (high / low if high < math.inf else 1.0) ** torch.rand_like(z[..., 0])
            mean_direction = z if low == math.inf else VonMisesFisher(z, kappa).sample()
            return AnisotropicBatch(self.observe(mean_direction, kappa), z, mean_direction, kappa)

    def views(self, batch: AnisotropicBatch) -> tuple[Tensor, ...]:
        """What a model sees of a batch: anchor, one partner per family, hard negatives."""
        return tuple(batch.x)

    def posterior(self, batch: AnisotropicBatch) -> pyro_dist.TorchDistribution:
        """Exact posterior of the latents of the anchors, each given its view alone.

        Args:
            batch: From this world.

        Returns:
            ``vMF(m, kappa)``, batch shape ``(N,)``; a point mass (``Delta``) where views are injective.
        """
        if self._range[0] == math.inf:
            return pyro_dist.Delta(batch.mean_direction[0], event_dim=1)
        return VonMisesFisher(batch.mean_direction[0], batch.concentration[0])


def _checked(name: str, precision: Precision | Sequence[Precision]) -> Tensor:
    if not isinstance(precision, Tensor) and len(precision) and not isinstance(precision[0], (int, float)):
        rows = [torch.as_tensor(row, dtype=torch.get_default_dtype()) for row in precision]
        if len({row.shape for row in rows}) > 1:
            raise ValueError(f"`{name}` must have rows of one length, got {[tuple(row.shape) for row in rows]}")
        value = torch.stack(rows)
    else:
        value = torch.as_tensor(precision, dtype=torch.get_default_dtype()).detach().clone()
    if not (value.ge(0) & value.isfinite()).all():
        raise ValueError(f"`{name}` must be >= 0 and finite, got {value.tolist()}")
    return value


def _well_conditioned(number: int, dim: int, seed: int) -> Tensor:
    """``(number, dim, dim)``: of many random matrices with columns of unit length those with the least condition."""
    generator = torch.Generator().manual_seed(derived_seed(seed))
    drawn = normalize(torch.rand(_CANDIDATES, dim, dim, generator=generator) * 2 - 1, dim=-2)
    values = torch.linalg.svdvals(drawn)
    return drawn[(values[:, 0] / values[:, -1]).topk(number, largest=False).indices]
