r"""Priors P(z_1, ..., z_J) of recognition-parametrised models: where knowledge about the views goes.

A prior is a Pyro function without arguments that samples the latents of one item: sites "z1", ..., "zJ", one per view,
or one site "z" that all views share. The model calls it inside the plate of the items, so its laws need no batch shape.
Any function will do:

    def prior():
        z1 = pyro.sample("z1", HypersphericalUniform(10))
        pyro.sample("z2", VonMisesFisher(z1, torch.tensor(20.0)))

The modules here are such functions with parameters. :class:`InfoNCE` alone is another kind: its density contains the
aggregate R(z), which cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as pyro_dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn

from .distributions import HypersphericalUniform, VonMisesFisher
from .factors import infonce_factor
from .kernels import PairKernel, VonMisesFisherKernel
from .modules import Module
from .ops.constraints import scale_parameter
from .ops.products import products
from .ops.tiles import Pairs

__all__ = [
    "Clusters",
    "FlexibleCritic",
    "Independent",
    "InfoNCE",
    "LinearDynamics",
    "SharedUniform",
    "VonMisesFisherChain",
    "optimal",
]


def _check_size(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` of a prior must be an integer >= {least}, got {value!r}")
    return value


class _OnSphere(Module):
    """A prior on the sphere, whose draws have the precision and the device of the module."""

    _like: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = _check_size("dim", dim, 2)
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def _uniform(self) -> HypersphericalUniform:
        return HypersphericalUniform(self.dim, dtype=self._like.dtype, device=self._like.device)


class Independent(_OnSphere):
    """Unrelated uniform latents: the views say nothing about each other, and a fit loses its inputs. A null model.

    Args:
        dim: d >= 2.
        num_views: J >= 2.

    Raises:
        ValueError: for sizes out of their range.

    Example:
        >>> with pyro.plate("pairs", 4):
        ...     [z.shape for z in Independent(3)()]
        [torch.Size([4, 3]), torch.Size([4, 3])]
    """

    def __init__(self, dim: int, num_views: int = 2) -> None:
        super().__init__(dim)
        self.num_views = _check_size("num_views", num_views, 2)

    def forward(self) -> list[Tensor]:
        """Sites "z1", ..., "zJ"."""
        return [pyro.sample(f"z{j}", self._uniform()) for j in range(1, self.num_views + 1)]


class SharedUniform(_OnSphere):
    """One uniform latent, site "z", that all views share; the guide has to sample it too (``guides.Fused``).

    Args:
        dim: d >= 2.

    Raises:
        ValueError: for ``dim`` < 2.
    """

    def forward(self) -> Tensor:
        """Site "z"."""
        return pyro.sample("z", self._uniform())


class VonMisesFisherChain(_OnSphere):
    r"""A walk on the sphere: :math:`z_1 \sim U(S^{d-1}), z_{j+1} \sim vMF(z_j, \kappa)`. For two views, the pair prior.

    Args:
        dim: d >= 2.
        num_views: J >= 2.
        concentration: kappa at the start, > 0 and finite.
        learn: make it a parameter, optimised as log(kappa) / 4 so that it keeps pace with the network.

    Raises:
        ValueError: for sizes out of their range, or a concentration that is not positive and finite.

    Example:
        >>> prior = VonMisesFisherChain(3, num_views=4, concentration=50.0)
        >>> len(prior()), [name for name, _ in prior.named_parameters()]
        (4, ['concentration_unconstrained'])
    """

    concentration: Tensor

    def __init__(self, dim: int, num_views: int = 2, *, concentration: float = 10.0, learn: bool = True) -> None:
        super().__init__(dim)
        self.num_views = _check_size("num_views", num_views, 2)
        value = VonMisesFisherKernel(concentration).concentration  # checks it
        if learn:
            setattr(self, "concentration", PyroParam(value, constraint=scale_parameter))  # noqa: B010 (typing)
        else:
            self.register_buffer("concentration", value)

    def forward(self) -> list[Tensor]:
        """Sites "z1", ..., "zJ"."""
        latents, kappa = [pyro.sample("z1", self._uniform())], self.concentration
        for j in range(2, self.num_views + 1):
            latents.append(pyro.sample(f"z{j}", VonMisesFisher(latents[-1], kappa)))
        return latents


class Clusters(_OnSphere):
    r"""Views of one thing are of one cluster: :math:`P(z_1, ..., z_J) = \sum_k \pi_k \prod_j vMF(z_j; m_k, \kappa_k)`.

    The cluster is summed out exactly, view by view: each latent is a mixture whose weights are the posterior of the
    cluster given the latents before it. So there is no discrete site, and ordinary ELBOs apply.

    Args:
        dim: d >= 2.
        num_clusters: K >= 1.
        num_views: J >= 2.
        concentration: kappa of every cluster at the start, > 0 and finite.

    Raises:
        ValueError: for sizes out of their range, or a concentration that is not positive and finite.

    Example:
        >>> prior = Clusters(3, num_clusters=5)
        >>> sorted(name for name, _ in prior.named_parameters())
        ['centres', 'concentration_unconstrained', 'logits']
    """

    concentration: Tensor

    def __init__(self, dim: int, num_clusters: int, num_views: int = 2, *, concentration: float = 10.0) -> None:
        super().__init__(dim)
        _check_size("num_clusters", num_clusters, 1)
        self.num_views = _check_size("num_views", num_views, 2)
        value = VonMisesFisherKernel(concentration).concentration.expand(num_clusters).clone()  # checks it
        setattr(self, "concentration", PyroParam(value, constraint=scale_parameter))  # noqa: B010 (typing)
        self.centres = nn.Parameter(nn.functional.normalize(torch.randn(num_clusters, dim), dim=-1))
        self.logits = nn.Parameter(torch.zeros(num_clusters))

    def components(self) -> VonMisesFisher:
        """The laws of the clusters, batch shape ``(K,)``; ``centres`` is normalised here."""
        return VonMisesFisher(nn.functional.normalize(self.centres, dim=-1), self.concentration)

    def responsibilities(self, *latents: Tensor) -> Tensor:
        """Log posterior of the cluster given latents of one item.

        Args:
            latents: ``(..., d)`` each; none gives the log weights of the clusters.

        Returns:
            ``(..., K)``, in nats.
        """
        clusters = self.components()
        score = self.logits + sum(clusters.log_prob(z.unsqueeze(-2)) for z in latents)
        return score.log_softmax(-1)

    def forward(self) -> list[Tensor]:
        """Sites "z1", ..., "zJ"."""
        latents: list[Tensor] = []
        for j in range(1, self.num_views + 1):
            weights = self.responsibilities(*latents)
            law = pyro_dist.MixtureSameFamily(
                pyro_dist.Categorical(logits=weights), self.components().expand(weights.shape), validate_args=False
            )
            latents.append(pyro.sample(f"z{j}", law))
        return latents


class LinearDynamics(Module):
    r"""A sequence in Euclidean space: :math:`z_1 \sim N(0, I), \; z_{t+1} \sim N(A z_t, \mathrm{diag}(\sigma^2))`.

    The latents of J consecutive views, for ``guides.Normal``. With a fixed A this states how the world moves: the
    state (position, velocity) of a body that nothing pushes has A = [[I, I], [0, I]]. The standard normal start fixes
    the scale, which recognition alone cannot.

    Args:
        dim: d >= 1, size of the state.
        num_views: J >= 2, length of the sequence.
        transition: ``(d, d)``; by default the identity.
        noise: sigma at the start, > 0 and finite; one number or d of them.
        learn_transition: make A a parameter (``transition``).
        learn_noise: make sigma a parameter (``noise``), as a scale parameter.

    Raises:
        ValueError: for sizes out of their range, a transition of another shape, or a noise that is not positive and
            finite.

    Example:
        >>> prior = LinearDynamics(2, num_views=5, transition=[[1.0, 1.0], [0.0, 1.0]], learn_transition=False)
        >>> with pyro.plate("pairs", 7):
        ...     len(prior()), prior()[4].shape
        (5, torch.Size([7, 2]))
    """

    transition: Tensor
    noise: Tensor

    def __init__(
        self,
        dim: int,
        num_views: int,
        *,
        transition: Sequence[Sequence[float]] | Tensor | None = None,
        noise: float | Sequence[float] | Tensor = 0.1,
        learn_transition: bool = True,
        learn_noise: bool = True,
    ) -> None:
        super().__init__()
        self.dim = _check_size("dim", dim, 1)
        self.num_views = _check_size("num_views", num_views, 2)
        matrix = torch.eye(dim) if transition is None else torch.as_tensor(transition).detach()
        matrix = matrix.to(torch.get_default_dtype())
        if matrix.shape != (dim, dim):
            raise ValueError(f"`transition` must be a ({dim}, {dim}) matrix for dim={dim}, got {tuple(matrix.shape)}")
        sigma = torch.as_tensor(noise, dtype=torch.get_default_dtype()).detach()
        if sigma.shape not in ((), (1,), (dim,)) or not (sigma.gt(0) & sigma.isfinite()).all():
            raise ValueError(f"`noise` must be one positive finite number or {dim} of them, got {noise!r}")
        sigma = sigma.expand(dim).clone()
        if learn_transition:
            self.transition = nn.Parameter(matrix.clone())
        else:
            self.register_buffer("transition", matrix.clone())
        if learn_noise:
            setattr(self, "noise", PyroParam(sigma, constraint=scale_parameter))  # noqa: B010 (typing)
        else:
            self.register_buffer("noise", sigma)

    def forward(self) -> list[Tensor]:
        """Sites "z1", ..., "zJ"."""
        transition, noise = self.transition, self.noise
        start = pyro_dist.Normal(torch.zeros_like(noise), torch.ones_like(noise)).to_event(1)
        latents = [pyro.sample("z1", start)]
        for j in range(2, self.num_views + 1):
            mean = latents[-1] @ transition.mT
            latents.append(pyro.sample(f"z{j}", pyro_dist.Normal(mean, noise).to_event(1)))
        return latents


class InfoNCE(Module):
    r"""The prior behind InfoNCE: :math:`P(z_1) = R(z_1), \; P(z_2|z_1) = R(z_2) f(z_1, z_2) / Z(z_1)`.

    All R cancel against the recognition factors; what is left is :func:`~pyro_contrastive.factors.infonce_factor` with
    the normaliser Z(z) = E_R f averaged over the batch. Two views.

    Args:
        kernel: ``kernel(z1, z2) -> (..., N, N)`` log f, for instance from :mod:`pyro_contrastive.kernels`.
        symmetric: average the factors of z2 given z1 and of z1 given z2.

    Raises:
        TypeError: if the kernel cannot be called.

    References:
        Aitchison and Ganev, arXiv 2107.02495.
    """

    def __init__(self, kernel: Callable[[Tensor, Tensor], Any], *, symmetric: bool = False) -> None:
        super().__init__()
        if not callable(kernel) or isinstance(kernel, type):
            raise TypeError(
                f"`kernel` must be called as kernel(z1, z2), got {kernel!r}; for instance VonMisesFisherKernel(10.0)"
            )
        self.kernel = kernel
        self.symmetric = symmetric

    def forward(self, posterior1: Any, posterior2: Any) -> None:
        """Sites "z1", "z2" with the laws R, and the factor "positive"; inside the plate of the items.

        Args:
            posterior1: recognition law of the first views, batch ``(N,)``.
            posterior2: of the second views.
        """
        z1, z2 = pyro.sample("z1", posterior1), pyro.sample("z2", posterior2)
        infonce_factor("positive", z1, z2, self.kernel, symmetric=self.symmetric)


class FlexibleCritic(PairKernel):
    r"""A kernel that can take any shape as its width grows: :math:`\log f(z, z') = g(z) \cdot h(z') / \sqrt m`.

    Args:
        dim: d >= 1 of the latents.
        features: m >= 1, width of the two networks' output.
        hidden: width of their two hidden layers.

    Raises:
        ValueError: for sizes out of their range.

    Shape:
        ``(..., N, d), (..., M, d) -> (..., N, M)``.

    Example:
        >>> FlexibleCritic(3)(torch.randn(4, 3), torch.randn(5, 3)).shape
        torch.Size([4, 5])
    """

    def __init__(self, dim: int, *, features: int = 64, hidden: int = 128) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("features", features), ("hidden", hidden)):
            _check_size(name, value, 1)

        def network() -> nn.Sequential:
            layers = [nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(hidden, features))

        self.first, self.second = network(), network()
        self.features = features

    def pairs(self, z1: Tensor, z2: Tensor) -> Pairs:
        """See :meth:`~pyro_contrastive.kernels.PairKernel.pairs`."""
        return Pairs(products, (self.first(z1) / math.sqrt(self.features),), (self.second(z2),))


def optimal(dim: int, *, features: int = 64, hidden: int = 128) -> InfoNCE:
    r"""The optimal prior P(z_1, z_2) = R(z_1, z_2), with which the ELBO is the mutual information of the latents.

    :math:`R(z, z')` has no density that a batch could estimate: a plug-in mixture of the batch's own pairs would call
    every pair informative. So it is learned: the InfoNCE prior with a flexible f, which at its optimum is
    R(z, z') / (R(z) R(z')) up to a function of z. The value reached is a lower bound of the mutual information, at most
    log N. Mutual information says nothing about the geometry of the latents: use it to measure, not to learn one.

    Args:
        dim: d of the latents.
        features: width of the critic, see :class:`FlexibleCritic`.
        hidden: of its hidden layers.

    Returns:
        The prior.

    Example:
        >>> sum(p.numel() for p in optimal(3).parameters()) > 10_000
        True
    """
    return InfoNCE(FlexibleCritic(dim, features=features, hidden=hidden))
