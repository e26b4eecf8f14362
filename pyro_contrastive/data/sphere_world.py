"""A generative model of pairs of views whose exact posterior is known: the ground truth of every calibration check."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as pyro_dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from pyro_contrastive.distributions import HypersphericalUniform, VonMisesFisher, log_uniform_density
from pyro_contrastive.kernels import expected_pairs
from pyro_contrastive.ops.random import derived_seed, seeded

__all__ = ["SphereBatch", "SphereWorld"]


class SphereBatch(NamedTuple):
    """Pairs drawn from a :class:`SphereWorld`, with everything that made them.

    Attributes:
        x1: First views, ``(N, observed_dim)``.
        x2: Second views.
        z1: True latent points of the first views, ``(N, dim)``, on the unit sphere.
        z2: Of the second views.
        mean_direction1: Mean directions ``m`` of the exact posteriors of ``z1`` (of the normalised likelihoods, where
            the latent is not uniform), ``(N, dim)``.
        mean_direction2: Of ``z2``.
        concentration1: Their concentrations, ``(N,)``.
        concentration2: Of ``z2``.
    """

    x1: Tensor
    x2: Tensor
    z1: Tensor
    z2: Tensor
    mean_direction1: Tensor
    mean_direction2: Tensor
    concentration1: Tensor
    concentration2: Tensor


class World(nn.Module):
    """A module that draws views of items whose latents are known. Subclasses define :meth:`sample`."""

    def sample(self, num_items: int, seed: int | None = None) -> Any:
        """Draw items; the same seed gives the same items."""
        raise NotImplementedError(f"{type(self).__name__} must define sample(num_items, seed)")

    def views(self, batch: Any) -> tuple[Tensor, ...]:
        """The views of a batch, what a model may see of it: ``(x1, x2)``."""
        return batch.x1, batch.x2

    def batches(self, batch_size: int = 256, seed: int = 0) -> WorldBatches:
        """Give fresh items without end, for training.

        Args:
            batch_size: Items per batch, ``>= 1``.
            seed: Base seed, ``>= 0``; every batch has its own, derived from it and the position.

        Returns:
            An endless iterator of the views, ``(x1, x2)``, which can be set to any position by ``seek``.
        """
        return WorldBatches(self, batch_size, seed)


class SphereWorld(World):
    r"""Pairs of ambiguous views of points on a sphere, as a Pyro model with a known posterior.

    .. math::
        z_1 &\sim \mathrm{Uniform}(S^{d-1}), \quad z_2 \sim \mathrm{vMF}(z_1, \kappa_{\mathrm{pair}}) \\
        \kappa_i &\sim \mathrm{law}, \quad m_i \sim \mathrm{vMF}(z_i, \kappa_i), \quad x_i = g(m_i, \log \kappa_i)

    with ``g`` a fixed, injective random network. Seeing ``x_i`` is therefore seeing ``(m_i, kappa_i)``, and because
    ``z_i`` is uniform and the von Mises-Fisher density is symmetric in its two directions, the posterior of ``z_i`` is
    *exactly* ``vMF(m_i, kappa_i)``. Calling the world, ``world(num_pairs)``, runs it as a Pyro model: plate
    ``"pairs"``, one site per field of :class:`SphereBatch`.

    With ``prior_concentration`` the first latent is :math:`z_1 \sim \mathrm{vMF}(e_1, \kappa_0)` around the first axis
    instead of uniform. Then ``vMF(m_1, kappa_1)`` is the *normalised likelihood* of ``z_1``, and its posterior has the
    natural parameter :math:`\kappa_1 m_1 + \kappa_0 e_1`.

    Args:
        dim: Dimension ``d`` of the ambient space, ``>= 2``.
        concentration: Law of the ``kappa_i``: a pair ``(low, high)`` (log-uniform on it), one number ``> 0`` (the same
            for all), ``math.inf`` (injective views: ``m_i = z_i``, nothing is ambiguous), or any Pyro distribution over
            positive numbers with empty batch and event shape.
        pair_concentration: ``kappa_pair > 0``; ``math.inf``: the views share one latent, ``z2 = z1``.
        prior_concentration: ``kappa_0 >= 0`` of the law of ``z1``, finite; 0 is the uniform law.
        observed_dim: Dimension of the views, ``>= dim + 1`` (less could not be injective). None: the larger of 32 and
            ``2 * dim``.
        seed: Seed of the network, ``>= 0``. Another seed is another world.

    Raises:
        ValueError: If an argument is out of its range.

    Source: the controlled experiment of Kirchhof et al., "Probabilistic Contrastive Learning Recovers the Correct
    Aleatoric Uncertainty of Ambiguous Inputs", ICML 2023 (arXiv 2302.02865), changed so that the posterior is exact.

    Example:
        >>> world = SphereWorld(dim=3, observed_dim=8)
        >>> batch = world.sample(5, seed=0)
        >>> batch.x1.shape, batch.z1.shape, batch.concentration1.shape
        (torch.Size([5, 8]), torch.Size([5, 3]), torch.Size([5]))
        >>> world.posterior(batch, view=1).batch_shape
        torch.Size([5])
    """

    weight1: Tensor
    weight2: Tensor
    bias: Tensor

    def __init__(
        self,
        dim: int = 10,
        concentration: float | tuple[float, float] | pyro_dist.TorchDistribution = (16.0, 64.0),
        pair_concentration: float = 20.0,
        *,
        prior_concentration: float = 0.0,
        observed_dim: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"`dim` must be >= 2, got {dim!r}")
        observed_dim = max(32, 2 * dim) if observed_dim is None else observed_dim
        if observed_dim < dim + 1:
            raise ValueError(
                f"`observed_dim` must be >= dim + 1 = {dim + 1}, or the views could not tell the latents apart, "
                f"got {observed_dim!r}"
            )
        if not pair_concentration > 0:
            raise ValueError(
                f"`pair_concentration` must be > 0 (math.inf: one shared latent), got {pair_concentration!r}"
            )
        if not 0 <= prior_concentration < math.inf:
            raise ValueError(f"`prior_concentration` must be >= 0 and finite, got {prior_concentration!r}")
        if isinstance(concentration, tuple):
            if len(concentration) != 2 or not 0 < concentration[0] < concentration[1] < math.inf:
                raise ValueError(
                    f"`concentration` must be (low, high) with 0 < low < high < inf, got {concentration!r}"
                )
            self._log_centre = 0.5 * (math.log(concentration[0]) + math.log(concentration[1]))
        elif isinstance(concentration, (int, float)):
            if not concentration > 0:
                raise ValueError(f"`concentration` must be > 0 (math.inf: injective views), got {concentration!r}")
            self._log_centre = math.log(concentration)
        else:
            shape = getattr(concentration, "batch_shape", None), getattr(concentration, "event_shape", None)
            if shape != (torch.Size(), torch.Size()):
                raise ValueError(
                    "`concentration` must be a number, a pair (low, high) or a Pyro distribution with empty batch and "
                    f"event shape, got {concentration!r}"
                )
            self._log_centre = 0.0
        self.dim = dim
        self.concentration = concentration
        self.pair_concentration = pair_concentration
        self.prior_concentration = prior_concentration
        self.observed_dim = observed_dim
        generator = torch.Generator().manual_seed(derived_seed(seed))
        gain = math.sqrt(observed_dim / (dim + 1))  # entries of x of order one
        self.register_buffer("weight1", gain * _orthogonal(observed_dim, generator)[:, : dim + 1])
        self.register_buffer("weight2", _orthogonal(observed_dim, generator))
        self.register_buffer("bias", 0.5 * torch.randn(observed_dim, generator=generator))

    def forward(self, num_pairs: int) -> SphereBatch:
        """Run the world as a Pyro model.

        Args:
            num_pairs: Number of pairs ``N``, ``>= 1``.

        Returns:
            The pairs, on the world's device. Randomness comes from PyTorch's global generators.
        """
        like = self.weight1
        with pyro.plate("pairs", num_pairs):
            prior: pyro_dist.TorchDistribution = HypersphericalUniform(self.dim, dtype=like.dtype, device=like.device)
            if self.prior_concentration:
                prior = VonMisesFisher(self._axis(like), like.new_full((), self.prior_concentration))
            z1 = pyro.sample("z1", prior)
            z2 = _around("z2", z1, self.pair_concentration)
            mean_direction1, concentration1, x1 = self._view(1, z1)
            mean_direction2, concentration2, x2 = self._view(2, z2)
        return SphereBatch(x1, x2, z1, z2, mean_direction1, mean_direction2, concentration1, concentration2)

    def _axis(self, like: Tensor) -> Tensor:
        return torch.eye(self.dim, dtype=like.dtype, device=like.device)[0]

    def _view(self, view: int, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        law = self.concentration
        name = f"concentration{view}"
        if isinstance(law, tuple):
            log_uniform = pyro_dist.Uniform(z.new_full((), math.log(law[0])), z.new_full((), math.log(law[1])))
            kappa = pyro.sample(
                name, pyro_dist.TransformedDistribution(log_uniform, [torch.distributions.ExpTransform()])
            )
        elif isinstance(law, (int, float)):
            kappa = pyro.deterministic(name, z.new_full(z.shape[:-1], law))
        else:
            kappa = pyro.sample(name, law)
        kappa = kappa.to(z)
        mean_direction = _around(f"mean_direction{view}", z, math.inf if law == math.inf else kappa)
        return mean_direction, kappa, pyro.deterministic(f"x{view}", self.observe(mean_direction, kappa), event_dim=1)

    def observe(self, mean_direction: Tensor, concentration: Tensor) -> Tensor:
        """Apply the network ``g``.

        Args:
            mean_direction: Unit vectors, ``(..., dim)``.
            concentration: ``(...)``, positive. Infinite ones carry no information and enter as zero.

        Returns:
            Views, ``(..., observed_dim)``.
        """
        log_kappa = concentration.log() - self._log_centre
        log_kappa = torch.where(concentration.isinf(), torch.zeros_like(log_kappa), log_kappa)
        features = math.sqrt(self.dim) * torch.cat([mean_direction, log_kappa.unsqueeze(-1)], dim=-1)
        return leaky_relu(features @ self.weight1.mT + self.bias, 0.2) @ self.weight2.mT

    def sample(self, num_pairs: int, seed: int | None = None) -> SphereBatch:
        """Draw pairs, outside any Pyro handler.

        Args:
            num_pairs: Number of pairs ``N``, ``>= 1``.
            seed: Give the same seed for the same pairs; the global random state is then left alone. None: draw from it.

        Returns:
            The pairs, detached, on the world's device.

        Raises:
            ValueError: If ``num_pairs`` or ``seed`` is out of its range.
        """
        if num_pairs < 1:
            raise ValueError(f"`num_pairs` must be >= 1, got {num_pairs!r}")
        with contextlib.ExitStack() as stack:
            if seed is not None:
                stack.enter_context(seeded(derived_seed(seed), self.weight1.device))
            stack.enter_context(poutine.block())
            stack.enter_context(torch.no_grad())
            return self(num_pairs)

    def posterior(self, batch: SphereBatch, view: int = 1, *, prior_power: float = 1.0) -> pyro_dist.TorchDistribution:
        r"""Exact posterior of the latent of one view, given that view alone.

        Args:
            batch: From this world.
            view: 1 or 2.
            prior_power: Power of the law of the latent that multiplies the likelihood. 1 gives the posterior, 0 the
                normalised likelihood, 1/2 the law half way between them; all the same for a uniform latent.

        Returns:
            ``vMF(m, kappa)`` with its natural parameter shifted by ``prior_power * kappa_0 e_1``, batch shape ``(N,)``;
            a point mass (``Delta``) where the views are injective.

        Raises:
            ValueError: If ``view`` is neither 1 nor 2, or for the second view where its latent is neither uniform nor
                the first one's: its posterior is no von Mises-Fisher law then.
        """
        if view not in (1, 2):
            raise ValueError(f"`view` must be 1 or 2, got {view!r}")
        mean_direction = batch.mean_direction1 if view == 1 else batch.mean_direction2
        concentration = batch.concentration1 if view == 1 else batch.concentration2
        if self.concentration == math.inf:
            return pyro_dist.Delta(mean_direction, event_dim=1)
        shift = prior_power * self.prior_concentration
        if shift == 0:
            return VonMisesFisher(mean_direction, concentration)
        if view == 2 and self.pair_concentration != math.inf:
            raise ValueError(
                "with `prior_concentration` > 0 and a finite `pair_concentration` the posterior of the second latent "
                "is no von Mises-Fisher law; use view=1, or prior_power=0 for its normalised likelihood"
            )
        return _from_natural(concentration.unsqueeze(-1) * mean_direction + shift * self._axis(mean_direction))

    def fused_posterior(self, batch: SphereBatch) -> pyro_dist.TorchDistribution:
        r"""Exact posterior of the one latent that both views share, given both.

        :math:`\mathrm{vMF}` with :math:`\kappa \mu = \kappa_1 m_1 + \kappa_2 m_2 + \kappa_0 e_1`.

        Args:
            batch: From this world.

        Returns:
            The posterior, batch shape ``(N,)``.

        Raises:
            ValueError: If the views of this world do not share a latent (finite ``pair_concentration``).
        """
        if self.pair_concentration != math.inf:
            raise ValueError(
                f"the views share one latent only for pair_concentration=math.inf, got {self.pair_concentration!r}; "
                "use `posterior`"
            )
        if self.concentration == math.inf:
            return self.posterior(batch)
        natural = batch.concentration1.unsqueeze(-1) * batch.mean_direction1
        natural = natural + batch.concentration2.unsqueeze(-1) * batch.mean_direction2
        return _from_natural(natural + self.prior_concentration * self._axis(natural))

    def mutual_information(self, num_pairs: int = 10_000, seed: int = 0) -> tuple[float, float]:
        """How much one view tells about the other: the mean of the exact log density ratio of pairs.

        No contrastive likelihood exceeds it, and it is what a pair can teach an encoder.

        Args:
            num_pairs: Pairs to average over, ``>= 2``.
            seed: Of these.

        Returns:
            The information and its standard error, in nats. Infinite for injective views of one shared latent.

        Raises:
            ValueError: If an argument is out of its range, or the latents are not uniform.

        Example:
            >>> information, error = SphereWorld(dim=3, concentration=100.0).mutual_information()
            >>> round(information, 1)
            2.4
        """
        if self.prior_concentration:
            raise ValueError(
                "the density ratio is known for uniform latents, got "
                f"prior_concentration={self.prior_concentration!r}; use 0"
            )
        if num_pairs < 2:
            raise ValueError(f"`num_pairs` must be >= 2, got {num_pairs!r}")
        batch = self.sample(num_pairs, seed)
        first: Any = self.posterior(batch, 1)
        second: Any = self.posterior(batch, 2)
        if self.concentration == math.inf:
            if self.pair_concentration == math.inf:
                return math.inf, 0.0
            step = VonMisesFisher(batch.z1, batch.z1.new_full(batch.z1.shape[:-1], self.pair_concentration))
            ratio = step.log_prob(batch.z2) - log_uniform_density(self.dim)
        else:
            ratio = expected_pairs(first, second, self.pair_concentration).diagonal()
        return float(ratio.mean()), float(ratio.std() / math.sqrt(num_pairs))


class WorldBatches:
    """Endless iterator over fresh items of a world; see :meth:`World.batches`.

    Args:
        world: Where they come from.
        batch_size: Items per batch, ``>= 1``.
        seed: Base seed, ``>= 0``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, world: World, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be >= 1, got {batch_size!r}")
        derived_seed(seed)  # checks it
        self.world = world
        self.batch_size = batch_size
        self.seed = seed
        self._next = 0

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Let ``batch`` be the next batch; an endless stream has one epoch only.

        Args:
            epoch: Must be 0.
            batch: Position, ``>= 0``.

        Raises:
            ValueError: If an argument is out of its range.
        """
        if epoch != 0 or batch < 0:
            raise ValueError(f"`epoch` must be 0 and `batch` >= 0, got {epoch!r} and {batch!r}")
        self._next = batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        batch = self.world.sample(self.batch_size, seed=derived_seed(self.seed, self._next))
        self._next += 1
        return self.world.views(batch)


def _around(name: str, centre: Tensor, concentration: float | Tensor) -> Tensor:
    """Sample a von Mises-Fisher point around a centre; an infinite concentration gives the centre."""
    if not isinstance(concentration, Tensor):
        if concentration == math.inf:
            return pyro.deterministic(name, centre, event_dim=1)
        concentration = centre.new_full(centre.shape[:-1], concentration)
    return pyro.sample(name, VonMisesFisher(centre, concentration))


def _from_natural(natural: Tensor) -> VonMisesFisher:
    """The law with density proportional to exp(natural . z)."""
    concentration = natural.norm(dim=-1)
    return VonMisesFisher(natural / concentration.unsqueeze(-1), concentration)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Draw a random orthogonal matrix, so that no direction of the latents is hard to see."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return q * r.diagonal().sign()
