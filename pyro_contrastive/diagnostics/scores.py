"""Scores of posteriors against a known truth, and how sharp they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_contrastive import distributions as sphere
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, unit_vectors
from pyro_contrastive.diagnostics._draws import batched, checked_truth, draw_pieces
from pyro_contrastive.diagnostics._intervals import mean_and_error
from pyro_contrastive.diagnostics.calibration import Family, cap_radius, direction_and_concentration
from pyro_contrastive.ops.precision import matmul

__all__ = ["Score", "Sharpness", "energy_score", "log_score", "sharpness"]

_GROUP = 16  # draws whose mutual distances enter the energy score


@dataclass(frozen=True, eq=False)
class Score:
    """A score of each item, and its mean.

    Attributes:
        values: Shape (N,).
        mean: Their mean.
        standard_error: Of the mean over independent items; NaN for a single one. To compare two posteriors on the same
            items take the standard error of the *differences* of `values`, which is much smaller.
    """

    values: FloatArray
    mean: float
    standard_error: float


def _score(values: FloatArray) -> Score:
    return Score(values, *mean_and_error(values))


def log_score(posterior: Any, truth: ArrayLike | Tensor) -> Score:
    """Log density of each truth under its posterior; larger is better.

    Strictly proper: in the mean nothing beats the exact posterior, and what is missing to it is the Kullback-Leibler
    divergence in nats. One truth far out in a thin tail can dominate it; `energy_score` is bounded.

    Args:
        posterior: Distribution with batch shape (N,) and event shape (d,).
        truth: True latent points, shape (N, d), in the posterior's frame.

    Returns:
        Log densities with respect to surface area, in nats.

    Raises:
        ValueError: If shapes do not fit, or the posterior has no density (Delta).

    Example:
        >>> q = sphere.HypersphericalUniform(3)
        >>> round(log_score(q, torch.eye(3)).mean, 6) == round(-float(np.log(4 * np.pi)), 6)
        True
    """
    posterior = batched(posterior, len(as_array(truth)))
    points = checked_truth(posterior, truth)
    if _is_point(posterior):
        raise ValueError("`log_score` needs a posterior with a density, got Delta; use `energy_score`")
    with torch.no_grad():
        return _score(as_array(posterior.log_prob(points)).astype(np.float64))


def energy_score(
    draws: Any,
    truth: ArrayLike | Tensor,
    *,
    distance: Literal["chordal", "geodesic"] = "chordal",
    num_draws: int = 1000,
    seed: int = 0,
) -> Score:
    r"""Energy score :math:`E\,\delta(Z, z) - \tfrac12 E\,\delta(Z, Z')` of each truth z; smaller is better.

    Z and Z' are independent draws of the posterior (Gneiting & Raftery 2007, section 4.3). With the chord
    :math:`|z - z'|` it is strictly proper: only the exact posterior has the smallest expectation. The angle
    (``"geodesic"``, in radians) is of negative type as well, so the score is proper, but not strictly: it does not see
    what two laws differ by when that is the same at z and -z (Lyons 2020, arXiv 1905.02863).

    Both expectations are estimated without bias: the first from all draws, the second from all pairs within groups of
    16 draws, whose error is small beside that of the truth itself. Memory is that of one group of draws for all items.

    Args:
        draws: Posterior draws, unit vectors of shape (S, N, d), or a distribution with batch shape (N,) to draw from.
        truth: True latent points, shape (N, d), in the posterior's frame.
        distance: "chordal" or "geodesic".
        num_draws: S >= 2, where `draws` is a distribution.
        seed: Seed of the draws.

    Returns:
        The score of each item, at most 2 (chordal) or pi (geodesic).

    Raises:
        ValueError: If shapes do not fit, points are not on the sphere, or there are fewer than two draws.

    Example:
        >>> draws = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # two draws of one item
        >>> round(energy_score(draws, [[1.0, 0.0]]).mean, 6)  # sqrt(2) / 2 - sqrt(2) / 2
        0.0
    """
    if distance not in ("chordal", "geodesic"):
        raise ValueError(f'`distance` must be "chordal" or "geodesic", got {distance!r}')
    points = checked_truth(draws, truth)
    unit_vectors(points, "truth")
    far, drawn = torch.zeros(len(points), dtype=torch.float64, device=points.device), 0
    spread, pairs = torch.zeros_like(far), 0
    for z in draw_pieces(draws, num_draws, seed, at_least=_GROUP):
        if not drawn:
            unit_vectors(z[0], "draws")
        chord = torch.linalg.vector_norm(z - points.to(z), dim=-1)
        far += _distance(chord, distance).sum(0)
        drawn += len(z)
        for size, group in _groups(z):  # (N, groups, size, d)
            gram = matmul(group, group.mT)
            apart = _distance((2.0 - 2.0 * gram).clamp_(min=0.0).sqrt_(), distance)
            apart.diagonal(dim1=-2, dim2=-1).zero_()
            spread += apart.sum((1, 2, 3))
            pairs += group.shape[1] * size * (size - 1)
    if pairs == 0:
        raise ValueError(f"the energy score needs at least two draws per item, got {drawn}")
    return _score(as_array(far / drawn - 0.5 * spread / pairs))


def _groups(z: Tensor) -> list[tuple[int, Tensor]]:
    """Draws (s, N, d) in groups of sixteen and what is left over, items first."""
    whole = len(z) // _GROUP * _GROUP
    found = []
    if whole:
        found.append((_GROUP, z[:whole].unflatten(0, (-1, _GROUP)).permute(2, 0, 1, 3)))
    if len(z) - whole > 1:
        found.append((len(z) - whole, z[whole:].transpose(0, 1).unsqueeze(1)))
    return found


def _distance(chord: Tensor, distance: str) -> Tensor:
    return chord if distance == "chordal" else chord.mul_(0.5).clamp_(max=1.0).asin_().mul_(2.0)


@dataclass(frozen=True, eq=False)
class Sharpness:
    """How much the posteriors commit themselves, per item; every array has shape (N,).

    Attributes:
        cap_radius: Radius in radians of the cap around the mean direction that holds `level`.
        resultant_length: |E z| in [0, 1]: 0 says nothing about the direction, 1 is a point.
        entropy: In nats, with respect to surface area; minus infinity for a point.
        level: The level of the caps.
    """

    cap_radius: FloatArray
    resultant_length: FloatArray
    entropy: FloatArray
    level: float


def sharpness(posterior: Any, *, level: float = 0.95, num_draws: int = 1000, seed: int = 0) -> Sharpness:
    """Width of each posterior in three units.

    Sharpness is no merit by itself: it ranks posteriors that are calibrated (Gneiting, Balabdaoui & Raftery 2007).

    Args:
        posterior: Distribution with batch shape (N,) and event shape (d,). In closed form for von Mises-Fisher, power
            spherical and uniform laws; by draws for what another family does not offer.
        level: Of the caps, in (0, 1).
        num_draws: Draws per item where there is no closed form.
        seed: Seed of these draws.

    Returns:
        Radii, resultant lengths and entropies.

    Raises:
        ValueError: If `level` is out of range.

    Example:
        >>> wide = sharpness(sphere.HypersphericalUniform(10).expand((1,)), level=0.5)
        >>> round(float(wide.cap_radius[0]), 4), float(wide.resultant_length[0])
        (1.5708, 0.0)
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level!r}")
    posterior = batched(posterior, (tuple(posterior.batch_shape) or (1,))[0])
    n, dim = posterior.batch_shape[0], posterior.event_shape[0]
    if isinstance(posterior, sphere.HypersphericalUniform):
        radius = cap_radius(level, np.zeros(n), dim)
        return Sharpness(radius, np.zeros(n), as_array(posterior.entropy()).astype(np.float64), level)
    families: dict[type, Family] = {sphere.VonMisesFisher: "vmf", sphere.PowerSpherical: "power_spherical"}
    if type(posterior) in families:
        concentration = as_array(posterior.concentration)
        radius = cap_radius(level, concentration, dim, family=families[type(posterior)])
        length = as_array(posterior.mean_resultant_length).astype(np.float64)
        return Sharpness(radius, length, as_array(posterior.entropy()).astype(np.float64), level)
    mean, _ = direction_and_concentration(posterior, seed=seed)
    direction, angles, total = torch.from_numpy(mean), [], torch.zeros(n, dim, dtype=torch.float64)
    for z in draw_pieces(posterior, num_draws, seed):
        z = z.cpu().double()
        total += z.sum(0)
        angles.append(2.0 * torch.asin((0.5 * (z - direction).norm(dim=-1)).clamp(max=1.0)))
    length = as_array((total / num_draws).norm(dim=-1))
    return Sharpness(np.quantile(torch.cat(angles), level, axis=0), length, _entropy(posterior, num_draws, seed), level)


def _entropy(posterior: Any, num_draws: int, seed: int) -> FloatArray:
    if _is_point(posterior):
        return np.full(posterior.batch_shape, -np.inf)
    with torch.no_grad():
        try:
            return as_array(posterior.entropy()).astype(np.float64)
        except NotImplementedError:
            total = sum(posterior.log_prob(z).double().sum(0) for z in draw_pieces(posterior, num_draws, seed))
            return -as_array(total / num_draws)


def _is_point(posterior: Any) -> bool:
    return type(posterior).__name__ == "Delta"
