"""What a fit does besides when several processes run it; with one, nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyro_contrastive.distributed import broadcast, process_rank, sum_gradients, synchronise_batch_norm
from pyro_contrastive.ops.joint import Joint, joint_batch
from pyro_contrastive.ops.random import derived_seed, seed_generators

__all__ = ["Processes"]

T = TypeVar("T")
_STEP, _EPOCH = 1, 2  # kinds of random streams


class Processes:
    """The processes of ``torch.distributed`` at the time of its making, in a fit that they do together.

    Args:
        seed: Of the fit.
        device: Where this process computes.

    Attributes:
        count: How many there are.
        first: Whether this is the one that writes files and shows progress.
        stopping: Whether this process was told to stop (:meth:`interrupts`).
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.rank, self.count = process_rank()
        self.first, self.stopping = self.rank == 0, False
        self._joint = Joint(torch.distributed.group.WORLD) if self.count > 1 else None

    def prepare(self, modules: Iterable[nn.Module], extra: Mapping[str, Tensor]) -> None:
        """Start from the first process's weights, with batch norms over all processes.

        Args:
            modules: Changed in place.
            extra: Parameters in Pyro's store.
        """
        if self._joint is not None:
            for module in modules:
                broadcast(synchronise_batch_norm(module))
            broadcast(extra.values())

    def batch(self) -> AbstractContextManager[None]:
        """The block in which the likelihood is that of the joint batch."""
        return joint_batch()

    def size(self, items: int) -> int:
        """Items of the joint batch.

        Args:
            items: Of this process.

        Raises:
            ValueError: On every process, if they have different numbers.
        """
        if self._joint is None:
            return items
        self._joint.agree("a batch", items)
        return items * self.count

    def total(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the processes; nothing waits for the device.

        Args:
            values: Scalar tensors, the same names everywhere.
        """
        if self._joint is None:
            return dict(values)
        dtype = next(iter(values.values())).dtype
        sums = torch.stack([value.to(dtype) for value in values.values()])
        torch.distributed.all_reduce(sums, group=self._joint.group)
        return dict(zip(values, sums.unbind(), strict=True))

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """See :func:`pyro_contrastive.distributed.sum_gradients`."""
        sum_gradients(parameters)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self._joint is None else self._joint.any(flag)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, or the error it meets, on every process."""
        return make() if self._joint is None else self._joint.from_first(make)

    def seed_step(self, step: int) -> None:
        """Give every process random numbers of its own for a step; the step alone decides which, so a resume is exact.

        Args:
            step: Its number.
        """
        if self._joint is not None:
            seed_generators(derived_seed(self.seed, _STEP, self.rank, step), self.device)

    def seed_epoch(self, epoch: int) -> None:
        """Give all processes the same random numbers at the start of a pass: the order of a shuffled loader.

        Args:
            epoch: Its number.
        """
        if self._joint is not None:
            seed_generators(derived_seed(self.seed, _EPOCH, epoch), self.device)

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Note Ctrl-C and SIGTERM in ``stopping`` instead of leaving the others in the middle of a message.

        A second one interrupts at once. Handlers are put back at the end.
        """
        if self._joint is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
