"""Variational simulation-based calibration: is the centre of a posterior right, whatever its width?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pyro_contrastive.diagnostics._arrays import FloatArray
from pyro_contrastive.diagnostics.quantities import Quantities, coordinates
from pyro_contrastive.diagnostics.sbc import adjusted_pvalues, sbc, simulated

__all__ = ["VSBC", "asymmetry_pvalue", "variational_sbc"]


@dataclass(frozen=True, eq=False)
class VSBC:
    """Where the truth falls in the marginals of the posterior, and whether it does so evenly; M simulations.

    Attributes:
        probabilities: By quantity, P(quantity of a draw < that of the truth), shape (M,), in (0, 1).
        statistics: By quantity, the Kolmogorov-Smirnov distance between the probabilities p and 1 - p.
        pvalues: By quantity, exact p-values of a symmetric distribution of p (`asymmetry_pvalue`), one test at a time.
        bias: By quantity, mean of p - 1/2, in [-1/2, 1/2]. Positive: truths are larger than the posterior says.
        num_draws: S, the draws behind each probability.
    """

    probabilities: dict[str, FloatArray]
    statistics: dict[str, float]
    pvalues: dict[str, float]
    bias: dict[str, float]
    num_draws: int

    @property
    def adjusted_pvalues(self) -> dict[str, float]:
        """p-values for all quantities together: the chance that any falls below .05 is at most .05 if all is well."""
        return adjusted_pvalues(self.pvalues)


def variational_sbc(
    posterior: Any,
    simulate: Any,
    *,
    num_simulations: int = 1000,
    num_draws: int = 999,
    quantities: Quantities | None = None,
    num_alignment: int = 0,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> VSBC:
    """Variational SBC: is the *centre* of an approximate posterior right, its width aside?

    A variational posterior is often too narrow, and ordinary SBC then rejects without saying whether its point estimate
    can be used. The variational diagnostic of Yao, Vehtari, Simpson & Gelman (2018, "Yes, but did it work?", algorithm
    2) asks less: the probabilities P(theta < theta_0 | y) need not be uniform, only symmetric about 1/2. Asymmetry
    means bias. Errors that are symmetric on average, over-confidence above all, are invisible to it: use `sbc` for
    these.

    The paper compares p with 1 - p by the two-sample Kolmogorov-Smirnov test, whose p-values take the two samples for
    independent; they are mirror images, and the test rejects about one in ten symmetric samples at the 5 % level. The
    distance here is the paper's; its p-value is exact (`asymmetry_pvalue`).

    Args:
        posterior: See `sbc`.
        simulate: See `sbc`.
        num_simulations: M >= 1.
        num_draws: S >= 1.
        quantities: Marginals by name; without, all coordinates. With many of them, read `adjusted_pvalues`.
        num_alignment: See `sbc`.
        seed: See `sbc`.
        batch_size: See `sbc`.
        progress: See `sbc`.

    Returns:
        Probabilities, distances, p-values and biases by quantity.

    Raises:
        TypeError: See `sbc`.
        ValueError: See `sbc`.
    """
    if quantities is None:
        quantities = coordinates(simulated(simulate, 1, seed)[1].shape[-1])
    done = sbc(
        posterior,
        simulate,
        num_simulations=num_simulations,
        num_draws=num_draws,
        quantities=quantities,
        num_alignment=num_alignment,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return VSBC(
        probabilities=done.pit,
        statistics={name: _asymmetry(p) / len(p) for name, p in done.pit.items()},
        pvalues={name: asymmetry_pvalue(p) for name, p in done.pit.items()},
        bias={name: float(p.mean() - 0.5) for name, p in done.pit.items()},
        num_draws=num_draws,
    )


def asymmetry_pvalue(probabilities: ArrayLike) -> float:
    r"""Exact p-value of a continuous distribution on [0, 1] being symmetric about 1/2.

    The statistic is the Kolmogorov-Smirnov distance D between the sample p and its mirror image 1 - p. Ordered by
    :math:`|p - 1/2|` from the largest on, the signs of p - 1/2 are fair coin tosses under symmetry and N D is the
    largest absolute value of their partial sums (Butler 1969), a simple random walk between two walls, whose law is a
    finite sum.

    Args:
        probabilities: Values in [0, 1], shape (N,), one per independent item.

    Returns:
        The p-value, in [0, 1].

    Raises:
        ValueError: If a value is out of range or there is none.

    Example:
        >>> round(asymmetry_pvalue([0.9, 0.7, 0.8]), 6)  # three heads or three tails
        0.25
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 1 or not len(p) or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"`probabilities` must be a non-empty vector of values in [0, 1], got shape {p.shape}")
    return _walk_pvalue(_asymmetry(p), len(p))


def _asymmetry(p: FloatArray) -> int:
    """N times the distance between p and 1 - p."""
    offset = p - 0.5
    order = np.argsort(-np.abs(offset), kind="stable")
    walk = np.cumsum(np.sign(offset[order]))
    last_of_ties = np.r_[np.diff(np.abs(offset[order])) != 0, True]
    return int(np.abs(walk[last_of_ties]).max())


def _walk_pvalue(reach: int, steps: int) -> float:
    """P(max |S_k| >= reach, k <= steps) of a simple random walk."""
    if reach <= 1:
        return 1.0  # the first step gets there
    # survival between absorbing walls at +-reach: eigenvalues cos(j pi / (2 reach)) of the walk, odd j only
    j = np.arange(1, 2 * reach, 2)
    angle = 0.5 * np.pi * j / reach
    stays = float(np.sum((-1.0) ** (j // 2) * np.cos(angle) ** steps / np.tan(0.5 * angle)) / reach)
    if stays < 0.999999:
        return min(1.0 - stays, 1.0)
    # in the far tail 1 - stays has no digits left, and crossing both walls adds nothing: reflection at one wall, twice
    toss = stats.binom(steps, 0.5)
    needed = (steps + reach + 1) // 2  # heads for an end at or above the wall
    above = (steps + reach) // 2  # heads, at most, for an end not above it
    return float(min(2 * (toss.sf(needed - 1) + toss.sf(above)), 1.0))
