"""The batch at which a fit broke down: kept in a file, and tried again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_contrastive._fit_step import Attempt
from pyro_contrastive.checkpoint import load_checkpoint, save_checkpoint
from pyro_contrastive.modules import keep_parameters_local
from pyro_contrastive.ops.random import seeded, set_random_state
from pyro_contrastive.validation import default_elbo

__all__ = ["replay_bad_batch", "save_bad_batch"]


def save_bad_batch(path: Path, attempt: Attempt, state: Mapping[str, Any]) -> None:
    """Write a batch with the random state and weights to try it again.

    Args:
        path: File to write.
        attempt: The step that broke down.
        state: Weights to try it with, and the position they belong to, as in a checkpoint.
    """
    plain = (Tensor, int, float, str, bool)
    payload = {
        "step": attempt.step,
        "views": [view if isinstance(view, plain) else repr(view) for view in attempt.views],
        "random_state": attempt.random_state,
        "modules": state["modules"],
        "extra": state["extra"],
        "weights_step": state["position"]["step"],
    }
    save_checkpoint(path, payload)


def replay_bad_batch(
    path: str | Path, model: Callable[..., Any], guide: Callable[..., Any], *, elbo: Any = None
) -> float:
    """Compute the loss again at which a fit broke down: same batch, same random numbers, same weights.

    On the CPU ``fit`` sees a loss that is not finite before the weights move, so this is the very same loss. On another
    device the weights are the last good ones (``weights_step`` in the file says how old), and the loss may be finite.

    Args:
        path: The file ``bad_batch.pt`` that the message of ``fit`` names.
        model: The model of the fit; takes the weights of the file, if a module.
        guide: Its guide, likewise.
        elbo: The objective of the fit, if it was given one.

    Returns:
        The loss in nats per pair, with the modules in training mode.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    payload = load_checkpoint(path)
    modules = {name: part for name, part in (("model", model), ("guide", guide)) if isinstance(part, nn.Module)}
    for name, part in modules.items():
        keep_parameters_local(part.cpu())
        if name in payload["modules"]:
            part.load_state_dict(payload["modules"][name])
        part.train()
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False), seeded(0), torch.no_grad():
        for name, value in pyro.get_param_store().named_parameters():
            if name in payload["extra"]:
                value.copy_(payload["extra"][name])
        set_random_state(payload["random_state"], torch.device("cpu"))
        objective = default_elbo(model) if elbo is None else elbo
        loss = objective.differentiable_loss(model, guide, *payload["views"])
    return loss.item() / len(payload["views"][0])
