"""Opinions on how a pair was trained: whether it had settled, and whether its batches were large enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pyro_contrastive.diagnostics._arrays import FloatArray
from pyro_contrastive.diagnostics.checks import Check, grade, percent

__all__ = ["judge_batch", "judge_training"]

_ROWS = 16  # rows of a history below which its end cannot be told from its noise


def judge_training(history: Mapping[str, Sequence[float | None]]) -> Check:
    """Opinion on the loss curve: finite, falling, and flat at its end.

    The last quarter of the curve is cut in two. Where its second half is lower than the first by more than three
    standard errors, training had not settled: warns from 2 % of the whole fall on, fails from 10 % (a straight line
    has 12.5 %). The same distance upwards, from 10 % on, warns of a loss that rose again. A loss that did not fall by
    three standard errors at all, or one that is not finite, fails. A learning rate that ends at zero makes every
    curve flat at its end, so a pass says little after a cosine schedule.

    Args:
        history: Columns by name, "loss" among them, as `fit` returns it; None and NaN are values that were not finite.

    Returns:
        The check; "skip" without a loss or below 16 rows.

    Example:
        >>> judge_training({"loss": list(np.linspace(5.0, 1.0, 50))}).status
        'fail'
    """
    name = "Training"
    column = history.get("loss")
    if column is None:
        return Check(name, "skip", "no loss", "The history has no column `loss`.")
    loss = np.array([np.nan if value is None else value for value in column], dtype=np.float64)
    bad = int((~np.isfinite(loss)).sum())
    if bad:
        text = "The loss was not finite: the parameters may be those of before, or useless."
        return Check(name, "fail", f"{bad} of {len(loss)} rows not finite", text,
                     "A smaller `lr`, `clip_norm=1.0`, or a larger assumed concentration of the pairs.")  # fmt: skip
    if len(loss) < _ROWS:
        text = f"{len(loss)} rows do not show whether the loss has settled ({_ROWS} do); log more often."
        return Check(name, "skip", f"{len(loss)} rows", text)
    last = loss[len(loss) - len(loss) // 4 :]
    first_half, second_half = np.array_split(last, 2)
    noise = math.hypot(_standard_error(first_half), _standard_error(second_half))
    end = float(second_half.mean())
    total = float(loss[0] - end)
    fall = float(first_half.mean() - end)
    value = f"loss from {loss[0]:.3g} to {end:.3g}"
    if total <= 3 * noise:
        text = "The loss has not fallen: nothing was learned, or the start was not recorded."
        remedy = "A larger `lr`, more steps; check that row i of both views shows one thing."
        return Check(name, "fail", value, text, remedy)
    value += f"; over the last eighth {percent(fall / total)} of the fall"
    status, _ = grade(fall / total, 0.02, 0.1, significant=fall > 3 * noise)
    if status in ("fail", "warn"):
        return Check(name, status, value, "The loss was still falling when training ended.",
                     "More steps (two to four times as many).")  # fmt: skip
    if -fall > 3 * noise and -fall >= 0.1 * total:
        return Check(name, "warn", value, "The loss rose again at the end.", "A smaller `lr`, `clip_norm=1.0`.")
    return Check(name, "pass", value, "The loss fell and has settled.")


def _standard_error(values: FloatArray) -> float:
    """Standard error of the mean, about a line through the values, so that a trend is not taken for noise."""
    if len(values) < 3:
        return float(np.ptp(values))
    x = np.arange(len(values))
    residual = values - np.polyval(np.polyfit(x, values, 1), x)
    return float(np.sqrt(np.sum(residual**2) / (len(values) - 2) / len(values)))


def judge_batch(batch_size: int, dim: int, nats: float | None = None) -> Check:
    """Opinion on the batch size, against the dimension and against what a pair tells.

    N views span at most N dimensions: warns below 2 d, fails at d or less. A softmax over N candidates can show at most
    log N nats about a pair: warns where less than one nat is left between that and what the pairs tell, since the
    widths of the surest items are then hardly determined.

    Args:
        batch_size: Pairs per training batch, >= 2.
        dim: Dimension d of the latents.
        nats: What held-out pairs tell, in nats per pair, where known.

    Returns:
        The check.

    Raises:
        ValueError: If `batch_size` < 2.

    Example:
        >>> judge_batch(256, 10, nats=2.0).status, judge_batch(16, 32).status
        ('pass', 'fail')
    """
    if batch_size < 2:
        raise ValueError(f"`batch_size` must be >= 2, got {batch_size!r}; a contrast needs another item")
    room = math.inf if nats is None else math.log(batch_size) - nats
    value = f"{batch_size} pairs, {dim} dimensions"
    value += "" if nats is None else f", {nats:.1f} of log N = {math.log(batch_size):.1f} nats per pair"
    spans, _ = grade(dim / batch_size, 0.5, 1.0)
    if spans in ("warn", "fail"):
        text = "A batch this small does not fill the sphere, so the softmax says little about directions."
        return Check("Batch size", spans, value, text, f"Widen the batch to {4 * dim} pairs or more; a smaller `dim`.")
    if room < 1.0:
        wanted = math.ceil(math.exp((nats or 0.0) + 1.0))
        text = "The pairs are nearly always told apart: the batch is too easy to determine the widths of the surest."
        return Check("Batch size", "warn", value, text, f"Widen the batch to {wanted:,} pairs or more.")
    return Check("Batch size", "pass", value, "Large enough for the dimension and for what the pairs tell.")
