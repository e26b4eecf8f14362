r"""Posterior predictive of the partner: given a view, which of C candidates is its other view?

A contrastive model does predict something that is observed: the index of the partner. On pairs that were *not* used to
fit it, the probabilities it states can be scored (log score, Brier), counted (accuracy) and checked (reliability), for
any method that gives logits.

The candidates of a row are the second views of its own block. Rows of one block share them and are not independent;
blocks of disjoint pairs are. Every standard error here is over blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, derived_seed
from pyro_contrastive.diagnostics._intervals import mean_and_error, wilson_interval
from pyro_contrastive.diagnostics._run import evaluation

__all__ = ["PartnerCheck", "Reliability", "partner_check"]


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often the candidate called likeliest is the partner, against the probability stated for it, in equal bins.

    Attributes:
        edges: Ends of the bins of the stated probability, shape (K + 1,), from 0 to 1.
        predicted: Mean stated probability per bin, shape (K,); NaN in an empty bin.
        observed: Share of rows in the bin that were right, shape (K,); below `predicted`: over-confident.
        lower: Lower ends of the 95 % Wilson intervals of `observed`, shape (K,).
        upper: Upper ends. They take the rows of a bin as independent, which rows of one block are only nearly.
        counts: Rows per bin, shape (K,).
        ece: Expected calibration error in [0, 1]: mean distance of `observed` from `predicted` by `counts`.
        ece_se: Its standard error over blocks; NaN for one block.
        ece_if_calibrated: What `ece` comes to by chance at these counts where every stated probability is right. It is
            never 0: only the excess over it is miscalibration.
    """

    edges: FloatArray
    predicted: FloatArray
    observed: FloatArray
    lower: FloatArray
    upper: FloatArray
    counts: NDArray[np.int64]
    ece: float
    ece_se: float
    ece_if_calibrated: float


@dataclass(frozen=True, eq=False)
class PartnerCheck:
    """What `partner_check` found on B blocks of C pairs; every `_se` is a standard error over blocks, NaN for B = 1.

    Attributes:
        log_score: Mean log probability of the true partner, in nats, from minus infinity to 0; higher is better and
            guessing gives -log C.
        log_score_se: Its standard error.
        brier: Mean squared distance of the stated probabilities from the truth, summed over candidates, 0 to 2; lower
            is better.
        brier_se: Its standard error.
        accuracy: Share of rows whose likeliest candidate is the partner; a tie counts by its share.
        accuracy_se: Its standard error.
        top5_accuracy: Share of rows whose partner is among the five likeliest.
        top5_accuracy_se: Its standard error.
        overconfidence: The log score that the stated probabilities expect of themselves (minus their mean entropy)
            minus `log_score`, in nats: 0 if they are right, > 0 over-confident, < 0 under-confident.
        overconfidence_se: Its standard error; `overconfidence / overconfidence_se` is a z-score.
        reliability: The reliability curve of the likeliest candidate, with the expected calibration error.
        pair_log_score: Log probability of the partner by block and row, shape (B, C).
        pairs: Which pair each row is, shape (B, C).
        fingerprint: Of the pairs and their blocks; `compare` asks for equal ones.
    """

    log_score: float
    log_score_se: float
    brier: float
    brier_se: float
    accuracy: float
    accuracy_se: float
    top5_accuracy: float
    top5_accuracy_se: float
    overconfidence: float
    overconfidence_se: float
    reliability: Reliability
    pair_log_score: FloatArray
    pairs: NDArray[np.int64]
    fingerprint: str

    @property
    def num_blocks(self) -> int:
        """B, the number of independent blocks."""
        return len(self.pairs)

    @property
    def num_candidates(self) -> int:
        """C, the number of candidates per row, the partner included."""
        return self.pairs.shape[1]


