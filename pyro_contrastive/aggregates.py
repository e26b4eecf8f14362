r"""What R(z) averages over: the aggregate :math:`R(z) = \frac1M \sum_m R(z|x_m)` of a recognition-parametrised model.

By default that is the batch (:func:`~pyro_contrastive.factors.recognition_factor`). Two modules make it larger: a
memory of past batches, and the whole data. Each is called as ``aggregate(view, posterior, guide)`` and returns one law
whose batch holds everything to average over.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Independent, MultivariateNormal
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import Module
from .ops.joint import current_joint, gather

__all__ = ["FullData", "MemoryBank", "aggregate_log_density", "law_like", "law_parameters"]


def aggregate_log_density(z: Tensor, laws: Any) -> Tensor:
    r"""Log density of the average of laws, :math:`\log \frac1M \sum_m R(z|x_m)`.

    Args:
        z: ``(..., d)`` points; with an axis of items, ``(..., N, d)``, they are scored by one matrix product.
        laws: distribution with batch shape ``(M,)``, for instance ``guide.posterior(x)``.

    Returns:
        ``(...)``, in nats.

    Example:
        >>> from pyro_contrastive.distributions import VonMisesFisher
        >>> laws = VonMisesFisher(torch.eye(3), torch.zeros(3))  # all uniform: - log(4 pi)
        >>> aggregate_log_density(torch.eye(3), laws)
        tensor([-2.5310, -2.5310, -2.5310])
    """
    cross = getattr(laws, "cross_log_prob", None)
    grid = cross(z) if cross is not None and z.dim() > 1 else laws.log_prob(z.unsqueeze(-2))
    return grid.logsumexp(-1) - math.log(grid.shape[-1])


def law_parameters(law: Any) -> dict[str, Tensor]:
    """The tensors that determine a recognition law, by name.

    Args:
        law: distribution with batch shape ``(N,)``; ``Independent`` around one counts as the one.

    Returns:
        Tensors with leading dimension N.
    """
    law = law.base_dist if isinstance(law, Independent) else law
    names = ("loc", "scale_tril") if isinstance(law, MultivariateNormal) else tuple(law.arg_constraints)
    return {name: getattr(law, name) for name in names}


def law_like(law: Any, parameters: dict[str, Tensor]) -> Any:
    """A law of the same family with other parameters.

    Args:
        law: the pattern.
        parameters: as from :func:`law_parameters`, of any batch shape.

    Returns:
        The law.

    Example:
        >>> from pyro.distributions import Normal
        >>> law = Normal(torch.zeros(3, 2), torch.ones(3, 2)).to_event(1)
        >>> law_like(law, {name: value[:1] for name, value in law_parameters(law).items()}).batch_shape
        torch.Size([1])
    """
    if isinstance(law, Independent):
        return Independent(law_like(law.base_dist, parameters), law.reinterpreted_batch_ndims)
    return type(law)(**parameters, validate_args=False)


def law_of_all(law: Any) -> Any:
    """The law with the items of all processes of a joint batch, with gradient.

    Args:
        law: distribution with batch shape ``(N / R,)``, the items of this process.

    Returns:
        A law of the same family with batch shape ``(N,)``, by rank; outside a joint batch `law` itself.
    """
    if current_joint() is None:
        return law
    return law_like(law, {name: gather(value, what="a recognition law") for name, value in law_parameters(law).items()})


class MemoryBank(Module):
    """Ring buffer of past posteriors: R(z) averages over this batch and the last `size` items before it.

    The parameters of past posteriors are kept detached, so gradients flow through the batch's own posteriors only, and
    they are as old as the batch they came from. Each view has its own bank. Items enter in training mode only, when
    gradients are on; a batch that comes again unchanged (sequential particles) enters once. The bank is part of the
    ``state_dict``. In a joint batch the items of all processes enter, so every process keeps the same bank.

    What it buys and what it costs: the batch estimate of a factor is too small, by chi^2 / 2N to leading order
    (``diagnostics.aggregate_bias``); with a bank of fresh posteriors N + `size` takes the place of N. Stale ones add a
    bias of their own, which is positive: posteriors that moved away from the bank look more informative than they are.
    It is largest early in training (a third of a nat in the measured case, ``docs/rpm.md``) and goes with the learning
    rate. The factor is no lower bound then.

    Args:
        size: items kept per view, >= 1.

    Raises:
        ValueError: if the size is no integer >= 1.

    Example:
        >>> from pyro_contrastive.distributions import VonMisesFisher
        >>> bank, law = MemoryBank(4), VonMisesFisher(torch.eye(3), torch.ones(3))
        >>> bank(1, law, None).batch_shape  # nothing past yet
        torch.Size([3])
        >>> bank(1, VonMisesFisher(torch.eye(3), 2 * torch.ones(3)), None).batch_shape
        torch.Size([6])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`size` of a memory bank must be an integer >= 1, got {size!r}")
        self.size = size

    def forward(self, view: int, posterior: Any, guide: Any) -> Any:
        """Return the law to average over.

        Args:
            view: number of the view, from 1.
            posterior: its recognition law, batch shape ``(N,)``.
            guide: not used.

        Returns:
            A law of the same family with batch shape ``(N + items kept,)``, this batch (of all processes) first.
        """
        posterior = law_of_all(posterior)
        live = law_parameters(posterior)
        kept = {name: self._buffers.get(f"{name}_{view}") for name in live}
        past: dict[str, Tensor] = {name: old for name, old in kept.items() if old is not None}
        now = {name: value.detach() for name, value in live.items()}
        count = len(next(iter(live.values())))
        if past and all(torch.equal(old[:count], now[name]) for name, old in past.items()):  # seen in this very step
            past = {name: old[count:] for name, old in past.items()}
        if self.training and torch.is_grad_enabled():
            for name, value in now.items():
                rows = torch.cat([value, past[name]]) if past else value.clone()
                self.register_buffer(f"{name}_{view}", rows[: self.size])
        return law_like(posterior, {k: torch.cat([v, past[k]]) if past else v for k, v in live.items()})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in list(self._buffers):
            del self._buffers[name]
        for key in [key for key in state_dict if key.startswith(prefix)]:  # buffers of whatever length it had
            self.register_buffer(key.removeprefix(prefix), torch.empty_like(state_dict[key]))
        super()._load_from_state_dict(state_dict, prefix, *args)


