"""The released generator of MCInfoNCE's controlled experiment, with its constants corrected."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, softplus

from pyro_contrastive.data.sphere_world import SphereBatch, World, WorldBatches
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.ops import log_partition
from pyro_contrastive.ops.random import derived_seed, seeded

__all__ = ["PairBatches", "PairWorld"]

Family = Literal["vmf", "normal", "laplace"]
Partners = Literal["kernel", "labelled"]

_PROBES = 1000  # inputs on which the spread is checked and the range of the concentrations is set
_ATTEMPTS = 50
_TILE = 64  # references that are weighed against the pool at once: it stays in the cache
_REFERENCES, _PARTNERS_EACH = 8_192, 4  # that a stream draws at once; the partners go to different batches


class PairWorld(World):
    r"""Ambiguous inputs whose posterior is known, and partners chosen by their latents.

    Inputs are :math:`x \sim U[0, 1]^{n}` and two fixed networks say what they show,
    :math:`z \mid x \sim \mathrm{vMF}(\mu^*(x), \kappa^*(x))`. The partner of a reference with latent z is an input
    whose latent :math:`z'` has, relative to the law :math:`p(z')` of all inputs, one of the densities

    .. math::
        \frac{p(z' \mid z)}{p(z')} \propto e^{\kappa z \cdot z'} \text{ (kernel)}, \qquad
        \propto P(Y = 1 \mid z, z') = \frac{e^{\kappa z \cdot z'}}{e^{\kappa z \cdot z'} + C_d(0) / C_d(\kappa)}
        \text{ (labelled)}, \qquad \kappa = \kappa_{\mathrm{pair}}.

    The map need not be invertible. The posterior of the latent of an input, seen alone, is :math:`p(z \mid x)` by
    construction; unlike in :class:`SphereWorld`, the marginal of z is only roughly uniform.

    How it is built: :math:`\mu^*` is a normalised perceptron with three layers, trained to be smooth and spread out,
    and drawn again until 1,000 of its directions hold a pair with cosine <= 0.5. :math:`\log \kappa^*` is an affine
    map of the softplus of a two-layer perceptron, set so that 1,000 inputs span exactly the stated range.

    Deviations from the released code, which this follows otherwise (its smoothness loss included, whose distance runs
    from 0.5 to 1.5):

    * Latents are drawn from the exact von Mises-Fisher law; the released sampler is wrong where kappa is not much
      larger than d (at d = 64, kappa 20 it draws with an effective concentration of 7.6).
    * The released code labels candidates by :math:`P(Y = 1)`, so that its partners follow a sigmoid of the cosine,
      and contrasts them with candidates labelled 0, which leaves the ratio :math:`e^{\kappa z \cdot z'}` of the
      paper's model. In a batch the contrast is with everyone's partners instead. So the default here is the
      kernel itself; ``partners="labelled"`` is the law of the released positives.
    * :math:`\log C_d(0)/C_d(\kappa)` in the labels is exact; the released fit is off by -1.65 nats at d = 10, kappa 20
      (odds of a positive five times too large) and by -6.0 nats at d = 64.
    * The partner is drawn from a pool of candidates with the stated weights, instead of by rejection. A finite pool
      flattens the kernel a little where it is sharp against the number of candidates: with 16,384 of them and kappa
      20, the mean cosine of a pair is .8062 instead of .8079 at d = 10, .696 instead of .701 at d = 16, .4920 instead
      of .4956 at d = 32, and right to .002 at d = 2, 64 and 128. All pairs drawn at once share the pool: about one
      row in a hundred has its partner in common with another row of a batch of 256.

    Args:
        dim: Dimension d of the latent space, ``>= 2``.
        concentration: Range ``(low, high)`` of the concentrations, or ``math.inf`` (injective: ``z`` is the mean
            direction).
        pair_concentration: kappa of the partners, ``> 0`` and finite.
        family: Law of ``z``. ``"normal"`` and ``"laplace"`` add noise of scale ``1 / sqrt(kappa)`` and ``1 / kappa`` to
            each coordinate of the mean direction and normalise: misspecified for a von Mises-Fisher guide.
        partners: ``"kernel"`` or ``"labelled"``, see above.
        observed_dim: Dimension n of the inputs, ``>= 1``. None: ``max(dim, 10)``.
        seed: Seed of the networks, ``>= 0``. Another seed is another world.
        smoothing_steps: Training steps of the direction network.
        candidates: Size of a pool, ``>= 2``.

    Raises:
        ValueError: If an argument is out of its range.
        RuntimeError: If no network is spread out enough after 50 attempts.

    Source: Kirchhof, Kasneci and Oh, ICML 2023 (arXiv 2302.02865), and its public code.

    Example:
        >>> world = PairWorld(dim=3, smoothing_steps=20)
        >>> batch = world.sample(5, seed=0)
        >>> batch.x1.shape, batch.z1.shape, batch.concentration1.shape
        (torch.Size([5, 10]), torch.Size([5, 3]), torch.Size([5]))
    """

    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        dim: int = 10,
        concentration: float | tuple[float, float] = (16.0, 32.0),
        pair_concentration: float = 20.0,
        *,
        family: Family = "vmf",
        partners: Partners = "kernel",
        observed_dim: int | None = None,
        seed: int = 0,
        smoothing_steps: int = 5_000,
        candidates: int = 16_384,
    ) -> None:
        super().__init__()
        observed_dim = max(dim, 10) if observed_dim is None else observed_dim
        for name, value, least in (
            ("dim", dim, 2),
            ("observed_dim", observed_dim, 1),
            ("smoothing_steps", smoothing_steps, 0),
            ("candidates", candidates, 2),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be >= {least}, got {value!r}")
        if concentration != math.inf and not (
            isinstance(concentration, tuple)
            and len(concentration) == 2
            and 0 < concentration[0] < concentration[1] < math.inf
        ):
            raise ValueError(
                "`concentration` must be (low, high) with 0 < low < high < inf, or math.inf (injective), "
                f"got {concentration!r}"
            )
        if not 0 < pair_concentration < math.inf:
            raise ValueError(
                f"`pair_concentration` must be > 0 and finite, got {pair_concentration!r}; data.SphereWorld has pairs "
                "that share one latent"
            )
        for name, choice, valid in (("family", family, get_args(Family)), ("partners", partners, get_args(Partners))):
            if choice not in valid:
                raise ValueError(f"`{name}` must be one of {', '.join(valid)}, got {choice!r}")
        self.dim = dim
        self.concentration = concentration
        self.pair_concentration = pair_concentration
        self.family = family
        self.partners = partners
        self.observed_dim = observed_dim
        self.candidates = candidates
        self._log_partition = float(log_partition(dim, torch.tensor(pair_concentration, dtype=torch.float64)))
        with seeded(derived_seed(seed)):
            self.direction = self._spread_directions(smoothing_steps)
            self.log_width = _perceptron([observed_dim, dim, 1]).requires_grad_(False)
            feature = softplus(self.log_width(torch.rand(_PROBES, observed_dim)))
        low, high = concentration if isinstance(concentration, tuple) else (1.0, math.e)
        scale = (math.log(high) - math.log(low)) / (feature.max() - feature.min())
        self.register_buffer("scale", scale)
        self.register_buffer("offset", math.log(low) - scale * feature.min())

    def _spread_directions(self, steps: int) -> nn.Module:
        for _ in range(_ATTEMPTS):
            network = _perceptron([self.observed_dim, self.dim, self.dim, self.dim])
            with torch.enable_grad():
                optim = torch.optim.Adam(network.parameters(), lr=0.01)
                for _ in range(steps):
                    x = torch.rand(64, self.observed_dim)
                    mu = normalize(network(x), dim=-1)
                    distance = 1 - mu @ mu.mT / 2
                    loss = ((torch.cdist(x, x) - distance) ** 2 * (math.sqrt(2) - distance) ** 4).mean()
                    optim.zero_grad()
                    loss.backward()
                    optim.step()
            network.requires_grad_(False)
            mu = normalize(network(torch.rand(_PROBES, self.observed_dim)), dim=-1)
            if (mu @ mu.mT).min() <= 0.5:
                return network
        raise RuntimeError(
            f"no direction network of {_ATTEMPTS} spreads its directions (smallest pairwise cosine <= 0.5); raise "
            f"`smoothing_steps`, got {steps!r}, or take another `seed`"
        )

    def truth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean direction and concentration of the posterior of the latent, given the input alone.

        Args:
            x: Inputs, ``(..., observed_dim)``.

        Returns:
            Unit vectors ``(..., dim)`` and concentrations ``(...)``.
        """
        mean_direction = normalize(self.direction(x), dim=-1)
        if self.concentration == math.inf:
            return mean_direction, mean_direction.new_full(x.shape[:-1], math.inf)
        log_kappa = self.scale * softplus(self.log_width(x)).squeeze(-1) + self.offset
        return mean_direction, log_kappa.exp()

    def latent(self, mean_direction: Tensor, concentration: Tensor, num_draws: int | None = None) -> Tensor:
        """Draw latents, from PyTorch's global generators.

        Args:
            mean_direction: Unit vectors, ``(..., dim)``.
            concentration: ``(...)``.
            num_draws: Draws per row, on a new leading axis. None: one, without the axis.

        Returns:
            Unit vectors, ``(..., dim)`` or ``(num_draws, ..., dim)``.
        """
        shape = torch.Size(() if num_draws is None else (num_draws,))
        if self.concentration == math.inf:
            return mean_direction.expand(shape + mean_direction.shape)
        if self.family == "vmf":
            return VonMisesFisher(mean_direction, concentration, validate_args=False).sample(shape)
        kappa = concentration.unsqueeze(-1)
        law: torch.distributions.Distribution
        if self.family == "normal":
            law = torch.distributions.Normal(mean_direction, kappa.rsqrt(), validate_args=False)
        else:
            law = torch.distributions.Laplace(mean_direction, 1 / kappa, validate_args=False)
        return normalize(law.sample(shape), dim=-1)

    def log_weight(self, cosine: Tensor) -> Tensor:
        """Log density, up to a constant, of partners relative to all inputs, at the cosine of the two latents.

        Args:
            cosine: Cosines of the two latents, any shape.

        Returns:
            Shape of ``cosine``, in nats: the kernel ``kappa cos``, or for labelled partners ``log P(Y = 1)``.
        """
        reach = self.pair_concentration * cosine
        return reach if self.partners == "kernel" else logsigmoid(reach - self._log_partition)

    def _draw(self, num_references: int, partners_each: int = 1) -> SphereBatch:
        """Pairs, ``num_references * partners_each``; rows of one reference are `num_references` apart."""
        x1, mean1, kappa1, z1 = self._inputs(num_references)
        pool = self._inputs(self.candidates)
        chosen = []
        for references in z1.split(_TILE):
            reach = self.log_weight(references @ pool[-1].mT)
            mass = (reach - reach.amax(-1, keepdim=True)).exp_().cumsum(-1)
            level = mass[:, -1:] * torch.rand(len(mass), partners_each, dtype=mass.dtype, device=mass.device)
            chosen.append(torch.searchsorted(mass, level))
        rows = torch.cat(chosen).clamp_max_(self.candidates - 1).T.flatten()
        x2, mean2, kappa2, z2 = (value[rows] for value in pool)
        x1, mean1, kappa1, z1 = (torch.cat([value] * partners_each) for value in (x1, mean1, kappa1, z1))
        return SphereBatch(x1, x2, z1, z2, mean1, mean2, kappa1, kappa2)

    def _inputs(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fresh inputs, what they show, and a latent of each."""
        x = torch.rand(size, self.observed_dim, dtype=self.scale.dtype, device=self.scale.device)
        mean_direction, concentration = self.truth(x)
        return x, mean_direction, concentration, self.latent(mean_direction, concentration)

    def sample(self, num_pairs: int, seed: int | None = None) -> SphereBatch:
        """Draw positive pairs.

        Args:
            num_pairs: Number of pairs ``N``, ``>= 1``.
            seed: Give the same seed for the same pairs; the global random state is then left alone. None: draw from it.

        Returns:
            The pairs on the world's device. The first views are uniform on the unit cube; the second ones are not,
            since inputs with many similar ones are more often a partner.

        Raises:
            ValueError: If ``num_pairs`` or ``seed`` is out of its range.
        """
        if num_pairs < 1:
            raise ValueError(f"`num_pairs` must be >= 1, got {num_pairs!r}")
        with torch.no_grad():
            if seed is None:
                return self._draw(num_pairs)
            with seeded(derived_seed(seed), self.scale.device):
                return self._draw(num_pairs)

    def batches(self, batch_size: int = 256, seed: int = 0) -> PairBatches:
        """As :meth:`World.batches`, drawn in chunks of many batches; see :class:`PairBatches`."""
        return PairBatches(self, batch_size, seed)


class PairBatches(WorldBatches):
    """Endless iterator over pairs of a :class:`PairWorld`, drawn in chunks of many batches.

    Within a chunk a reference comes four times, in different batches and with different partners.

    Args:
        world: Where the pairs come from.
        batch_size: Pairs per batch, ``>= 1``.
        seed: Base seed, ``>= 0``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, world: PairWorld, batch_size: int, seed: int) -> None:
        super().__init__(world, batch_size, seed)
        self._world = world
        self.batches_per_chunk = _PARTNERS_EACH * max(1, _REFERENCES // batch_size)
        self._chunk: tuple[int, Tensor, Tensor] | None = None

    def __next__(self) -> tuple[Tensor, Tensor]:
        number, position = divmod(self._next, self.batches_per_chunk)
        if self._chunk is None or self._chunk[0] != number:
            references = self.batches_per_chunk * self.batch_size // _PARTNERS_EACH
            with torch.no_grad(), seeded(derived_seed(self.seed, number), self._world.scale.device):
                pairs = self._world._draw(references, _PARTNERS_EACH)
            self._chunk = number, pairs.x1, pairs.x2
        self._next += 1
        rows = slice(position * self.batch_size, (position + 1) * self.batch_size)
        return self._chunk[1][rows], self._chunk[2][rows]


def _perceptron(sizes: list[int]) -> nn.Sequential:
    """Linear layers with LeakyReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])
