"""Where a fit writes its numbers as they come: a protocol of three calls, and TensorBoard's writer behind it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

__all__ = ["TensorBoardTracker", "Tracker"]


@runtime_checkable
class Tracker(Protocol):
    """What ``fit(..., tracker=...)`` calls; any object with these three methods will do.

    Example:
        >>> class Printing:
        ...     def log(self, metrics, step):
        ...         print(step, {name: round(value, 2) for name, value in metrics.items()})
        ...     def figure(self, name, figure, step): ...
        ...     def flush(self): ...
        >>> isinstance(Printing(), Tracker)
        True
        >>> Printing().log({"train/loss": 3.14159}, step=50)
        50 {'train/loss': 3.14}
    """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take numbers down: ``train/...`` per row of the history, ``validation/...`` per validation.

        Args:
            metrics: Numbers by name.
            step: Optimiser steps made.
        """

    def figure(self, name: str, figure: Any, step: int) -> None:
        """Take a picture down; ``fit`` draws none, metrics of yours may.

        Args:
            name: What it shows.
            figure: A matplotlib figure.
            step: Optimiser steps made.
        """

    def flush(self) -> None:
        """Bring to the disk what was taken down; called at the end of a run, however it ends."""


class TensorBoardTracker:
    """Write to TensorBoard's event files, with PyTorch's writer.

    Args:
        folder: Where the files go; ``tensorboard --logdir FOLDER`` shows them.
        writer: One that is open already, instead of a new one for ``folder``.

    Raises:
        ImportError: If TensorBoard is not installed.

    Example:
        >>> class Writer:
        ...     def add_scalar(self, name, value, step):
        ...         print(name, value, step)
        >>> TensorBoardTracker(writer=Writer()).log({"train/loss": 3.5}, step=50)
        train/loss 3.5 50
    """

    def __init__(self, folder: str | Path | None = None, *, writer: Any = None) -> None:
        if writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoardTracker needs TensorBoard, which is not installed; "
                    "pip install 'pyro-contrastive[tensorboard]'"
                ) from error
            if folder is None:
                raise ValueError("`folder` must say where the event files go, got None")
            writer = SummaryWriter(str(folder))
        self.writer = writer

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars.

        Args:
            metrics: Numbers by name.
            step: Optimiser steps made.
        """
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure as an image; the figure stays open and as it was.

        Args:
            name: What it shows.
            figure: A matplotlib figure.
            step: Optimiser steps made.
        """
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        own = figure.canvas
        try:
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        finally:
            figure.set_canvas(own)
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Bring everything to the disk."""
        self.writer.flush()
