"""How an encoder is run: in chunks that are encoded a second time for the gradient, and in reduced precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

__all__ = ["Precision", "check_encoding", "encode"]

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS = get_args(Precision)


def check_encoding(chunk_size: int | None, precision: str) -> None:
    """Check the two options of an encoder.

    Args:
        chunk_size: Items per chunk, ``>= 1``. None: the whole batch in one pass.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: If one is out of its range.
    """
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"`chunk_size` must be an integer >= 1, or None for the whole batch, got {chunk_size!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def encode(encoder: nn.Module, x: Tensor, *, chunk_size: int | None = None, precision: Precision = "float32") -> Any:
    """Run an encoder on a batch, if wanted chunk by chunk with the memory of one chunk.

    With ``chunk_size`` the graph behind the features is not kept: the backward pass encodes each chunk again. Loss and
    gradients over the whole batch are those of one pass, for a second forward pass, about a third more operations
    (cached gradients by activation checkpointing). Dropout masks and the buffers of the encoder (batch-norm
    statistics) are the same in both passes, and the second one changes none. What couples the items *inside* the
    encoder, such as batch norm in training mode, sees one chunk at a time.

    Args:
        encoder: ``(N, ...) -> (N, features)``.
        x: ``(N, ...)``.
        chunk_size: Items per chunk, ``>= 1``; it need not divide N. None: the whole batch in one pass.
        precision: Of the encoder, by ``torch.autocast`` if not ``"float32"``; the features come as they are.

    Returns:
        What ``encoder(x)`` returns; with chunks a tensor.

    Raises:
        ValueError: If an option is out of its range.

    References:
        Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", arXiv 2101.06983 (cached
        gradients); Chen et al., arXiv 1604.06174 (checkpointing).

    Example:
        >>> encode(nn.Linear(8, 4), torch.zeros(10, 8), chunk_size=3).shape
        torch.Size([10, 4])
    """
    check_encoding(chunk_size, precision)

    def run(chunk: Tensor) -> Any:
        with _autocast(chunk.device, precision):
            return encoder(chunk)

    if chunk_size is None:
        return run(x)
    _shape_lazy_parameters(encoder, x)
    if not torch.is_grad_enabled():
        parts = [run(chunk) for chunk in x.split(chunk_size)]
    else:
        parts = [_run_twice(run, encoder, chunk) for chunk in x.split(chunk_size)]
    return torch.cat(parts) if all(isinstance(part, Tensor) for part in parts) else parts[0]


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    # "float32" leaves an autocast of the caller alone
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


def _run_twice(run: Any, encoder: nn.Module, chunk: Tensor) -> Any:
    """Run without keeping the graph; the backward pass runs again, with buffers as they were."""
    before = [{name: _cloned(value) for name, value in part._buffers.items()} for part in encoder.modules()]
    return checkpoint(
        run,
        chunk,
        use_reentrant=False,
        preserve_rng_state=True,
        context_fn=lambda: (nullcontext(), _with_buffers(encoder, before)),
    )


def _cloned(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


@contextmanager
def _with_buffers(encoder: nn.Module, buffers: list[dict[str, Tensor | None]]) -> Iterator[None]:
    """Lend other buffers to the encoder, and whatever happens give back its own, untouched."""
    parts = list(encoder.modules())
    own = [dict(part._buffers) for part in parts]
    try:
        for part, lent in zip(parts, buffers, strict=True):
            part._buffers.update({name: _cloned(value) for name, value in lent.items()})
        yield
    finally:
        for part, mine in zip(parts, own, strict=True):
            part._buffers.update(mine)


@torch.no_grad()
def _shape_lazy_parameters(encoder: nn.Module, x: Tensor) -> None:
    """Let the first item shape what has no shape yet; in eval mode, so that no statistics change."""
    tensors = [value for part in encoder.modules() for value in (*part._parameters.values(), *part._buffers.values())]
    if not any(is_lazy(value) for value in tensors if value is not None):
        return
    modes = {part: part.training for part in encoder.modules()}
    encoder.eval()
    encoder(x[:1])
    for part, training in modes.items():
        part.training = training
