"""What changes while a pair is fitted, and how it is copied out and put back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pyro_contrastive.ops.random import get_random_state, set_random_state

__all__ = ["FitState"]

Weights = dict[str, dict[str, Any]]  # "modules": state dicts by role; "extra": tensors by name


class FitState:
    """Weights, their average, optimiser, position in the data, random state, history, the best validation.

    Args:
        modules: The modules of the pair by role.
        extra: Parameters that live in Pyro's store, by name.
        optimizer: The optimiser.
        device: Where everything is.
        ema: Decay of the average of the weights. None: no average.
        scaler: Of the loss, for float16.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        extra: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        ema: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        nested = set(modules["model"].modules()) if "model" in modules else set()
        self.modules = {k: module for k, module in modules.items() if k == "model" or module not in nested}
        self.extra = extra
        self.optimizer = optimizer
        self.device = device
        self.scaler = scaler
        self.step = self.epoch = self.batch = 0
        self.random_state = get_random_state(device)
        self.epoch_random_state = self.random_state
        self.history: dict[str, list[float]] = {}
        self.validations: dict[str, list[float]] = {}
        self.best: dict[str, Any] | None = None
        self.stale = 0
        self.decay = ema
        self.average: Weights | None = None if ema is None else _copied(self._weights())
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def _weights(self) -> Weights:
        return {
            "modules": {name: dict(module.state_dict()) for name, module in self.modules.items()},
            "extra": {name: value.detach() for name, value in self.extra.items()},
        }

    def _load_weights(self, weights: Mapping[str, Any]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(weights["modules"][name])
        with torch.no_grad():
            for name, value in self.extra.items():
                value.copy_(weights["extra"][name])

    def copy(self) -> dict[str, Any]:
        """Copy everything out, ready for a checkpoint.

        Returns:
            Tensors, numbers and strings that share no memory with the live state.
        """
        return _copied(
            {
                **self._weights(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "position": {"step": self.step, "epoch": self.epoch, "batch": self.batch},
                "random_state": self.random_state,
                "epoch_random_state": self.epoch_random_state,
                "history": self.history,
                "validations": self.validations,
                "stale": self.stale,
                "sums": self._sums,
                "count": self._count,
            }
        ) | {"best": self.best}  # never changed in place

    def load(self, payload: Mapping[str, Any]) -> None:
        """Put a copy back, PyTorch's global random state included.

        Args:
            payload: From :meth:`copy`, or read from a file.

        Raises:
            KeyError: If the payload lacks something.
            RuntimeError: If names or shapes of parameters differ.
        """
        if set(payload["extra"]) != set(self.extra) or set(payload["modules"]) != set(self.modules):
            found = sorted([*payload["extra"], *payload["modules"]])
            raise RuntimeError(f"it holds {found}, expected {sorted([*self.extra, *self.modules])}")
        payload = {**_copied({k: v for k, v in payload.items() if k != "best"}), "best": payload.get("best")}
        self._load_weights(payload)
        self.average = _moved(payload.get("average"), self.device)
        self.optimizer.load_state_dict(payload["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(payload["scaler"])
        position = payload["position"]
        self.step, self.epoch, self.batch = position["step"], position["epoch"], position["batch"]
        self.random_state, self.epoch_random_state = payload["random_state"], payload["epoch_random_state"]
        set_random_state(self.random_state, self.device)
        self.history, self.validations = payload["history"], payload.get("validations", {})
        self.best, self.stale = payload["best"], payload.get("stale", 0)
        self._sums = {name: value.to(self.device) for name, value in payload["sums"].items()}
        self._count = payload["count"]

    def advance(self, values: Mapping[str, Tensor]) -> None:
        """Count one step; nothing here waits for the device.

        Args:
            values: Scalar tensors of this step: ``loss`` and its parts.
        """
        self.step += 1
        self.batch += 1
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        if self.average is not None:
            self._average()
        self.random_state = get_random_state(self.device)

    def _average(self) -> None:
        """Move the average towards the weights, floating buffers included; at first faster than ``decay`` says."""
        assert self.decay is not None
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        pairs = list(zip(_tensors(self.average), _tensors(self._weights()), strict=True))
        floating = [(mean, now) for mean, now in pairs if mean.is_floating_point()]
        for mean, now in pairs:
            if not mean.is_floating_point():
                mean.copy_(now)
        for dtype in {mean.dtype for mean, _ in floating}:
            means, values = zip(*(pair for pair in floating if pair[0].dtype == dtype), strict=True)
            get_ema_multi_avg_fn(decay)(list(means), list(values), None)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Lend the average to the pair, and give it back its own weights at the end."""
        own = _copied(self._weights())
        assert self.average is not None
        self._load_weights(self.average)
        try:
            yield
        finally:
            self._load_weights(own)

    def needs_validation(self, every: int, total: int) -> bool:
        """Say whether a validation is due after this step, and was not made yet.

        Args:
            every: Steps between two of them.
            total: Steps of the run; after the last one there is always one.
        """
        due = self.step > 0 and (self.step % every == 0 or self.step >= total)
        return due and self.validations.get("step", [0.0])[-1] != self.step

    def judge(self, row: Mapping[str, float], monitor: str | None, direction: Literal["min", "max"]) -> None:
        """Write a row of validation metrics down, and keep weights that are the best so far.

        Args:
            row: Metrics by name.
            monitor: The one that decides. None: none does.
            direction: Which values of it are better.
        """
        for name, value in {"step": float(self.step), **row}.items():
            self.validations.setdefault(name, []).append(value)
        if monitor is None:
            return
        value, sign = row[monitor], 1.0 if direction == "min" else -1.0
        if not math.isnan(value) and (self.best is None or sign * value < sign * self.best["value"]):
            self.stale = 0
            weights = _copied({**self._weights(), "average": self.average})
            self.best = {"step": self.step, "value": value, **weights}
        else:
            self.stale += 1

    def put_back_best(self) -> None:
        """Load the weights, and their average, that the best validation saw; nothing else changes."""
        if self.best is not None:
            self._load_weights(self.best)
            self.average = _moved(_copied(self.best["average"]), self.device)

    def is_finite(self, *, buffers: bool = True) -> bool:
        """Say whether every parameter is finite. Waits for the device.

        Args:
            buffers: Look at the buffers as well.
        """
        named = {"modules": {k: dict(v.named_parameters()) for k, v in self.modules.items()}, "extra": dict(self.extra)}
        values = [value for value in _tensors(self._weights() if buffers else named) if value.is_floating_point()]
        return bool(torch.stack([torch.isfinite(value).all() for value in values]).all()) if values else True

    def log(self, lr: float) -> dict[str, float]:
        """Close a row of the history: means since the row before. Waits for the device.

        Args:
            lr: Learning rate to write down.

        Returns:
            The row: the learning rate, the loss and its parts in nats per pair.
        """
        names = list(self._sums)
        means = (torch.stack([self._sums[name].float() for name in names]) / self._count).tolist()
        row = {"lr": lr, **dict(zip(names, means, strict=True))}
        for name, value in {"step": self.step, **row}.items():
            self.history.setdefault(name, []).append(value)
        self._sums, self._count = {}, 0
        return row


def _copied(value: Any) -> Any:
    """Copy containers and tensors; far cheaper than ``copy.deepcopy`` on a long history."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return value[:] if value and isinstance(value[0], (float, int)) else [_copied(entry) for entry in value]
    return tuple(_copied(entry) for entry in value) if isinstance(value, tuple) else value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _moved(entry, device) for key, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        return [tensor for entry in value.values() for tensor in _tensors(entry)]
    return [value] if isinstance(value, Tensor) else []
