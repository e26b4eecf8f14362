"""Train any model/guide pair: progress with the parts of the loss, checkpoints, exact resume, a stop on NaN.

The loop is Pyro's own recipe for PyTorch, ``elbo = Trace_ELBO()(model, guide)`` and a torch optimiser; plain
``pyro.infer.SVI`` trains the same pairs.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_contrastive._fit_state import FactorRecorder, FitState
from pyro_contrastive.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from pyro_contrastive.modules import keep_parameters_local
from pyro_contrastive.ops.random import get_random_state, seed_generators, seeded, set_random_state

__all__ = ["FitResult", "fit", "pick_device"]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` gives back.

    Attributes:
        model: The model, on ``device``, in eval mode.
        guide: The guide, likewise.
        history: One list per column: ``step``, ``loss`` (nats per pair, mean since the row before), ``lr``, and the
            parts of the ELBO: one column per factor site of the model, and ``latents`` (everything else: priors minus
            entropies). The parts add up to minus the loss.
        step: Optimiser steps that the parameters have seen.
        status: ``"done"``; ``"diverged"`` (stopped on a non-finite number, last good state put back);
            ``"interrupted"`` (Ctrl-C).
        message: What happened, for a person.
        seconds: Wall time of this call.
        device: Where the modules are.
        checkpoint: The file that was written, or None without ``out``.
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


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Turn a name into a device.

    Args:
        device: ``"auto"`` (CUDA when there is one, else the CPU) or anything ``torch.device`` takes.

    Returns:
        The device.

    Raises:
        ValueError: If the name is unknown, or CUDA is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {str(device)!r}, but PyTorch sees no CUDA device; pass 'auto' or 'cpu'")
    return picked


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
    seed: int = 0,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    checkpoint_seconds: float = 60.0,
    config: Mapping[str, Any] | None = None,
    log_every: int | None = None,
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
            ``[0, 1)``, to the factor on the learning rate.
        clip_norm: Largest norm of the gradient, ``> 0``. None: no clipping.
        elbo: A fresh Pyro objective. Default: ``model.objective()`` of a model that has one of its own, else
            ``Trace_ELBO(max_plate_nesting=1)``.
        seed: Seed of everything random in the run but the data.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        out: Folder for ``checkpoint.pt``. None: no file is written.
        resume: Go on from the checkpoint in ``out`` when there is one. On one CPU the result is bit for bit that of an
            uninterrupted run if ``data`` gives the same batches again (PyTorch's global random state, which a
            ``DataLoader`` uses, is replayed).
        checkpoint_seconds: Least time between two checkpoints; the end of the run is always written.
        config: Numbers and strings of yours that identify the run; kept in the checkpoint, and a checkpoint with
            other values is refused.
        log_every: Steps per row of the history, ``>= 1``. Default: 50 rows, but at most 50 steps each.
        progress: Show a progress bar; a string is its label.

    Returns:
        The fitted pair with its history and how the run ended.

    Raises:
        ValueError: If an argument is out of its range, or ``data`` ends before ``steps``.
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
    total = _total_steps(data, epochs, steps)
    for name, value in (("lr", lr), ("clip_norm", 1.0 if clip_norm is None else clip_norm)):
        if not value > 0.0:
            raise ValueError(f"`{name}` must be > 0, got {value!r}")
    if log_every is None:
        log_every = max(1, min(50, total // 50))
    elif log_every < 1:
        raise ValueError(f"`log_every` must be >= 1 step, got {log_every!r}")
    if not callable(schedule) and schedule not in SCHEDULES:
        raise ValueError(f"`schedule` must be a function or one of {sorted(SCHEDULES)}, got {schedule!r}")
    factor = schedule if callable(schedule) else SCHEDULES[schedule]
    target = pick_device(device)
    path = None if out is None else Path(out) / "checkpoint.pt"
    if elbo is None:
        elbo = model.objective() if hasattr(model, "objective") else Trace_ELBO(max_plate_nesting=1)

    modules = {name: part for name, part in (("model", model), ("guide", guide)) if isinstance(part, nn.Module)}
    for part in modules.values():
        keep_parameters_local(part.to(target))
    objective = elbo(model, guide)

    with pyro.settings.context(module_local_params=True), seeded(seed, target):
        first, data = _peek(data)
        extra = _create_parameters(objective, modules, _views(first, num_views, target))
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
            **(config or {}),
        }
        seed_generators(seed, target)
        state = FitState(modules, extra, optim, target)
        if path is not None and resume and path.exists():
            try:
                state.load(load_checkpoint(path, expected_config=settings))
            except (KeyError, ValueError, RuntimeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                reason = str(error).strip().split("\n")[-1].strip()
                raise CheckpointError(
                    f"{path} does not fit this pair: {reason}; pass resume=False to start anew"
                ) from error

        def save(payload: dict[str, Any]) -> None:
            if path is not None:
                save_checkpoint(path, {**payload, "config": settings})

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
                batches = _stream(data, state)
                while state.step < total:
                    views = _views(next(batches), num_views, target)
                    for group, base in zip(optim.param_groups, base_lrs, strict=True):
                        group["lr"] = base * factor(state.step / total)
                    problem = None
                    try:
                        losses = _gradient_step(objective, elbo, optim, parameters, views, clip_norm)
                    except (ValueError, RuntimeError) as error:  # NaN parameters may be refused by a distribution
                        if state.is_finite():
                            raise
                        problem = f"{type(error).__name__} in step {state.step + 1}: {str(error).splitlines()[0]}"
                    else:
                        state.advance(losses)
                        bar.update()
                        if state.step % log_every and state.step < total:
                            continue
                        problem = state.find_problem()
                    if problem is not None:
                        status = "diverged"
                        state.load(good)
                        message = (
                            f"stopped: {problem}. The state after step {state.step} was put back; "
                            "try a smaller `lr`, `clip_norm=1.0`, or a larger assumed concentration of the pairs"
                        )
                        break
                    bar.set_postfix_str(state.log(optim.param_groups[0]["lr"]))
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
        save(state.copy())
    if status == "diverged":
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return FitResult(model, guide, state.history, state.step, status, message, time.monotonic() - started, target, path)


def _total_steps(data: Iterable[Any], epochs: int | None, steps: int | None) -> int:
    if (epochs is None) == (steps is None):
        raise ValueError(f"give exactly one of `epochs` and `steps`, got epochs={epochs!r}, steps={steps!r}")
    if steps is None:
        if not isinstance(data, Sized):
            raise ValueError(f"`epochs` needs data with a length, got {type(data).__name__}; pass `steps` instead")
        steps = (epochs or 0) * len(data)
    if steps < 1:
        raise ValueError(f"the number of optimiser steps must be >= 1, got {steps!r}")
    return steps


def _name(part: Any) -> str:
    return getattr(part, "__qualname__", type(part).__qualname__)


def _views(batch: Any, num_views: int | None, device: torch.device) -> list[Any]:
    entries = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if num_views is not None:
        if len(entries) < num_views:
            raise ValueError(f"a batch must have at least num_views={num_views} entries, got {len(entries)}")
        entries = entries[:num_views]
    return [entry.to(device, non_blocking=True) if isinstance(entry, Tensor) else entry for entry in entries]


def _peek(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Look at the first batch without losing it."""
    if hasattr(data, "seek"):
        data.seek(0, 0)
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError(
            "`data` gave no batch; is it an iterator that was used up, or a data set of no items?"
        ) from None
    one_shot = iterator is data and not hasattr(data, "seek")
    return first, chain([first], iterator) if one_shot else data


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


