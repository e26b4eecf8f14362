"""Validation during a fit: what is measured, how often, and when the run stops for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_contrastive.ops.random import seeded

__all__ = ["Validation", "default_elbo", "held_out_loss"]

Metrics = Callable[[Any, Any], Mapping[str, float]]


@dataclass(frozen=True)
class Validation:
    """Metrics that ``fit(..., validation=...)`` takes down, and what follows from them.

    Every ``every`` steps, and after the last one, ``metrics(model, guide)`` is called: in eval mode, without gradients,
    and with random numbers of its own, so that the run is the same with and without it. (Give it a loader of its own:
    one that is iterated in two places has one position.)

    Attributes:
        metrics: Gives numbers by name, always the same names, e.g. :func:`held_out_loss`.
        every: Steps between two validations, ``>= 1``.
        monitor: The metric that decides: the weights with its best value are kept, and put back when the run is done.
            None: nothing is decided.
        best: Whether ``"min"`` or ``"max"`` is best.
        patience: Stop after so many validations in a row without a better value, ``>= 1``. None: never.
        use_ema: Measure the averaged weights, which needs ``fit(..., ema=...)``, instead of the current ones.

    Raises:
        TypeError: If ``metrics`` cannot be called.
        ValueError: If a number is out of its range, or ``patience`` has no ``monitor``.

    Example:
        >>> Validation(lambda model, guide: {"accuracy": 0.9}, monitor="accuracy", best="max", patience=5).every
        100
    """

    metrics: Metrics
    every: int = 100
    monitor: str | None = None
    best: Literal["min", "max"] = "min"
    patience: int | None = None
    use_ema: bool = False

    def __post_init__(self) -> None:
        if not callable(self.metrics):
            raise TypeError(f"`metrics` must be a function of (model, guide), got {type(self.metrics).__name__}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"`every` must be an integer >= 1, the steps between validations, got {self.every!r}")
        if self.best not in ("min", "max"):
            raise ValueError(f"`best` must be 'min' or 'max', got {self.best!r}")
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise ValueError(f"`patience` must be an integer >= 1, in validations, or None, got {self.patience!r}")
        if self.patience is not None and self.monitor is None:
            raise ValueError(f"`patience`={self.patience} needs a `monitor`, the name of the metric that must improve")

    def measure(self, model: Any, guide: Any, seed: int, device: torch.device) -> dict[str, float]:
        """Call the metrics without a trace in the run.

        Args:
            model: As in ``fit``.
            guide: As in ``fit``.
            seed: Of the random numbers that the metrics draw.
            device: Where the pair is.

        Returns:
            The metrics.

        Raises:
            TypeError: If the metrics are no mapping.
            ValueError: If ``monitor`` is not among them.
        """
        with _undisturbed(model, guide), seeded(seed, device):
            found = self.metrics(model, guide)
        if not isinstance(found, Mapping):
            raise TypeError(f"`metrics` must return numbers by name, got {type(found).__name__}")
        row = {name: float(value) for name, value in found.items()}
        if self.monitor is not None and self.monitor not in row:
            raise ValueError(f"`monitor` must be one of the metrics {sorted(row)}, got {self.monitor!r}")
        return row


def held_out_loss(batches: Iterable[Any], *, elbo: Any = None, num_views: int | None = 2) -> Metrics:
    """Measure the loss that is fitted on pairs that are not.

    A contrastive loss depends on the batch size: take that of the training.

    Args:
        batches: Batches ``(x1, x2, ...)``, drawn once and kept, so that every validation sees the same views.
        elbo: Pyro objective, as in ``fit``. Default: as in ``fit``.
        num_views: How many leading entries of a batch the pair takes. None: all.

    Returns:
        ``metrics`` for :class:`Validation`: ``"loss"`` in nats per pair.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> from pyro_contrastive import guides, models
        >>> guide = guides.VonMisesFisher(nn.Linear(8, 32), dim=5)
        >>> metrics = held_out_loss([(torch.randn(16, 8), torch.randn(16, 8))])
        >>> sorted(metrics(models.MCInfoNCE(guide), guide))
        ['loss']
    """
    kept = [(batch if isinstance(batch, (tuple, list)) else [batch])[:num_views] for batch in batches]
    if not kept:
        raise ValueError("`batches` must hold at least one batch, got none")

    @torch.no_grad()
    def metrics(model: Any, guide: Any) -> dict[str, float]:
        objective = default_elbo(model) if elbo is None else elbo
        parameter = next((p for part in _modules(model, guide) for p in part.parameters()), None)
        device = None if parameter is None else parameter.device
        total, pairs = 0.0, 0
        for batch in kept:
            views = [view.to(device) if isinstance(view, Tensor) else view for view in batch]
            total += float(objective.differentiable_loss(model, guide, *views))
            pairs += len(views[0])
        return {"loss": total / pairs}

    return metrics


def default_elbo(model: Any) -> Any:
    """Give the objective of a model: its own, ``model.objective()``, or ``Trace_ELBO(max_plate_nesting=1)``.

    Args:
        model: Pyro model.
    """
    return model.objective() if hasattr(model, "objective") else Trace_ELBO(max_plate_nesting=1)


def _modules(*programs: Any) -> list[nn.Module]:
    return [part for part in programs if isinstance(part, nn.Module)]


@contextmanager
def _undisturbed(*programs: Any) -> Iterator[None]:
    """Eval mode, no gradients; modes and the random states of NumPy and Python as before at the end."""
    modes = [(part, part.training) for program in _modules(*programs) for part in program.modules()]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    for program in _modules(*programs):
        program.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training
        np.random.set_state(numpy_state)
        random.setstate(python_state)