def partner_check(
    model_or_logits: Any,
    guide: Callable[..., Any] | None = None,
    views: Sequence[torch.Tensor] | None = None,
    *,
    num_candidates: int = 100,
    seed: int = 0,
    num_bins: int = 10,
    ids: ArrayLike | None = None,
) -> PartnerCheck:
    """Scores what a method says about which candidate is the partner of a view, on held-out pairs.

    The pairs are dealt into blocks of `num_candidates` at random; row i of a block asks for the partner of its first
    view among the second views of the block. What does not fill a block is left out. Give pairs that were not used in
    fitting: on training pairs the figures say nothing about new ones.

    Args:
        model_or_logits: A model with `partner_logits(x1, x2)`; or any function of the views that gives logits (C, C),
            up to one constant per row, row i's partner in column i; or the logits of all N pairs, (N, N). Logits may be
            infinite.
        guide: Guide of the model, put into eval mode together with it; None if there is none.
        views: First and second views, each (N, ...), on the device of the model. For logits (N, N) they are only part
            of the fingerprint.
        num_candidates: C, the candidates per row, 2..N. Scores of different C are different questions. The more blocks,
            the better the standard errors: 20 or more.
        seed: Seed of the blocks and of a sampled evidence; methods to be compared need the same one.
        num_bins: Bins of the reliability curve, >= 1.
        ids: Names of the pairs, (N,), numbers or strings: the fingerprint is then about them and not about the values
            of the views, so that methods which prepare the views differently can be compared.

    Returns:
        Scores, curve and standard errors.

    Raises:
        TypeError: If `model_or_logits` gives no logits or `views` is no pair of tensors.
        ValueError: If a shape does not fit, a logit is NaN, a row rules out all candidates, or an option is out of
            range.

    Example:
        >>> logits = 3.0 * np.eye(12)
        >>> check = partner_check(logits, num_candidates=4)
        >>> check.num_blocks, round(check.log_score, 4), round(float(-np.log1p(3 * np.exp(-3.0))), 4)
        (3, -0.1392, -0.1392)
    """
    ready = not callable(model_or_logits) and not hasattr(model_or_logits, "partner_logits")
    views = _checked_views(views)
    logits = as_array(model_or_logits) if ready else None
    if logits is not None:
        if logits.ndim != 2 or logits.shape[0] != logits.shape[1] or logits.dtype.kind not in "fiu":
            raise TypeError(
                "`model_or_logits` must be a model with partner_logits(*views), a function of the views or logits "
                f"(N, N) of all pairs, got {type(model_or_logits).__name__} of shape {logits.shape}"
            )
        if views and len(views[0]) != len(logits):
            raise ValueError(f"`views` must be as many as the logits' rows, {len(logits)}, got {len(views[0])}")
    elif not views:
        raise ValueError("`views` must be given where logits are to be computed: partner_check(model, guide, (x1, x2))")
    num_pairs = len(views[0]) if logits is None else len(logits)
    if not isinstance(num_candidates, int | np.integer) or not 2 <= num_candidates <= num_pairs:
        raise ValueError(
            f"`num_candidates` must be an integer in 2..{num_pairs}, the number of pairs, got {num_candidates!r}"
        )
    if not isinstance(num_bins, int | np.integer) or num_bins < 1:
        raise ValueError(f"`num_bins` must be an integer >= 1, got {num_bins!r}")
    names = None if ids is None else as_array(ids)
    if names is not None and names.shape != (num_pairs,):
        raise ValueError(f"`ids` must name each of the {num_pairs} pairs, got shape {names.shape}")
    num_blocks = num_pairs // num_candidates
    order = np.random.default_rng(derived_seed(seed, "candidate blocks")).permutation(num_pairs)
    pairs = order[: num_blocks * num_candidates].reshape(num_blocks, num_candidates)
    if logits is None:
        blocks = _evaluated(model_or_logits, guide, views, pairs, seed)
    else:
        blocks = (logits[np.ix_(block, block)] for block in pairs)
    rows = np.stack([_row_scores(block) for block in blocks])  # (B, quantities, C)
    log_p, brier, hit, hit5, entropy, confidence = rows.transpose(1, 0, 2)
    log_score, brier_score, accuracy, accuracy5, excess = (
        mean_and_error(value.mean(axis=1)) for value in (log_p, brier, hit, hit5, -entropy - log_p)
    )
    return PartnerCheck(
        *log_score,
        *brier_score,
        *accuracy,
        *accuracy5,
        *excess,
        reliability=_reliability(confidence, hit, num_bins),
        pair_log_score=log_p,
        pairs=pairs,
        fingerprint=_fingerprint(pairs, views, names),
    )


