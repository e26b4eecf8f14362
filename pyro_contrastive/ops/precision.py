"""Matrix products that mixed precision leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["matmul"]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the dtype of the arguments, under ``torch.autocast`` as well.

    Cosines in half precision are off by up to 0.4 %, which a concentration multiplies: at 100 the log density would be
    off by a large part of a nat.

    Args:
        a: ``(..., N, d)``.
        b: ``(..., d, M)``, same dtype and device.

    Returns:
        ``(..., N, M)``.
    """
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
