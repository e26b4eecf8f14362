"""One step of a fit: loss and its parts, gradient, update; and a look at whether the loss is finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_contrastive._fit_state import FitState
from pyro_contrastive.ops.random import get_random_state

__all__ = ["Attempt", "Breakdown", "FactorRecorder", "GradientStep"]


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


@dataclass(frozen=True)
class Attempt:
    """What a step started from, besides the weights.

    Attributes:
        step: Its number, from 1.
        views: The batch.
        random_state: Of the global generators, before the step.
    """

    step: int
    views: list[Any]
    random_state: dict[str, Tensor]


class Breakdown(Exception):
    """A step after which nothing is left to train.

    Args:
        reason: What is not finite.
        attempt: The step to blame.
        exact: Whether the weights are still those that it started from.
    """

    def __init__(self, reason: str, attempt: Attempt, *, exact: bool) -> None:
        super().__init__(reason)
        self.attempt = attempt
        self.exact = exact


class GradientStep:
    """One optimiser step per call.

    On the CPU a loss that is not finite is seen before it does harm. Elsewhere that would make the device wait for the
    host in every step, so it is seen one step late, when its value has long been computed.

    Args:
        objective: Pyro's ELBO module of the pair.
        num_particles: Of the objective.
        optimizer: The optimiser.
        parameters: What is clipped.
        state: Of the fit; is asked whether it is finite.
        clip_norm: Largest norm of the gradient, or None.
        late: See above; by default what suits the device.
    """

    def __init__(
        self,
        objective: nn.Module,
        num_particles: int,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        state: FitState,
        *,
        clip_norm: float | None = None,
        late: bool | None = None,
    ) -> None:
        self.objective = objective
        self.num_particles = num_particles
        self.optimizer = optimizer
        self.parameters = parameters
        self.state = state
        self.clip_norm = clip_norm
        self.late = state.device.type != "cpu" if late is None else late
        self._attempts: deque[Attempt] = deque(maxlen=2)
        self._unseen: tuple[Attempt, Tensor] | None = None

    def __call__(self, views: list[Any]) -> dict[str, Tensor]:
        """Make one step.

        Args:
            views: The batch, on the device.

        Returns:
            The loss and its parts in nats per pair, scalar tensors on the device.

        Raises:
            Breakdown: If the loss is not finite, or something failed for parameters that are not.
        """
        attempt = Attempt(self.state.step + 1, views, get_random_state(self.state.device))
        self._attempts.append(attempt)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with FactorRecorder() as recorder:
                loss = self.objective(*views) / len(views[0])
            if not self.late:
                self._look(attempt, loss)
            self._backward(loss)
        except (ValueError, RuntimeError) as error:  # NaN parameters may be refused by a distribution
            if self.state.is_finite():
                raise
            reason = f"{type(error).__name__} in step {attempt.step}: {str(error).splitlines()[0]}"
            raise Breakdown(reason, attempt, exact=not self.late) from error
        # The gradients are complete here: whoever sums them over processes does it now.
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self._update()
        loss = loss.detach()
        if self.late:
            self._look_late()
            self._unseen = attempt, loss
        scale = 1.0 / (len(views[0]) * self.num_particles)
        factors = {name: value * scale for name, value in recorder.sums.items()}
        return {"loss": loss, **factors, "latents": -loss - sum(factors.values())}

    def check(self) -> None:
        """See that the last loss, and all weights after it, are finite. Waits for the device.

        Raises:
            Breakdown: If not.
        """
        self._look_late()
        if not self.state.is_finite():
            reason = f"a parameter or buffer was not finite after step {self.state.step}"
            raise Breakdown(reason, self._attempts[-1], exact=False)

    def _look_late(self) -> None:
        if self._unseen is not None:
            (attempt, loss), self._unseen = self._unseen, None
            self._look(attempt, loss)

    def _look(self, attempt: Attempt, loss: Tensor) -> None:
        if math.isfinite(loss.item()):
            return
        if not self.late and len(self._attempts) == 2 and not self.state.is_finite(buffers=False):
            culprit = self._attempts[0]  # its loss was finite, its gradient was not
            raise Breakdown(f"a parameter was not finite after step {culprit.step}", culprit, exact=False)
        raise Breakdown(f"the loss was not finite in step {attempt.step}", attempt, exact=not self.late)

    def _backward(self, loss: Tensor) -> None:
        scaler = self.state.scaler
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(self.optimizer)

    def _update(self) -> None:
        scaler = self.state.scaler
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
