"""Pareto k-hat of a guide: do importance weights from the guide to the model have a variance?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._program import Program
from pyro_contrastive.diagnostics._run import evaluation

__all__ = ["KHat", "guide_khat", "psis_khat"]

_FEWEST = 30  # draws: a tail of six, the fewest that both lines fit
_GOOD, _USABLE = 0.5, 0.7


@dataclass(frozen=True, eq=False)
class KHat:
    """Pareto k-hat per item.

    Attributes:
        khat: Shape (N,). Below .5 the weights have a finite variance and the guide is close; up to `threshold`
            estimates by smoothed weights can be relied on; above they cannot; above 1 not even the mean of the weights
            exists.
        threshold: min(1 - 1 / log10 S, .7), the largest reliable value for S draws (Vehtari et al. 2024,
            arXiv 1507.02646).
        items: Index of each item among the views, shape (N,).
        num_draws: S.
        conditional: Whether the rest of the batch was held fixed.
    """

    khat: FloatArray
    threshold: float
    items: NDArray[np.int64]
    num_draws: int
    conditional: bool

    @property
    def counts(self) -> dict[str, int]:
        """How many items are "good" (k < .5), "ok" (up to the threshold), "bad" (up to 1) and "very bad"."""
        edges = np.array([min(_GOOD, self.threshold), self.threshold, 1.0])
        kind = np.where(np.isnan(self.khat), 3, np.searchsorted(edges, self.khat, side="left"))
        return dict(zip(("good", "ok", "bad", "very bad"), np.bincount(kind, minlength=4).tolist(), strict=True))


def psis_khat(log_weights: ArrayLike | Tensor) -> FloatArray:
    """Shape of the generalised Pareto law that fits the upper tail of importance weights.

    ArviZ computes it, whose two lines expect opposite signs: `arviz.psislw` (0.x) the log weights, the accessor of 1.x
    minus them. Here it is the log weights on both, and a large value is bad on both.

    Args:
        log_weights: log p - log q of S >= 30 draws from q, up to a constant, shape (S,) or (S, N). Minus infinity is a
            weight of zero.

    Returns:
        k-hat, shape () or (N,). Minus infinity where the largest weights are all equal: no tail at all.

    Raises:
        ValueError: If there are fewer than 25 draws, a value is NaN or plus infinity, or all weights of an item are
            zero.

    Example:
        >>> uniform = np.random.default_rng(0).uniform(size=100_000)
        >>> bool(abs(psis_khat(-0.8 * np.log(uniform)) - 0.8) < 0.1)  # weights with a Pareto tail of exponent 1 / .8
        True
    """
    weights = as_array(log_weights).astype(np.float64)
    if weights.ndim not in (1, 2) or len(weights) < _FEWEST:
        raise ValueError(
            f"`log_weights` must be (S,) or (S, N) with S >= {_FEWEST} draws, or there is no tail to fit, "
            f"got {weights.shape}"
        )
    if np.isnan(weights).any() or np.isposinf(weights).any():
        raise ValueError(
            "`log_weights` must not hold NaN or plus infinity; do the guide's draws lie in its own support?"
        )
    columns = weights.reshape(len(weights), -1).T
    top = columns.max(axis=1, keepdims=True)
    if np.isneginf(top).any():
        raise ValueError("`log_weights` must hold a weight above zero for every item, got items with none")
    columns = columns - top
    # a tail of equal weights has no excess to fit: ArviZ 0.x calls it infinitely heavy, 1.x refuses
    tail = int(min(len(weights) / 5, 3 * len(weights) ** 0.5)) + 1
    cut = np.partition(columns, -tail, axis=1)[:, -tail]
    found = np.full(len(columns), -np.inf)
    heavy = np.exp(cut) < 1.0 - 1e-12
    if heavy.any():
        found[heavy] = _fit(columns[heavy])
    return found.reshape(weights.shape[1:])


def _fit(log_weights: FloatArray) -> FloatArray:
    """k-hat of each row, by the installed ArviZ."""
    import arviz

    with np.errstate(all="ignore"):  # weights of zero
        if int(arviz.__version__.split(".")[0]) < 1:
            return np.asarray(arviz.psislw(log_weights)[1], dtype=np.float64)
        import xarray

        array = xarray.DataArray(-log_weights, dims=("item", "draw"))
        return np.asarray(array.azstats.psislw(dim="draw")[1], dtype=np.float64)


def guide_khat(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    views: Sequence[Any],
    *,
    num_draws: int = 1000,
    rest: Literal["refuse", "condition"] = "refuse",
    items: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> KHat:
    r"""Pareto k-hat of the guide for each item, a diagnostic of variational inference (Yao et al. 2018, algorithm 1).

    The weights are :math:`p(z_i, x) / q(z_i \mid x)` of the latents of item i. That is a statement about one item only
    if the others do not enter its terms, which holds for a hierarchy given its global latents and for
    `recognition_factor` (the other *views* of the batch enter, but not their latents), and does not for
    `infonce_factor`, whose rows share all
    latents: there only the latents of the whole batch have a weight, and its k-hat says nothing but that the batch is
    large. Whether it holds is found out by exchanging the latents of half of the items.

    Args:
        model: Pyro program or module, called as `model(*views)`.
        guide: Pyro program or module with the same arguments.
        views: The arguments, tensors with the N items in the leading dimension.
        num_draws: S >= 30.
        rest: What to do where items are coupled: "refuse" with an error, or "condition": hold the latents of the others
            at one draw of the guide, whose own latents then are judged against :math:`p(z_i \mid z_{-i}, x)`. Costs one
            run of the model per draw *and item*.
        items: Which items to judge; all without.
        seed: Seed of the draws.
        progress: Whether to show a progress bar.

    Returns:
        k-hat per item, with the threshold for this number of draws.

    Raises:
        ValueError: If items are coupled and `rest` is "refuse", if a latent site has no one value per item, if the
            guide has no latents or not all of the model's, or a number is out of range.
    """
    if num_draws < _FEWEST:
        raise ValueError(f"`num_draws` must be >= {_FEWEST}, or there is no tail to fit, got {num_draws!r}")
    if rest not in ("refuse", "condition"):
        raise ValueError(f'`rest` must be "refuse" or "condition", got {rest!r}')
    n = len(views[0])
    chosen = np.arange(n) if items is None else np.atleast_1d(np.asarray(items, dtype=np.int64))
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= n:
        raise ValueError(f"`items` must be indices in 0..{n - 1}, at least one, got {chosen.tolist()}")
    with evaluation(model, guide, seed=seed):
        program = Program(model, guide, tuple(views), n)
        first = program.draw()
        coupled = n > 1 and program.coupled(first, program.draw())
        if coupled and rest == "refuse":
            raise ValueError(
                "the items of this model are coupled: the latents of one enter the likelihood of others (as in an "
                'InfoNCE factor), so that no item has a weight of its own. Use rest="condition" for k-hat given the '
                "latents of the other items, or judge the posterior by simulations (`sbc`)"
            )
        weights = np.empty((num_draws, len(chosen)))
        for s in tqdm(range(num_draws), "draws", disable=not progress):
            trace = program.draw()
            log_q = program.log_q(trace)
            if not coupled:
                weights[s] = (program.log_p(trace) - log_q)[chosen]
                continue
            for column, item in enumerate(chosen):
                mixed = program.exchanged(first, trace, np.arange(n) == item)
                weights[s, column] = program.log_p(mixed).sum() - log_q[item]
    threshold = min(1 - 1 / math.log10(num_draws), _USABLE)
    return KHat(psis_khat(weights), threshold, chosen, num_draws, coupled)
