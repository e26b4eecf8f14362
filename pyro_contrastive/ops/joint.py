"""One batch over several processes: who holds it, what they must agree on, and how tensors get from one to another.

A contrastive likelihood compares every item with all others. Inside ``joint_batch`` "all others" are those of all
processes, each of which holds an equal share of the items. Nothing here is imported from ``torch.distributed`` before
processes are there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

__all__ = ["Joint", "current_joint", "gather", "joint_batch", "joint_offset", "joint_size", "one_process_only"]

T = TypeVar("T")


class Joint:
    """The processes that hold a batch together; each calls the same methods in the same order.

    Args:
        group: A process group of ``torch.distributed``.

    Attributes:
        group: The same.
        rank: Number of this process in it.
        ranks: How many there are.
    """

    def __init__(self, group: Any) -> None:
        dist = torch.distributed
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.ranks: int = dist.get_world_size(group)
        self._talk = _cpu_group(group)

    def agree(self, what: str, items: int, *rest: Any) -> None:
        """Raise on every process if one of them comes with other items than the rest; through the CPU, device idle.

        Args:
            what: What is computed, for the message.
            items: Number of items that this process holds.
            *rest: Whatever else must be the same everywhere; compared by its ``repr``.

        Raises:
            ValueError: If anything differs.
        """
        mine = torch.tensor([items, zlib.crc32(repr((what, rest)).encode())])
        seen = [torch.empty_like(mine) for _ in range(self.ranks)]
        torch.distributed.all_gather(seen, mine, group=self._talk)
        counts = [int(t[0]) for t in seen]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{what} in a joint batch needs equally many items on every process, got {counts} by rank; give each "
                "an equal share (distributed.shard) and drop the last, smaller batch (drop_last=True)"
            )
        if len({int(t[1]) for t in seen}) > 1:
            raise ValueError(
                f"{what} in a joint batch needs one model with one set of options and shapes on every process, and "
                f"they differ; rank {self.rank} has {rest}"
            )

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process, through the CPU.

        Args:
            flag: Of this process.
        """
        found = torch.tensor([int(flag)])
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self._talk)
        return bool(found)

    def gather(self, tensor: Tensor, dim: int = 0, *, what: str | None = "gather") -> Tensor:
        """See :func:`gather`; `what` None: shapes are known to agree."""
        if what is not None:
            shape = list(tensor.shape)
            items = shape.pop(dim)
            self.agree(what, items, shape, tensor.dtype, tensor.requires_grad and torch.is_grad_enabled())
        return torch.cat(_Gather.apply(self, tensor).unbind(0), dim)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on every process; an error it meets is raised on all of them.

        Args:
            make: Called on the first process only; what it returns is pickled.
        """
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:  # raised below, on this process too
                box[1] = error
        source = torch.distributed.get_global_rank(self._talk, 0)
        torch.distributed.broadcast_object_list(box, source, group=self._talk, device=torch.device("cpu"))
        if box[1] is not None:
            raise box[1]
        return box[0]

    def pass_on(self, tensors: Sequence[Tensor], tag: int = 0) -> Passing:
        """Start to send tensors to the next process of the ring, and to receive their like from the one before.

        Args:
            tensors: Contiguous; not to be changed before the end.
            tag: Tells apart what is under way at one time, by backends that know tags.

        Returns:
            ``.wait()`` gives what was received.
        """
        return Passing(self, tensors, tag)


class Passing:
    """A message around the ring that is under way; holds what is sent until it has arrived."""

    def __init__(self, joint: Joint, tensors: Sequence[Tensor], tag: int) -> None:
        dist = torch.distributed
        following, preceding = (
            dist.get_global_rank(joint.group, (joint.rank + step) % joint.ranks) for step in (1, -1)
        )
        self._sent = list(tensors)
        self._received = [torch.empty_like(t) for t in tensors]
        moves = []
        for k, (out, into) in enumerate(zip(self._sent, self._received, strict=True)):
            moves.append(dist.P2POp(dist.isend, out, following, joint.group, 100 * tag + k))
            moves.append(dist.P2POp(dist.irecv, into, preceding, joint.group, 100 * tag + k))
        self._requests = dist.batch_isend_irecv(moves) if moves else []

    def wait(self) -> list[Tensor]:
        """Wait for the end (on CUDA the stream waits, not the host), and give what was received."""
        for request in self._requests:
            request.wait()
        return self._received


_JOINT: ContextVar[Joint | None] = ContextVar("joint_batch", default=None)
_CPU_GROUPS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _cpu_group(group: Any) -> Any:
    """The same processes with a backend for the CPU, so that agreeing does not wait for the device."""
    dist = torch.distributed
    if dist.get_backend(group) == "gloo":
        return group
    if group not in _CPU_GROUPS:
        members = dist.get_process_group_ranks(group)
        _CPU_GROUPS[group] = dist.new_group(members, backend="gloo", use_local_synchronization=True)
    return _CPU_GROUPS[group]


@contextmanager
def joint_batch(group: Any = None) -> Iterator[None]:
    """Inside the block the likelihoods compare each item with the items of all processes, not of this one only.

    Models, guides and objectives stay as they are: log N counts the items of all processes, every factor keeps one
    value per item of this process, and the sum of the ELBOs over the processes is the ELBO of the joint batch. So
    gradients are to be *summed* over processes (or averaged, if each divides its loss by the number of its own items);
    :func:`pyro_contrastive.distributed.sum_gradients` does it, and ``DistributedDataParallel`` averages. The backward
    pass may be outside the block. Every process runs the same model on equally many items; a difference is an error on
    all of them.

    Without ``torch.distributed``, or with one process, nothing changes.

    Args:
        group: Process group. Default: all processes.

    Example:
        >>> from pyro_contrastive.factors import infonce_log_ratio
        >>> with joint_batch():  # one process
        ...     infonce_log_ratio(100 * torch.eye(4))[0]
        tensor(1.3863)
    """
    dist = torch.distributed
    joint = None
    if dist.is_available() and dist.is_initialized():
        joint = Joint(dist.group.WORLD if group is None else group)
    token = _JOINT.set(joint if joint is not None and joint.ranks > 1 else None)
    try:
        yield
    finally:
        _JOINT.reset(token)


def current_joint() -> Joint | None:
    """The processes of the enclosing :func:`joint_batch`; None outside, and for one process."""
    return _JOINT.get()


def joint_size(items: int) -> int:
    """Number of items of the joint batch.

    Args:
        items: Of this process.
    """
    joint = _JOINT.get()
    return items if joint is None else items * joint.ranks


def joint_offset(items: int) -> int:
    """Position of this process's first item in the joint batch.

    Args:
        items: Of this process.
    """
    joint = _JOINT.get()
    return 0 if joint is None else items * joint.rank


def one_process_only(what: str, way_out: str) -> None:
    """Refuse what cannot be spread over processes.

    Args:
        what: Subject of the message.
        way_out: What to do instead.

    Raises:
        ValueError: Inside :func:`joint_batch` with two processes or more.
    """
    joint = _JOINT.get()
    if joint is not None:
        raise ValueError(f"{what} cannot be spread over the {joint.ranks} processes of a joint batch; {way_out}")


def gather(tensor: Tensor, dim: int = 0, *, what: str = "gather") -> Tensor:
    """The tensors of all processes of the joint batch, one after the other, with gradient.

    The gradient of a part is the sum of what all processes have for it: that of the sum of their losses.

    Args:
        tensor: Of one shape on every process.
        dim: Axis along which they are joined.
        what: Subject of error messages.

    Returns:
        The joined tensor, in the order of the ranks; the tensor itself outside :func:`joint_batch`.

    Raises:
        ValueError: If shapes, dtypes or ``requires_grad`` differ between processes.
    """
    joint = _JOINT.get()
    return tensor if joint is None else joint.gather(tensor, dim, what=what)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joint: Joint, tensor: Tensor) -> Tensor:
        ctx.joint = joint
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(joint.ranks)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=joint.group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.joint.group)
        return None, grad[ctx.joint.rank]
