"""A world whose latents are not uniform on the sphere: pairs of independent items, selected by how close they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

from pyro_contrastive.data.sphere_world import SphereBatch, World
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.ops.random import derived_seed, seeded

__all__ = ["AcceptanceWorld"]

_HIDDEN = 32
_PAIRS_PER_ITEM = 1 / 16  # accepted pairs per item of a pool: how often a pool uses an item twice


class AcceptanceWorld(World):
    r"""Ambiguous items and the pairs of them that are accepted as showing the same thing.

    .. math::
        x \sim N(0, I), \quad z \mid x \sim \mathrm{vMF}(\mu^*(x), \kappa^*(x)), \quad
        P(\text{accept } x, x' \mid z, z') = e^{\kappa_{\mathrm{pair}} (z \cdot z' - 1)}

    with random networks :math:`\mu^*, \kappa^*`. Accepted pairs have the density
    :math:`q(x, x') \propto p(x)\, p(x')\, F(x, x')`, F the expectation of :math:`e^{\kappa z \cdot z'}` over both
    posteriors. Nothing makes the aggregate of the posteriors uniform, so :math:`m(x) = E_{x'} F(x, x')` is not constant
    and the views of accepted pairs have the marginal :math:`p(x)\, m(x)`, not p(x).

    The law that the evidence can recover is :math:`\mathrm{vMF}(\mu^*(x), \kappa^*(x))`, the posterior of an item
    *before* selection: :meth:`posterior`.

    Args:
        dim: Dimension ``d`` of the latents, ``>= 2``.
        concentration: ``(low, high)``: :math:`\kappa^*(x)` is log-uniform on it, ``0 < low < high < inf``.
        pair_concentration: ``kappa_pair > 0``, finite.
        observed_dim: Dimension of the items. None: ``dim``.
        offset: How far the directions are from centred, ``>= 0``: the mean of the network's output in units of the root
            mean square of its variation. At d = 10, 0 gives an aggregate of mean length 0.05, 0.75 one of 0.5; even
            then it is far from uniform (its second moments differ by a factor of 7 between axes).
        seed: Seed of the networks, ``>= 0``.

    Raises:
        ValueError: If an argument is out of its range.

    Source: the generator of Kirchhof et al. (ICML 2023, arXiv 2302.02865), with Gaussian items and an acceptance
    probability proportional to the von Mises-Fisher kernel instead of its odds against the uniform law.

    Example:
        >>> world = AcceptanceWorld(dim=4, pair_concentration=5.0)
        >>> batch = world.sample(6, seed=0)
        >>> batch.x1.shape, world.posterior(batch.x1).batch_shape
        (torch.Size([6, 4]), torch.Size([6]))
    """

    direction1: Tensor
    direction2: Tensor
    shift: Tensor
    scale: Tensor
    width1: Tensor
    width2: Tensor
    width_moments: Tensor

    def __init__(
        self,
        dim: int = 10,
        concentration: tuple[float, float] = (16.0, 64.0),
        pair_concentration: float = 20.0,
        *,
        observed_dim: int | None = None,
        offset: float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__()
        observed_dim = dim if observed_dim is None else observed_dim
        if dim < 2 or observed_dim < 1:
            raise ValueError(f"`dim` must be >= 2 and `observed_dim` >= 1, got {dim!r} and {observed_dim!r}")
        if len(concentration) != 2 or not 0 < concentration[0] < concentration[1] < math.inf:
            raise ValueError(f"`concentration` must be (low, high) with 0 < low < high < inf, got {concentration!r}")
        if not 0 < pair_concentration < math.inf:
            raise ValueError(
                f"`pair_concentration` must be positive and finite, got {pair_concentration!r}; two independent items "
                "never share a latent exactly: use SphereWorld(pair_concentration=math.inf) for that"
            )
        if not 0 <= offset < math.inf:
            raise ValueError(f"`offset` must be >= 0 and finite, got {offset!r}")
        self.dim = dim
        self.concentration = concentration
        self.pair_concentration = pair_concentration
        self.observed_dim = observed_dim
        generator = torch.Generator().manual_seed(derived_seed(seed))

        def layer(fan_in: int, fan_out: int) -> Tensor:
            return math.sqrt(2 / fan_in) * torch.randn(fan_in, fan_out, generator=generator)

        self.register_buffer("direction1", layer(observed_dim, _HIDDEN))
        self.register_buffer("direction2", layer(_HIDDEN, dim))
        self.register_buffer("width1", layer(observed_dim, _HIDDEN))
        self.register_buffer("width2", layer(_HIDDEN, 1))
        x = torch.randn(16_384, observed_dim, generator=generator)
        output = leaky_relu(x @ self.direction1, 0.2) @ self.direction2
        size = (output - output.mean(0)).square().sum(-1).mean().sqrt()
        self.register_buffer("shift", offset * size * normalize(output.mean(0), dim=0) - output.mean(0))
        raw = leaky_relu(x @ self.width1, 0.2) @ self.width2
        self.register_buffer("width_moments", torch.stack([raw.mean(), raw.std()]))
        with torch.no_grad(), seeded(derived_seed(seed, 1)):
            z = self.posterior(x[:4096]).sample()
            rate = torch.exp(pair_concentration * (z[:2048] @ z[2048:].mT - 1)).mean().item()
        self._pool = min(max(math.ceil(_PAIRS_PER_ITEM / rate), 16), 4096)

    def posterior(self, x: Tensor) -> VonMisesFisher:
        r"""The law of the latent of an item, by definition of the world.

        Args:
            x: Items, ``(..., observed_dim)``.

        Returns:
            :math:`\mathrm{vMF}(\mu^*(x), \kappa^*(x))`, batch shape ``(...)``.
        """
        mean = normalize(leaky_relu(x @ self.direction1, 0.2) @ self.direction2 + self.shift, dim=-1)
        raw = (leaky_relu(x @ self.width1, 0.2) @ self.width2).squeeze(-1)
        rank = torch.special.ndtr((raw - self.width_moments[0]) / self.width_moments[1])  # close to uniform
        low, high = self.concentration
        return VonMisesFisher(mean, low * (high / low) ** rank)

    @torch.no_grad()
    def sample(self, num_pairs: int, seed: int | None = None) -> SphereBatch:
        """Draw accepted pairs.

        All pairs between two pools of independent items are offered; each is accepted with its own probability, so
        every accepted pair has the exact law. Pools are small enough that an item of one is used again in about one
        pair of sixteen.

        Args:
            num_pairs: Number of pairs ``N``, ``>= 1``.
            seed: Give the same seed for the same pairs; the global random state is then left alone. None: draw from it.

        Returns:
            The pairs. ``z1`` and ``z2`` are the latents that were accepted, which are closer to each other and to the
            crowd than draws from :meth:`posterior`.

        Raises:
            ValueError: If ``num_pairs`` or ``seed`` is out of its range.
        """
        if num_pairs < 1:
            raise ValueError(f"`num_pairs` must be >= 1, got {num_pairs!r}")
        if seed is not None:
            with seeded(derived_seed(seed), self.shift.device):
                return self.sample(num_pairs)
        kept: list[tuple[Tensor, ...]] = []
        count = 0
        pools = max(1, min(math.ceil(num_pairs / (_PAIRS_PER_ITEM * self._pool)), 2_000_000 // self._pool**2))
        like = self.shift
        while count < num_pairs:
            x = like.new_empty(2, pools, self._pool, self.observed_dim).normal_()
            law = self.posterior(x)
            z = law.sample()
            threshold = self.pair_concentration * (1 - z[0] @ z[1].mT)
            accepted = torch.empty_like(threshold).exponential_() > threshold
            pool, first, second = accepted.nonzero(as_tuple=True)
            columns = (x, z, law.mean_direction, law.concentration)
            kept.append(tuple(part for c in columns for part in (c[0, pool, first], c[1, pool, second])))
            count += len(pool)
        order = torch.randperm(count, device=like.device)[:num_pairs]
        x1, x2, z1, z2, m1, m2, k1, k2 = (torch.cat(parts)[order] for parts in zip(*kept, strict=True))
        return SphereBatch(x1, x2, z1, z2, m1, m2, k1, k2)