def _evaluated(
    model: Any, guide: Any, views: Sequence[torch.Tensor], pairs: NDArray[np.int64], seed: int
) -> Iterator[NDArray[Any]]:
    """Logits of one block after the other, by the model in eval mode and with its own random stream."""
    logits_of = getattr(model, "partner_logits", model)
    programs = [program for program in (model, guide) if program is not None]
    with evaluation(*programs, seed=seed):
        for block in pairs:
            found = logits_of(*(view[torch.from_numpy(block).to(view.device)] for view in views))
            if not isinstance(found, torch.Tensor | np.ndarray):
                raise TypeError(
                    f"`model_or_logits` must give logits, got {type(found).__name__} from {type(model).__name__}; pass "
                    "a model with partner_logits(*views), or a function of the views that returns (C, C) logits"
                )
            yield as_array(found)


def _row_scores(logits: NDArray[Any]) -> FloatArray:
    """Scores of the rows of one block: log p, Brier, hit, hit among five, entropy, largest p; shape (6, C)."""
    scores, size = logits.astype(np.float64), len(logits)
    if scores.shape != (size, size):
        raise ValueError(f"logits must be one row of candidates per view, (C, C), got {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"logits must not be NaN, got {int(np.isnan(scores).sum())} of {scores.size}")
    largest = scores.max(axis=1, keepdims=True)
    if np.isneginf(largest).any():
        raise ValueError("a row of logits must leave at least one candidate possible, got -inf for all of them")
    certain = np.where(np.isposinf(scores), 0.0, -np.inf)  # the limit of a softmax with infinite entries
    scores = np.where(np.isposinf(largest), certain, scores)
    log_p = special.log_softmax(scores, axis=1)
    p, own = np.exp(log_p), np.diagonal(log_p)
    better, tied = (test(scores, np.diagonal(scores)[:, None]).sum(axis=1) for test in (np.greater, np.equal))
    hits = [np.clip((top - better) / tied, 0.0, 1.0) for top in (1, 5)]
    brier = (p**2).sum(axis=1) - 2.0 * np.exp(own) + 1.0
    return np.stack([own, brier, *hits, special.entr(p).sum(axis=1), p.max(axis=1)])


def _reliability(confidence: FloatArray, hit: FloatArray, num_bins: int) -> Reliability:
    """The curve from stated probabilities and hits by block and row, (B, C)."""
    num_blocks, size = confidence.shape
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    place = np.clip(np.searchsorted(edges, confidence) - 1, 0, num_bins - 1)
    cell = (place + num_bins * np.arange(num_blocks)[:, None]).ravel()

    def by_block(values: FloatArray) -> FloatArray:
        sums = np.bincount(cell, values.ravel(), num_blocks * num_bins).astype(np.float64)
        return sums.reshape(num_blocks, num_bins)

    counts = by_block(np.ones_like(hit)).sum(axis=0)
    gap = by_block(hit - confidence)
    with np.errstate(invalid="ignore"):
        observed, predicted = (by_block(values).sum(axis=0) / counts for values in (hit, confidence))
    lower, upper = wilson_interval(observed, counts)
    ece, error = mean_and_error((np.sign(gap.sum(axis=0)) * gap).sum(axis=1) / size)  # linear in the blocks
    variance = by_block(confidence * (1.0 - confidence)).sum(axis=0)
    chance = float(np.sqrt(2.0 / np.pi * variance).sum() / confidence.size)  # E|x| of a normal x
    return Reliability(edges, predicted, observed, lower, upper, counts.astype(np.int64), ece, error, chance)


def _fingerprint(pairs: NDArray[np.int64], views: Sequence[torch.Tensor], names: NDArray[Any] | None) -> str:
    digest = hashlib.sha256(repr(pairs.shape).encode() + pairs.astype("<i8").tobytes())
    for kind, values in [("ids", [names])] if names is not None else [("views", [as_array(view) for view in views])]:
        for array in values:
            digest.update(f"{kind} {array.dtype} {array.shape}".encode())
            digest.update(repr(array.tolist()).encode() if array.dtype.kind in "OUS" else array.tobytes())
    return digest.hexdigest()


def _checked_views(views: Sequence[torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
    if views is None:
        return ()
    if isinstance(views, torch.Tensor) or not all(isinstance(view, torch.Tensor) and view.ndim for view in views):
        raise TypeError("`views` must be a pair of tensors (x1, x2) with the items in the leading dimension")
    if len(views) < 2 or len({len(view) for view in views}) != 1:
        raise ValueError(f"`views` must be two or more of one length, got shapes {[tuple(v.shape) for v in views]}")
    return tuple(views)
