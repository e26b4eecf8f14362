"""Several processes, one batch: what ``torch.distributed`` needs beside it to fit a pair as one process would.

:func:`joint_batch` makes the likelihoods compare each item with those of all processes. The rest is what a loop of your
own calls around it; :func:`pyro_contrastive.fit.fit` does all of it by itself once processes are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, Subset

from pyro_contrastive.ops.joint import Joint, current_joint, gather, joint_batch

__all__ = [
    "BatchShare",
    "any_process",
    "broadcast",
    "gather",
    "joint_batch",
    "process_group",
    "process_rank",
    "shard",
    "sum_gradients",
    "synchronise_batch_norm",
]

BUCKET = 2**23
"""Numbers in one message of :func:`sum_gradients` (32 MiB in float32)."""

T = TypeVar("T")


def process_rank(group: Any = None) -> tuple[int, int]:
    """Number of this process and how many there are; (0, 1) without ``torch.distributed``.

    Args:
        group: Process group. Default: all processes.

    Example:
        >>> process_rank()
        (0, 1)
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


@contextmanager
def process_group() -> Iterator[None]:
    """Under ``torchrun`` join its processes, and leave them at the end; without it do nothing.

    On CUDA each process gets the GPU of its local rank and they talk by NCCL, else by gloo.
    """
    dist = torch.distributed
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(items: Any, group: Any = None) -> Any:
    """This process's share of indices or data: every R-th item, equally many for each of R processes.

    Args:
        items: A number of items; or a data set, list, tensor or array of a known length. Up to R - 1 items at its end
            go to nobody.
        group: Process group. Default: all processes.

    Returns:
        A ``range`` for a number, a ``Subset`` for a data set, else ``items[rank:end:R]``.

    Raises:
        ValueError: If there are fewer items than processes.

    Example:
        >>> list(shard(5))  # one process
        [0, 1, 2, 3, 4]
    """
    rank, ranks = process_rank(group)
    total = items if isinstance(items, int) else len(items)
    if total < ranks:
        raise ValueError(f"`items` must be at least one for each of {ranks} processes, got {total}")
    mine = range(rank, total - total % ranks, ranks)
    if isinstance(items, int):
        return mine
    return Subset(items, mine) if isinstance(items, Dataset) else items[rank : total - total % ranks : ranks]


class BatchShare:
    """This process's rows of every batch of a loader: R processes together see the loader's own batches.

    Each process makes the whole batch and keeps N / R rows of it, so that a fit on R processes equals the fit on one.
    Where making batches is what takes the time, give each process its own data instead (:func:`shard`, or
    ``torch.utils.data.DistributedSampler``).

    Args:
        loader: Iterable of batches: tensors of N rows, or tuples of them.
        group: Process group. Default: all processes.

    Raises:
        ValueError: When iterated, for a batch that R does not divide.

    Example:
        >>> [x.tolist() for x in BatchShare([torch.arange(4)])]
        [[0, 1, 2, 3]]
    """

    def __init__(self, loader: Iterable[Any], group: Any = None) -> None:
        self.loader = loader
        self.rank, self.ranks = process_rank(group)
        if hasattr(loader, "seek"):
            self.seek = loader.seek  # fit asks for its position before each pass

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length; give `steps` instead of `epochs`")
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield tuple(map(self._rows, batch)) if isinstance(batch, (tuple, list)) else self._rows(batch)

    def _rows(self, entry: Any) -> Any:
        size = len(entry)
        if size % self.ranks:
            raise ValueError(
                f"a batch of {size} items cannot be shared equally by {self.ranks} processes; use a batch size that "
                f"{self.ranks} divides, and drop the last, smaller batch (drop_last=True)"
            )
        share = size // self.ranks
        return entry[self.rank * share : (self.rank + 1) * share]


def broadcast(state: nn.Module | Iterable[Tensor], group: Any = None) -> None:
    """Give every process the values of the first one, in place.

    Args:
        state: A module (its parameters and buffers), or tensors.
        group: Process group. Default: all processes.
    """
    rank, ranks = process_rank(group)
    if ranks == 1:
        return
    tensors = [v.detach() for v in (state.state_dict().values() if isinstance(state, nn.Module) else state)]
    joint = Joint(_world(group))
    joint.agree("a broadcast of parameters", len(tensors), [(t.shape, t.dtype) for t in tensors])
    first = torch.distributed.get_global_rank(joint.group, 0)
    for tensor in tensors:
        whole = tensor.contiguous()
        torch.distributed.broadcast(whole, first, group=joint.group)
        if whole is not tensor:
            tensor.copy_(whole)


