r"""Calibration of posteriors on the sphere against a known truth.

Everything takes and returns arrays. The test quantity throughout is the angle to the posterior's mean direction: a
*credible cap* of level p is the set of points closer to the mean direction than the p-quantile of that angle, and the
probability integral transform (PIT) of a truth is the level of the cap that just reaches it. When the posterior is
right the PIT values are uniform on [0, 1] (Cook, Gelman & Rubin 2006; Talts et al. 2018, arXiv 1804.06788). Too many
large values: over-confident. Too many small ones: under-confident.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from pyro_contrastive import distributions as sphere
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, derived_seed, geodesic_angle, unit_vectors
from pyro_contrastive.ops import inverse_bessel_ratio

__all__ = [
    "Coverage",
    "cap_pit",
    "cap_probability",
    "cap_radius",
    "coverage",
    "direction_and_concentration",
    "rank_pit",
    "sbc_ranks",
    "uniformity_pvalue",
]

Family = Literal["vmf", "power_spherical"]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_CHUNK = 4096  # items whose quadrature nodes are held at once
_REACH = 12.0  # half width of the integration window in standard deviations; what is left out is below 1e-25


def cap_probability(
    angle: ArrayLike | torch.Tensor, concentration: ArrayLike | torch.Tensor, dim: int, *, family: Family = "vmf"
) -> FloatArray:
    r"""Mass of the cap of a given radius around the mean direction: P(angle(Z, mu) <= angle).

    For the von Mises-Fisher family the angle has density :math:`\propto \sin^{d-2}\theta\, e^{\kappa\cos\theta}`
    (Mardia & Jupp 2000, eq. 9.3.16), integrated by Gauss-Legendre quadrature on both sides of `angle`, so that neither
    tail is lost to cancellation. For the power spherical family :math:`(1+\cos\theta)/2` is
    Beta((d-1)/2 + kappa, (d-1)/2) (De Cao & Aziz 2020, arXiv 2006.04437), an incomplete beta function.

    Args:
        angle: Radii in radians, in [0, pi], any shape.
        concentration: Concentrations, >= 0, broadcast against `angle`; infinity is a point mass.
        dim: Dimension d >= 2 of the space around the sphere.
        family: "vmf" or "power_spherical".

    Returns:
        Probabilities, of the broadcast shape.

    Raises:
        ValueError: If an argument is out of range or `family` is unknown.

    Example:
        >>> round(float(cap_probability(np.pi / 2, 0.0, dim=10)), 12)  # a half sphere
        0.5
    """
    angle, concentration = _checked_cap(as_array(angle).astype(np.float64), concentration, dim, family)
    if np.any((angle < 0) | (angle > np.pi) | np.isnan(angle)):
        raise ValueError(f"`angle` must be in [0, pi] radians, got values from {angle.min():.4g} to {angle.max():.4g}")
    angle, concentration = np.broadcast_arrays(angle, concentration)
    if family == "power_spherical":
        half = 0.5 * (dim - 1)
        finite = np.where(np.isinf(concentration), 1.0, concentration)
        mass = special.betainc(half, half + finite, np.sin(0.5 * angle) ** 2)
        return np.where(np.isinf(concentration), 1.0, mass)
    flat_angle, flat_concentration = angle.reshape(-1), concentration.reshape(-1)
    mass = np.empty(flat_angle.shape)
    for start in range(0, len(mass), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        mass[chunk] = _vmf_cap_mass(flat_angle[chunk], flat_concentration[chunk], dim)
    return mass.reshape(angle.shape)


def _vmf_cap_mass(angle: FloatArray, concentration: FloatArray, dim: int) -> FloatArray:
    """Quadrature of the angle's density below and above `angle` on a window around its mode; both (N,)."""
    kappa = np.where(np.isinf(concentration), 1.0, concentration)
    power = dim - 2
    # mode of (d-2) log sin + kappa cos; the curvature there gives the width
    cosine = 2.0 * kappa / np.maximum(power + np.hypot(power, 2.0 * kappa), np.finfo(float).tiny)
    mode = np.arccos(np.clip(cosine, 0.0, 1.0))
    curvature = kappa * cosine + (power / np.maximum(np.sin(mode) ** 2, np.finfo(float).tiny) if power else 0.0)
    reach = _REACH / np.sqrt(np.maximum(curvature, 1e-4))
    low, high = np.maximum(mode - reach, 0.0), np.minimum(mode + reach, np.pi)
    split = np.clip(angle, low, high)
    peak = _log_angle_density(mode, kappa, power)

    def mass(left: FloatArray, right: FloatArray) -> FloatArray:
        half = 0.5 * (right - left)
        nodes = left[:, None] + half[:, None] * (1.0 + _NODES)
        return half * (np.exp(_log_angle_density(nodes, kappa[:, None], power) - peak[:, None]) @ _WEIGHTS)

    below, above = mass(low, split), mass(split, high)
    return np.where(np.isinf(concentration), 1.0, below / (below + above))