def _stream(data: Iterable[Any], state: FitState) -> Iterator[Any]:
    """Batches without end, from where ``state`` stands; a pass begun before is replayed with its random state."""
    while True:
        skip, now = state.batch, get_random_state(state.device)
        if skip:
            set_random_state(state.epoch_random_state, state.device)
        else:
            state.epoch_random_state = now
        if hasattr(getattr(data, "sampler", None), "set_epoch"):
            data.sampler.set_epoch(state.epoch)  # type: ignore[attr-defined]
        if hasattr(data, "seek"):
            data.seek(state.epoch, skip)
            iterator = iter(data)
        else:
            iterator = iter(data)
            for _ in range(skip):
                next(iterator, None)
        if skip:
            set_random_state(now, state.device)
        yield from iterator
        if state.batch == 0:
            raise ValueError(
                f"`data` gave nothing more after {state.step} steps; pass a loader that can be iterated again, "
                "or fewer `steps`"
            )
        state.epoch, state.batch = state.epoch + 1, 0


def _gradient_step(
    objective: nn.Module,
    elbo: Any,
    optim: torch.optim.Optimizer,
    parameters: list[Tensor],
    views: list[Any],
    clip_norm: float | None,
) -> dict[str, Tensor]:
    """One step; gives the loss and the factors in nats per pair, on the device."""
    optim.zero_grad(set_to_none=True)
    with FactorRecorder() as recorder:
        loss = objective(*views) / len(views[0])
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    optim.step()
    scale = 1.0 / (len(views[0]) * getattr(elbo, "num_particles", 1))
    factors = {name: value * scale for name, value in recorder.sums.items()}
    latents = -loss.detach() - sum(factors.values())
    return {"loss": loss.detach(), **factors, "latents": latents}
