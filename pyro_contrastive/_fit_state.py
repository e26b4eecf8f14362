"""What changes while a pair is fitted, and how it is copied out and put back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_contrastive.ops.random import get_random_state, set_random_state

NEVER = torch.iinfo(torch.int64).max


class FactorRecorder(Messenger):
    """Sum every factor site during the pass that trains, so that no second pass is needed to show it.

    Attributes:
        sums: Scalar tensors by site name, detached. Factors of the guide count negatively, as in the ELBO. A factor
            with a value per state of an enumerated latent has no sum that would be a part of the ELBO: it is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, Unit) and not _enumerated(msg):
            value = scale_and_mask(fn.log_factor.detach(), msg["scale"], msg["mask"]).sum()
            in_guide = "has_rsample" in vars(fn)  # Pyro asks for it in guides, and only there
            self.sums[msg["name"]] = self.sums.get(msg["name"], 0) + (-value if in_guide else value)


def _enumerated(msg: Any) -> bool:
    """Whether a site has more batch dimensions than its plates explain: Pyro put the states of a latent there."""
    plates = [-frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized]
    return bool(plates) and msg["fn"].log_factor.dim() > max(plates)


class FitState:
    """Parameters, optimiser, position in the data, random state, history.

    Args:
        modules: The modules of the pair by role.
        extra: Parameters that live in Pyro's store, by name.
        optimizer: The optimiser.
        device: Where everything is.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        extra: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        nested = set(modules["model"].modules()) if "model" in modules else set()
        self.modules = {k: module for k, module in modules.items() if k == "model" or module not in nested}
        self.extra = extra
        self.optimizer = optimizer
        self.device = device
        self.step = self.epoch = self.batch = 0
        self.random_state = get_random_state(device)
        self.epoch_random_state = self.random_state
        self.history: dict[str, list[float]] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._first_bad = torch.full((), NEVER, device=device)

    def copy(self) -> dict[str, Any]:
        """Copy everything out, ready for a checkpoint.

        Returns:
            Tensors, numbers and strings that share no memory with the live state.
        """
        return copy.deepcopy(
            {
                "modules": {name: dict(module.state_dict()) for name, module in self.modules.items()},
                "extra": {name: value.detach() for name, value in self.extra.items()},
                "optimizer": self.optimizer.state_dict(),
                "position": {"step": self.step, "epoch": self.epoch, "batch": self.batch},
                "random_state": self.random_state,
                "epoch_random_state": self.epoch_random_state,
                "history": self.history,
                "sums": self._sums,
                "count": self._count,
            }
        )

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
        payload = copy.deepcopy(dict(payload))
        for name, module in self.modules.items():
            module.load_state_dict(payload["modules"][name])
        with torch.no_grad():
            for name, value in self.extra.items():
                value.copy_(payload["extra"][name])
        self.optimizer.load_state_dict(payload["optimizer"])
        position = payload["position"]
        self.step, self.epoch, self.batch = position["step"], position["epoch"], position["batch"]
        self.random_state, self.epoch_random_state = payload["random_state"], payload["epoch_random_state"]
        set_random_state(self.random_state, self.device)
        self.history = payload["history"]
        self._sums = {name: value.to(self.device) for name, value in payload["sums"].items()}
        self._count = payload["count"]
        self._first_bad.fill_(NEVER)

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
        bad = ~torch.isfinite(values["loss"])
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=self.step), self._first_bad)
        self.random_state = get_random_state(self.device)

    def is_finite(self) -> bool:
        """Whether every parameter and buffer is finite. Waits for the device."""
        tensors = [value for module in self.modules.values() for value in module.state_dict().values()]
        tensors = [value for value in (*tensors, *self.extra.values()) if value.is_floating_point()]
        return bool(torch.stack([torch.isfinite(value).all() for value in tensors]).all()) if tensors else True

    def find_problem(self) -> str | None:
        """Say what is not finite, if anything. Waits for the device.

        Returns:
            The first step whose loss was not finite, or that a parameter is not; None if all is well.
        """
        first_bad = int(self._first_bad)
        if first_bad != NEVER:
            return f"the loss was not finite in step {first_bad}"
        return None if self.is_finite() else f"a parameter or buffer was not finite after step {self.step}"

    def log(self, lr: float) -> str:
        """Close a row of the history: means since the row before. Waits for the device.

        Args:
            lr: Learning rate to write down.

        Returns:
            The row as text for a progress bar.
        """
        names = list(self._sums)
        means = (torch.stack([self._sums[name].float() for name in names]) / self._count).tolist()
        row = dict(zip(names, means, strict=True))
        for name, value in {"step": self.step, "lr": lr, **row}.items():
            self.history.setdefault(name, []).append(value)
        self._sums, self._count = {}, 0
        return " ".join(f"{name} {value:.3f}" for name, value in row.items()) + " nats"