def _log_angle_density(angle: FloatArray, concentration: FloatArray, power: int) -> FloatArray:
    # kappa (cos - 1), written so that nothing cancels at large kappa and small angles
    return special.xlogy(power, np.sin(angle)) - 2.0 * concentration * np.sin(0.5 * angle) ** 2


def cap_radius(
    level: ArrayLike, concentration: ArrayLike | torch.Tensor, dim: int, *, family: Family = "vmf"
) -> FloatArray:
    """Radius in radians of the credible cap of a given level, the inverse of `cap_probability`.

    Args:
        level: Probabilities in [0, 1], any shape.
        concentration: Concentrations, >= 0, broadcast against `level`.
        dim: Dimension d >= 2 of the space around the sphere.
        family: "vmf" (bisection to 1e-12 relative) or "power_spherical" (closed form).

    Returns:
        Angles in [0, pi], of the broadcast shape.

    Raises:
        ValueError: If an argument is out of range or `family` is unknown.

    Example:
        >>> round(float(cap_radius(0.5, 0.0, dim=10)), 6)
        1.570796
    """
    level, concentration = _checked_cap(np.asarray(level, dtype=np.float64), concentration, dim, family)
    if not np.all((level >= 0) & (level <= 1)):
        raise ValueError(f"`level` must be in [0, 1], got values from {level.min():.4g} to {level.max():.4g}")
    level, concentration = np.broadcast_arrays(level, concentration)
    if family == "power_spherical":
        half = 0.5 * (dim - 1)
        finite = np.where(np.isinf(concentration), 1.0, concentration)
        radius = 2.0 * np.arcsin(np.sqrt(special.betaincinv(half, half + finite, level)))
        return np.where(np.isinf(concentration), 0.0, radius)
    low, high = np.zeros(level.shape), np.full(level.shape, np.pi)
    for _ in range(60):
        middle = 0.5 * (low + high)
        inside = cap_probability(middle, concentration, dim) < level
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        if np.all(high - low <= 1e-12 * high):
            break
    return np.where(np.isinf(concentration), 0.0, np.where(level == 1.0, np.pi, 0.5 * (low + high)))


