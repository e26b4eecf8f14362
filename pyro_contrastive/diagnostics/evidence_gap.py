"""How far the bound that was trained lies below the evidence: ELBO, K-sample bounds, what more samples add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from tqdm.auto import tqdm

from pyro_contrastive.diagnostics._arrays import FloatArray
from pyro_contrastive.diagnostics._intervals import mean_and_error
from pyro_contrastive.diagnostics._program import Program
from pyro_contrastive.diagnostics._run import evaluation
from pyro_contrastive.diagnostics.khat import psis_khat

__all__ = ["EvidenceGap", "evidence_gap"]

_ROUNDING = 1e-4  # nats: what a sum of log densities in float32 is off by


@dataclass(frozen=True, eq=False)
class EvidenceGap:
    """Bounds on the log evidence from one set of draws, in nats per item; see :func:`evidence_gap`.

    Attributes:
        num_samples: K of each bound, increasing from 1, shape (G,); the last is all draws.
        bound: K-sample bounds, shape (G,). The first is the ELBO, the last the estimate of the evidence.
        error: Standard errors of the bounds over items, shape (G,).
        gap: The last bound minus each, shape (G,): what a fit with this K does not see, from below.
        gap_error: Standard errors of the gaps over items, shape (G,).
        khat: Pareto k-hat of the weights of each item, shape (N,); see :func:`psis_khat`. Where many are above .7, the
            evidence is still higher than the last bound says. Minus infinity where all weights are equal.
    """

    num_samples: NDArray[np.int64]
    bound: FloatArray
    error: FloatArray
    gap: FloatArray
    gap_error: FloatArray
    khat: FloatArray

    @property
    def elbo(self) -> float:
        """The ELBO, nats per item."""
        return float(self.bound[0])

    @property
    def evidence(self) -> float:
        """The bound with all draws, nats per item."""
        return float(self.bound[-1])

    @property
    def unreliable(self) -> float:
        """Share of items whose k-hat is above .7, in [0, 1]: their evidence is not settled by these draws."""
        return float(np.mean(self.khat > 0.7))

    def summary(self) -> str:
        """What this means, in words.

        Returns:
            A few sentences.
        """
        rows = ", ".join(f"K = {k}: {b:.3f}" for k, b in zip(self.num_samples, self.bound, strict=True))
        text = (
            f"Nats per item, {rows}. The ELBO is {self.gap[0]:.3f} +- {self.gap_error[0]:.3f} below the evidence, as "
            f"far as {self.num_samples[-1]} samples tell"
        )
        if self.unreliable > 0.05:
            return f"{text}; for {self.unreliable:.0%} of the items (k-hat > .7) they do not: the gap is larger."
        return f"{text}, and they settle it for {1 - self.unreliable:.0%} of the items (k-hat <= .7)."


def evidence_gap(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    views: Sequence[Any],
    *,
    num_samples: int = 256,
    sizes: Sequence[int] = (1, 4, 16, 64),
    seed: int = 0,
    progress: bool = False,
) -> EvidenceGap:
    r"""ELBO, K-sample bounds and evidence of held-out views under a fitted pair.

    Each item has importance weights :math:`w_{is} = p(z_{is}, x_i) / q(z_{is} | x_i)`. The bound with K samples is the
    mean over groups of K draws of :math:`\log \frac1K \sum_k w_{ik}`; all grow with K towards the evidence, which the
    last one estimates. A guide that is tight (all weights of an item equal) has no gap. Likelihood ratios within the
    batch are relative to it: compare fits on batches of one size. Where rows are coupled by an InfoNCE factor the rows'
    weights are those of ``KSampleELBO``.

    Args:
        model: Pyro program or module, called as `model(*views)`.
        guide: Pyro program or module with the same arguments, whose latents have one value per item.
        views: The arguments, tensors with the N items in the leading dimension.
        num_samples: S >= 30 draws in all.
        sizes: Values of K to report, each in 1..S; 1 and S are added.
        seed: Seed of the draws.
        progress: Whether to show a progress bar.

    Returns:
        The bounds, their gaps to the last one, and k-hat per item.

    Raises:
        ValueError: For a number out of its range, or a guide without latents or with other ones than the model's.

    References:
        Burda, Grosse and Salakhutdinov 2016 (arXiv 1509.00519); Vehtari et al. 2024 (arXiv 1507.02646) for k-hat.

    Example:
        >>> import torch
        >>> from pyro_contrastive import guides, models
        >>> guide = guides.VonMisesFisher(torch.nn.Linear(6, 12), dim=3)
        >>> found = evidence_gap(models.RPM(guide), guide, torch.randn(2, 20, 6), num_samples=40, sizes=(1, 10))
        >>> found.num_samples
        array([ 1, 10, 40])
        >>> bool(found.elbo < found.evidence)
        True
    """
    if num_samples < 30:
        raise ValueError(f"`num_samples` must be >= 30, got {num_samples!r}; fewer say nothing about the evidence")
    grid = sorted({1, *sizes, num_samples})
    if grid[0] < 1 or grid[-1] > num_samples or any(k != int(k) for k in grid):
        raise ValueError(f"`sizes` must be integers in 1..{num_samples} (`num_samples`), got {list(sizes)!r}")
    n = len(views[0])
    weights = np.empty((num_samples, n))
    with evaluation(model, guide, seed=seed):
        program = Program(model, guide, tuple(views), n)
        for s in tqdm(range(num_samples), "draws", disable=not progress):
            trace = program.draw()
            weights[s] = program.log_p(trace) - program.log_q(trace)
    bounds = np.stack([_bound(weights, k) for k in grid])
    bound, error = np.array([mean_and_error(row) for row in bounds]).T
    gap, gap_error = np.array([mean_and_error(row) for row in bounds[-1] - bounds]).T
    # the tail of weights that are equal up to rounding would be that of the rounding
    khat = np.where(np.ptp(weights, axis=0) < _ROUNDING, -np.inf, psis_khat(weights))
    return EvidenceGap(np.array(grid), bound, error, gap, gap_error, khat)


def _bound(log_weights: FloatArray, k: int) -> FloatArray:
    """K-sample bound of each item, averaged over the whole groups of K draws."""
    groups = len(log_weights) // k
    grouped = log_weights[: groups * k].reshape(groups, k, -1)
    return np.asarray(logsumexp(grouped, axis=1) - np.log(k)).mean(0)