def sum_gradients(parameters: Iterable[Tensor], group: Any = None) -> None:
    """Replace every gradient by its sum over the processes, a few large messages at a time.

    With :func:`joint_batch` the sum is the gradient of the joint ELBO; divide the loss by the number of items of *all*
    processes to have it per item.

    Args:
        parameters: The same on every process, in one order. Those without a gradient are passed over.
        group: Process group. Default: all processes.

    Raises:
        ValueError: If a parameter has a gradient on some processes only.
    """
    if process_rank(group)[1] == 1:
        return
    every = list(parameters)
    held = [k for k, p in enumerate(every) if p.grad is not None]
    joint = Joint(_world(group))
    joint.agree("a sum of gradients", len(every), held)
    under_way = []
    for bucket in _buckets([g for k in held if (g := every[k].grad) is not None]):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        under_way.append((bucket, flat, torch.distributed.all_reduce(flat, group=joint.group, async_op=True)))
    for bucket, flat, request in under_way:
        request.wait()
        for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def any_process(flag: bool, group: Any = None) -> bool:
    """Whether the flag is set on any process; the same answer on all of them, through the CPU.

    Args:
        flag: Of this process.
        group: Process group. Default: all processes.
    """
    if process_rank(group)[1] == 1:
        return flag
    joint = Joint(_world(group))
    return joint.any(flag)


def synchronise_batch_norm(module: T) -> T:
    """Let batch norms take mean and variance over the batches of all processes, on any device.

    ``nn.SyncBatchNorm`` runs on CUDA only. In training mode these average over all processes, with gradient, inside
    :func:`joint_batch` or not (an activation checkpoint runs them again in the backward pass); in eval mode, and with
    one process, they are what they were. Parameters, buffers and hooks stay the same objects.

    Args:
        module: Changed in place, all parts of it.

    Returns:
        The module.

    Raises:
        TypeError: For a batch norm of another class than ``nn.BatchNorm1d``, ``2d`` and ``3d``, whose forward pass is
            not known; one that has not seen an input yet (lazy) among them.

    Example:
        >>> guide = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> synchronise_batch_norm(guide)[1].num_features
        3
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module, got {type(module).__name__}")
    for name, part in module.named_modules():
        if type(part) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            part.__class__ = JointBatchNorm
        elif isinstance(part, _BatchNorm) and not isinstance(part, (JointBatchNorm, nn.SyncBatchNorm)):
            raise TypeError(
                f"{name or 'module'} is a {type(part).__name__}, and only BatchNorm1d, 2d and 3d are known; "
                "call a lazy one once, or synchronise it yourself (distributed.gather has a gradient)"
            )
    return module


class JointBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes; made by :func:`synchronise_batch_norm`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Standardise.

        Args:
            input: ``(N, C, ...)``.
        """
        statistics_of_batch = self.training or self.running_mean is None
        if process_rank()[1] == 1 or not statistics_of_batch:
            return super().forward(input)
        joint = current_joint() or Joint(_world(None))
        axes, along = [0, *range(2, input.dim())], (1, -1, *[1] * (input.dim() - 2))
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = joint.gather(x.mean(axes).unsqueeze(0), what=None).mean(0)
        centred = x - mean.view(along)
        variance = joint.gather(centred.square().mean(axes).unsqueeze(0), what=None).mean(0)
        self._track(mean.detach(), variance.detach(), joint.ranks * (x.numel() // x.shape[1]))
        x = centred * torch.rsqrt(variance + self.eps).view(along)
        if self.affine:
            x = x * self.weight.view(along) + self.bias.view(along)
        return x.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        weight = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * (count / max(count - 1, 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.mul_(1 - weight).add_(weight * new)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError(f"batch norm needs an input (N, C, ...), got {tuple(input.shape)}")


def _world(group: Any) -> Any:
    return torch.distributed.group.WORLD if group is None else group


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, up to `BUCKET` numbers together."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        fits = bucket and (gradient.dtype, gradient.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (fits and sum(g.numel() for g in bucket) + gradient.numel() <= BUCKET):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