def direction_and_concentration(
    posterior: Any, *, num_samples: int = 256, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    r"""Mean direction and a scalar concentration of any posterior on the sphere.

    Families that have both are asked for them. For the others the concentration is the von Mises-Fisher one of the same
    mean resultant length, :math:`A_d^{-1}(\rho)` (Mardia & Jupp 2000, eq. 10.3.9), from draws.

    Args:
        posterior: Distribution with batch shape (N,) and event shape (d,).
        num_samples: Draws per item where the family has no concentration.
        seed: Seed of those draws; the caller's random state is not touched.

    Returns:
        Unit vectors (N, d) and concentrations (N,), infinite for a Delta posterior; float64.
    """
    direction, concentration = getattr(posterior, "mean_direction", None), getattr(posterior, "concentration", None)
    if direction is None or concentration is None or concentration.shape != posterior.batch_shape:
        total = _draws(posterior, num_samples, seed).mean(axis=0)
        length = np.linalg.norm(total, axis=-1)
        direction = total / length[..., None] if direction is None else direction
        rho = torch.from_numpy(np.minimum(length, 1.0 - 1e-9))
        concentration = np.where(length > 1.0 - 1e-9, np.inf, as_array(inverse_bessel_ratio(total.shape[-1], rho)))
    return unit_vectors(direction, "mean_direction"), as_array(concentration).astype(np.float64)


def cap_pit(posterior: Any, truth: ArrayLike | torch.Tensor, *, num_samples: int = 1000, seed: int = 0) -> FloatArray:
    """PIT of each truth under its posterior: the level of the credible cap that just reaches it.

    Exact for `VonMisesFisher`, `PowerSpherical` and `HypersphericalUniform`; for any other family by the rank of the
    truth's angle among `num_samples` draws, as (rank + u) / (num_samples + 1).

    Args:
        posterior: Distribution with batch shape (N,) and event shape (d,).
        truth: True latent points, shape (N, d), in the posterior's frame (see `alignment.procrustes`).
        num_samples: Draws per item for families without a closed form.
        seed: Seed of those draws and of u.

    Returns:
        Values in [0, 1], shape (N,), uniform when the posterior is right.

    Raises:
        ValueError: If `truth` is not on the sphere or of another shape than the posterior.
    """
    truth = unit_vectors(truth, "truth")
    expected = (*posterior.batch_shape, *posterior.event_shape)
    if truth.shape != expected and not isinstance(posterior, sphere.HypersphericalUniform):
        raise ValueError(f"`truth` must have the posterior's shape {tuple(expected)}, got {truth.shape}")
    dim = truth.shape[-1]
    if isinstance(posterior, sphere.HypersphericalUniform):
        return cap_probability(geodesic_angle(truth, np.eye(dim)[0]), 0.0, dim)
    families: dict[type, Family] = {sphere.VonMisesFisher: "vmf", sphere.PowerSpherical: "power_spherical"}
    if type(posterior) in families:
        mean, concentration = direction_and_concentration(posterior)
        return cap_probability(geodesic_angle(truth, mean), concentration, dim, family=families[type(posterior)])
    draws = _draws(posterior, num_samples, seed)
    mean, _ = direction_and_concentration(posterior, seed=seed + 1)
    angles, own = geodesic_angle(draws, mean), geodesic_angle(truth, mean)
    ties = (angles == own).sum(axis=0)  # of a point posterior; broken at random
    ranks = sbc_ranks(angles, own) + np.random.default_rng([seed, 1]).integers(0, ties, endpoint=True)
    return rank_pit(ranks, num_samples, seed=seed)


def _draws(posterior: Any, num_samples: int, seed: int) -> FloatArray:
    """Unit vectors (num_samples, N, d) drawn without touching the caller's random state."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(derived_seed(seed, "posterior draws"))
        return unit_vectors(posterior.sample(torch.Size([num_samples])), "draws")


def sbc_ranks(draws_quantity: ArrayLike | torch.Tensor, truth_quantity: ArrayLike | torch.Tensor) -> NDArray[np.int64]:
    """Rank of each truth among posterior draws of the same scalar quantity (simulation-based calibration).

    Args:
        draws_quantity: Quantity of the draws, shape (S, N).
        truth_quantity: Quantity of the truths, shape (N,).

    Returns:
        Integers in 0..S, shape (N,): how many draws are smaller than the truth.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> sbc_ranks([[1.0], [3.0]], [2.0])
        array([1])
    """
    draws, truth = as_array(draws_quantity), as_array(truth_quantity)
    if draws.ndim != 2 or truth.shape != draws.shape[1:]:
        raise ValueError(f"`draws_quantity` must be (S, N) and `truth_quantity` (N,), got {draws.shape}, {truth.shape}")
    return (draws < truth).sum(axis=0)


def rank_pit(ranks: ArrayLike, num_draws: int, *, seed: int = 0) -> FloatArray:
    """Turns ranks in 0..S into PIT values (rank + u) / (S + 1) with u uniform, which are continuous and uniform.

    Args:
        ranks: Integers in 0..num_draws, shape (N,).
        num_draws: S, the number of draws behind each rank.
        seed: Seed of u.

    Returns:
        Values in (0, 1), shape (N,).

    Raises:
        ValueError: If a rank is out of range.
    """
    ranks = np.asarray(ranks)
    if np.any((ranks < 0) | (ranks > num_draws)):
        raise ValueError(f"`ranks` must be in 0..{num_draws}, got {ranks.min()}..{ranks.max()}; is `num_draws` right?")
    return (ranks + np.random.default_rng(seed).uniform(size=ranks.shape)) / (num_draws + 1)


def uniformity_pvalue(pit: ArrayLike) -> float:
    """p-value of the Kolmogorov-Smirnov test that PIT values are uniform on [0, 1].

    Args:
        pit: PIT values, shape (N,), one per independent item.

    Returns:
        The p-value. Small: miscalibrated. It falls with N for any fixed error; read the coverage for the size of it.
    """
    return float(stats.kstest(checked_pit(pit), "uniform").pvalue)


@dataclass(frozen=True)
class Coverage:
    """Share of truths inside the credible caps, per nominal level.

    Attributes:
        levels: Nominal levels, shape (L,).
        empirical: Shares found, shape (L,).
        lower: Lower ends of the 95 % Wilson intervals, shape (L,).
        upper: Upper ends of the 95 % Wilson intervals, shape (L,).
        num_items: Number of items behind the shares.
    """

    levels: FloatArray
    empirical: FloatArray
    lower: FloatArray
    upper: FloatArray
    num_items: int


def coverage(pit: ArrayLike, levels: ArrayLike = (0.5, 0.8, 0.95)) -> Coverage:
    """Share of truths that lie inside their credible caps, with binomial uncertainty.

    Args:
        pit: PIT values from `cap_pit`, shape (N,), one per independent item.
        levels: Nominal levels in (0, 1).

    Returns:
        The shares and their 95 % Wilson score intervals (Wilson 1927).

    Raises:
        ValueError: If PIT values or levels are out of range.

    Example:
        >>> coverage([0.1, 0.4, 0.6, 0.9], levels=[0.5]).empirical
        array([0.5])
    """
    pit, levels = checked_pit(pit), np.atleast_1d(np.asarray(levels, dtype=np.float64))
    if not np.all((levels > 0) & (levels < 1)):
        raise ValueError(f"`levels` must be in (0, 1), got {levels.tolist()}")
    inside = (pit[:, None] <= levels).sum(axis=0)
    intervals = [stats.binomtest(int(count), len(pit)).proportion_ci(method="wilson") for count in inside]
    lower, upper = (np.array([getattr(interval, end) for interval in intervals]) for end in ("low", "high"))
    return Coverage(levels, inside / len(pit), lower, upper, len(pit))


def checked_pit(pit: ArrayLike) -> FloatArray:
    pit = np.asarray(pit, dtype=np.float64)
    if pit.ndim != 1 or not len(pit) or not np.all((pit >= 0) & (pit <= 1)):
        raise ValueError(f"`pit` must be a non-empty vector of values in [0, 1], got shape {pit.shape}")
    return pit


def _checked_cap(
    values: FloatArray, concentration: ArrayLike | torch.Tensor, dim: int, family: str
) -> tuple[FloatArray, FloatArray]:
    if family not in ("vmf", "power_spherical"):
        raise ValueError(f'`family` must be "vmf" or "power_spherical", got {family!r}')
    if dim < 2:
        raise ValueError(f"`dim` must be >= 2, got {dim!r}")
    concentration = as_array(concentration).astype(np.float64)
    if not np.all(concentration >= 0):
        raise ValueError("`concentration` must be >= 0, got negative or NaN values")
    return values, concentration
