"""Train any model/guide pair: progress with the parts of the loss, checkpoints, exact resume, a stop on NaN.

The loop is Pyro's own recipe for PyTorch, ``elbo = Trace_ELBO()(model, guide)`` and a torch optimiser; plain
``pyro.infer.SVI`` trains the same pairs.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_contrastive._fit_data import peek, stream, to_views, total_steps
from pyro_contrastive._fit_problem import replay_bad_batch, save_bad_batch
from pyro_contrastive._fit_settings import (
    check_arguments,
    check_precision,
    deterministic_algorithms,
    encoder_options,
    pick_device,
)
from pyro_contrastive._fit_state import FitState
from pyro_contrastive._fit_step import Breakdown, GradientStep
from pyro_contrastive.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from pyro_contrastive.encoding import Precision
from pyro_contrastive.modules import keep_parameters_local
from pyro_contrastive.ops.random import derived_seed, seed_generators, seeded
from pyro_contrastive.schedules import SCHEDULES
from pyro_contrastive.trackers import Tracker
from pyro_contrastive.validation import Validation, default_elbo

__all__ = ["FitResult", "fit", "pick_device", "replay_bad_batch"]


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` gives back.

    Attributes:
        model: The model, on ``device``, in eval mode.
        guide: The guide, likewise.
        history: One list per column: ``step``, ``loss`` (nats per pair, mean since the row before), ``lr``, and the
            parts of the ELBO: one column per factor site of the model, and ``latents`` (everything else: priors minus
            entropies). The parts add up to minus the loss.
        step: Optimiser steps that the parameters have seen; after validation with a ``monitor``, those of the best.
        status: ``"done"``, early stopping included; ``"diverged"`` (stopped on a non-finite number, last good state put
            back); ``"interrupted"`` (Ctrl-C, or ``max_seconds`` were over).
        message: What happened, for a person.
        seconds: Wall time of this call.
        device: Where the modules are.
        checkpoint: The file that was written, or None without ``out``.
        validations: Like the history, a row per validation: ``step`` and the metrics. Empty without validation.
        ema: Averaged weights: state dicts by role (``"model"``, which holds the guide if it has it as a part,
            ``"guide"``). None without ``ema``.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    history: dict[str, list[float]]
    step: int
    status: Literal["done", "diverged", "interrupted"]
    message: str
    seconds: float
    device: torch.device
    checkpoint: Path | None
    validations: dict[str, list[float]]
    ema: dict[str, dict[str, Tensor]] | None

    def load_ema(self) -> None:
        """Put the averaged weights into the modules.

        Raises:
            ValueError: If the fit kept none.
        """
        if self.ema is None:
            raise ValueError("this fit kept no averaged weights; call it with `ema=0.999`, for instance")
        for name, weights in self.ema.items():
            getattr(self, name).load_state_dict(weights)


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Iterable[Any],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    num_views: int | None = 2,
    lr: float = 1e-3,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    schedule: str | Callable[[float], float] = "cosine",
    clip_norm: float | None = None,
    elbo: Any = None,
    chunk_size: int | None = None,
    precision: Precision = "float32",
    ema: float | None = None,
    validation: Validation | None = None,
    deterministic: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    checkpoint_seconds: float = 60.0,
    max_seconds: float | None = None,
    config: Mapping[str, Any] | None = None,
    log_every: int | None = None,
    tracker: Tracker | None = None,
    progress: bool | str = True,
) -> FitResult:
    """Fit a model/guide pair to views by gradient ascent on the ELBO.

    The caller's random state, Pyro settings and validation mode are put back at the end; the modules stay on ``device``
    and are left in eval mode. Parameters stay in the modules, not in Pyro's global store; only ``pyro.param``
    statements of plain functions use the store, as Pyro does.

    Args:
        model: Pyro model with the signature ``(*views)``: a module, or a plain function.
        guide: Pyro guide with the same signature.
        data: Iterable of batches ``(x1, x2, ...)``: a ``DataLoader``, a loader of ours, a generator. An object with a
            method ``seek(epoch, batch)`` is asked for its position before each pass, which makes resuming cheap; of
            any other, the batches that were already used are drawn again and dropped.
        epochs: Passes over ``data``, which must then have a length. Give exactly one of ``epochs`` and ``steps``.
        steps: Optimiser steps.
        num_views: How many leading entries of a batch the pair takes; the rest (labels, ...) is not used. None: all.
        lr: Learning rate of the default optimiser, Adam; ``> 0``.
        optimizer: Builds another one from the list of parameters, e.g. ``lambda p: torch.optim.SGD(p, lr=0.1)``.
        schedule: ``"cosine"`` (to zero at the last step), ``"constant"``, or a function from the fraction done, in
            ``[0, 1)``, to the factor on the learning rate, e.g. ``schedules.warmup_cosine(0.05)``.
        clip_norm: Largest norm of the gradient, ``> 0``. None: no clipping.
        elbo: A fresh Pyro objective. Default: ``model.objective()`` of a model that has one of its own, else
            ``Trace_ELBO(max_plate_nesting=1)``.
        chunk_size: Items that the encoder sees at a time, ``>= 1``: the loss of the whole batch with the memory of one
            chunk, see :func:`~pyro_contrastive.encoding.encode`. None: as the guide says (by default all at once).
        precision: Of the encoder: ``"float32"``, ``"bfloat16"``, or ``"float16"`` (CUDA only, with a scaled loss).
            Laws, factors and evidence stay in float32.
        ema: Decay in ``(0, 1)`` of an exponential average of all weights and buffers over the steps, ``result.ema``;
            in step t it is at most ``(1 + t) / (10 + t)``. None: no average.
        validation: What is measured during the run, and whether it stops early; see
            :class:`~pyro_contrastive.validation.Validation`.
        deterministic: Use deterministic algorithms only, and fail where there is none (the CPU needs it rarely).
        seed: Seed of everything random in the run but the data.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        out: Folder for ``checkpoint.pt``, and ``bad_batch.pt`` if the run breaks down. None: no file is written.
        resume: Go on from the checkpoint in ``out`` when there is one. On one CPU the result is bit for bit that of an
            uninterrupted run if ``data`` gives the same batches again (PyTorch's global random state, which a
            ``DataLoader`` uses, is replayed).
        checkpoint_seconds: Least time between two checkpoints; the end of the run is always written.
        max_seconds: Wall time of this call, ``>= 0``, after which it stops as if interrupted, with a checkpoint; the
            next call goes on. At least one step is made. None: no limit.
        config: Numbers and strings of yours that identify the run; kept in the checkpoint, and a checkpoint with
            other values is refused.
        log_every: Steps per row of the history, ``>= 1``. Default: 50 rows, but at most 50 steps each.
        tracker: Takes the rows of history and validations as they come; see :mod:`pyro_contrastive.trackers`.
        progress: Show a progress bar; a string is its label.

    Returns:
        The fitted pair with its history and how the run ended.

    Raises:
        ValueError: If an argument is out of its range or does not go with another, or ``data`` ends before ``steps``.
        TypeError: If ``validation`` or ``tracker`` is something else.
        CheckpointError: If the checkpoint in ``out`` is unreadable or belongs to another configuration.

    Warns:
        RuntimeWarning: If the loss or a parameter stopped being finite; the last good state is put back.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     mean = pyro.param("mean", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.factor("likelihood", dist.Normal(mean, 1.0).log_prob(x))
        >>> data = [torch.ones(8), torch.zeros(8)]
        >>> result = fit(model, lambda x: None, data, epochs=2, num_views=1, device="cpu", progress=False)
        >>> result.status, sorted(result.history)
        ('done', ['latents', 'likelihood', 'loss', 'lr', 'step'])
        >>> pyro.clear_param_store()
    """
    started = time.monotonic()
    deadline = started + (math.inf if max_seconds is None else max_seconds)
    total = total_steps(data, epochs, steps)
    log_every = max(1, min(50, total // 50)) if log_every is None else log_every
    check_arguments(lr, clip_norm, max_seconds, log_every, schedule, ema, validation, tracker)
    factor = schedule if callable(schedule) else SCHEDULES[schedule]
    target = pick_device(device)
    check_precision(precision, target)
    path = None if out is None else Path(out) / "checkpoint.pt"
    elbo = default_elbo(model) if elbo is None else elbo

    modules = {name: part for name, part in (("model", model), ("guide", guide)) if isinstance(part, nn.Module)}
    for part in modules.values():
        keep_parameters_local(part.to(target))
    objective = elbo(model, guide)

    with (
        pyro.settings.context(module_local_params=True),
        seeded(seed, target),
        deterministic_algorithms(deterministic, target),
        encoder_options(modules, chunk_size, precision),
    ):
        first, data = peek(data)
        extra = _create_parameters(objective, modules, to_views(first, num_views, target))
        parameters = [p for p in chain(objective.parameters(), extra.values()) if p.requires_grad]
        if not parameters:
            raise ValueError(
                "neither the model nor the guide has a parameter to train; pass modules, or use pyro.param"
            )
        optim = torch.optim.Adam(parameters, lr=lr) if optimizer is None else optimizer(parameters)
        base_lrs = [group["lr"] for group in optim.param_groups]
        settings = {
            "model": _name(model),
            "guide": _name(guide),
            "optimizer": type(optim).__name__,
            "lr": base_lrs,
            "schedule": schedule if isinstance(schedule, str) else _name(schedule),
            "seed": seed,
            **({} if schedule == "constant" else {"steps": total}),
            "precision": None if precision == "float32" else precision,
            "ema": ema,
            "monitor": None if validation is None else validation.monitor,
            **(config or {}),
        }
        seed_generators(seed, target)
        scaler = torch.amp.GradScaler(target.type) if precision == "float16" else None
        state = FitState(modules, extra, optim, target, ema=ema, scaler=scaler)
        if path is not None and resume and path.exists():
            _resume(state, path, settings)
        step = GradientStep(objective, getattr(elbo, "num_particles", 1), optim, parameters, state, clip_norm=clip_norm)

        def save(payload: dict[str, Any], done: bool = False) -> None:
            """Write the checkpoint: every file of a run but `bad_batch.pt` is written here."""
            if path is not None:
                save_checkpoint(path, {**payload, "done": done, "config": settings})

        status: Literal["done", "diverged", "interrupted"] = "done"
        message = f"{total} steps"
        good, written = state.copy(), time.monotonic()
        for part in modules.values():
            part.train()
        from tqdm.auto import tqdm

        often = 0.1 if sys.stderr.isatty() else 1.0  # seconds; a log file is no terminal
        bar = tqdm(total=total, initial=min(state.step, total), disable=not progress, unit="step", mininterval=often)
        bar.set_description_str(progress if isinstance(progress, str) else "fit")
        try:
            with pyro.validation_enabled(False):  # the dry call was validated; here every check would stop the device
                batches = stream(data, state)
                while True:
                    if validation is not None and state.needs_validation(validation.every, total):
                        with state.averaged() if validation.use_ema else nullcontext():
                            metrics = validation.measure(model, guide, derived_seed(seed, 0), target)
                        state.judge(metrics, validation.monitor, validation.best)
                        _track(tracker, "validation", metrics, state.step)
                    patience = math.inf if validation is None or validation.patience is None else validation.patience
                    if state.step >= total or state.stale >= patience:
                        break
                    views = to_views(next(batches), num_views, target)
                    for group, base in zip(optim.param_groups, base_lrs, strict=True):
                        group["lr"] = base * factor(state.step / total)
                    try:
                        state.advance(step(views))
                        bar.update()
                        over = state.step < total and time.monotonic() > deadline
                        row = state.step % log_every == 0 or state.step == total
                        if not (row or over or (validation and state.needs_validation(validation.every, total))):
                            continue
                        step.check()
                    except Breakdown as breakdown:
                        status = "diverged"
                        weights = state.copy() if breakdown.exact else good
                        state.load(good)
                        message = (
                            f"stopped: {breakdown}. The state after step {state.step} was put back; "
                            "try a smaller `lr`, `clip_norm=1.0`, or a larger assumed concentration of the pairs"
                        )
                        if path is not None:
                            bad = path.with_name("bad_batch.pt")
                            save_bad_batch(bad, breakdown.attempt, weights)
                            message += f". The batch of step {breakdown.attempt.step} is in {bad}: `replay_bad_batch`"
                        break
                    if row:
                        means = state.log(optim.param_groups[0]["lr"])
                        bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in means.items() if k != "lr") + " nats")
                        _track(tracker, "train", means, state.step)
                    if over:
                        raise KeyboardInterrupt
                    if row:
                        good = state.copy()
                        if time.monotonic() - written > checkpoint_seconds:
                            save(good)
                            written = time.monotonic()
        except KeyboardInterrupt:
            status, message = "interrupted", f"interrupted after step {state.step} of {total}"
        finally:
            bar.close()
            for part in modules.values():
                part.eval()
            if tracker is not None:
                tracker.flush()
        save(state.copy(), done=status == "done")
        last = state.step
        if status == "done" and state.best is not None:
            state.put_back_best()
            last = state.best["step"]
            message = (
                f"{state.step} of {total} steps; the weights after step {last}, the best validation, were put back"
            )
    if status == "diverged":
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return FitResult(
        model,
        guide,
        state.history,
        last,
        status,
        message,
        time.monotonic() - started,
        target,
        path,
        state.validations,
        None if state.average is None else state.average["modules"],
    )


def _name(part: Any) -> str:
    return getattr(part, "__qualname__", type(part).__qualname__)


def _track(tracker: Tracker | None, group: str, metrics: Mapping[str, float], step: int) -> None:
    if tracker is not None:
        tracker.log({f"{group}/{name}": value for name, value in metrics.items()}, step)


def _resume(state: FitState, path: Path, settings: dict[str, Any]) -> None:
    try:
        state.load(load_checkpoint(path, expected_config=settings))
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).strip().split("\n")[-1].strip()
        raise CheckpointError(f"{path} does not fit this pair: {reason}; pass resume=False to start anew") from error


def _create_parameters(objective: nn.Module, modules: dict[str, nn.Module], views: list[Any]) -> dict[str, Tensor]:
    """Call once, so that lazy parameters exist; give those that live in Pyro's store, by name.

    In eval mode: batch-norm statistics stay as they are.
    """
    for module in modules.values():
        module.eval()
    with poutine.trace(param_only=True) as capture:
        objective(*views)
    own = {id(parameter) for parameter in objective.parameters()}
    extra = {}
    for name, site in capture.trace.nodes.items():
        value: Any = site["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if isinstance(leaf, Tensor) and leaf.is_leaf and id(leaf) not in own:
            own.add(id(leaf))
            extra[name] = leaf
    return extra