class FullData(Module):
    """R(z) over the whole data, its posteriors computed anew at every step, with gradients: exact, for small data.

    The cost is one encoder pass over all items of all views and a grid of batch times data per step. The posterior of
    an item must not depend on the batch it is in, so batch norm is refused in training mode.

    Args:
        *views: ``(M, ...)`` each, all items of the training data, the views in the order in which the model gets them.

    Raises:
        ValueError: without views; when called, for a view that was not given or a guide with batch norm in training
            mode.

    Example:
        >>> from pyro_contrastive import guides
        >>> guide = guides.VonMisesFisher(torch.nn.Linear(8, 16), dim=3, batch_norm=False)
        >>> aggregate = FullData(torch.randn(50, 8), torch.randn(50, 8))
        >>> aggregate(2, guide.posterior(torch.randn(10, 8)), guide).batch_shape
        torch.Size([50])
    """

    def __init__(self, *views: Tensor) -> None:
        super().__init__()
        if not views:
            raise ValueError("the full-data aggregate needs the views of all items, got none; FullData(x1, x2, ...)")
        self.num_views = len(views)
        for j, x in enumerate(views, start=1):
            self.register_buffer(f"x{j}", x, persistent=False)

    def forward(self, view: int, posterior: Any, guide: Any) -> Any:
        """Return the law to average over.

        Args:
            view: number of the view, from 1.
            posterior: not used.
            guide: recognition module.

        Returns:
            Its posteriors of all items, batch shape ``(M,)``.
        """
        if view > self.num_views:
            raise ValueError(f"the full-data aggregate holds {self.num_views} views, and the model has a view {view}")
        if any(isinstance(part, _BatchNorm) and part.training for part in guide.modules()):
            raise ValueError(
                "the full-data aggregate needs posteriors that do not depend on the batch, got a guide with batch norm "
                "in training mode; build it with batch_norm=False (and an encoder without)"
            )
        return guide.posterior(self._buffers[f"x{view}"])
