"""The families of rotationally symmetric laws that the conformance tests run over, with their references."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_contrastive import distributions as dist
from tests import references as ref

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """A rotationally symmetric family, its construction and its independent references."""

    build: Callable[[Tensor, Tensor], dist.VonMisesFisher]  # (unit mean (*batch, d), strength (*batch,)) -> law
    log_density: Callable  # (dim, strength, cos) -> mpmath number
    angle: Callable  # (dim, strength) -> unnormalised log density of the angle
    strengths: tuple[float, ...]
    symmetric: bool = False  # no mean direction

    @functools.cache  # noqa: B019 (a handful of cases, alive as long as the module)
    def law(self, dim: int, strength: float) -> ref.AngleLaw:
        return ref.AngleLaw(dim, self.angle(dim, strength))

    def make(self, dim: int, strength: float, dtype: torch.dtype = F64, batch: tuple[int, ...] = ()):
        mean = unit(dim, dtype)
        return self.build(mean.expand(*batch, dim), torch.full(batch, strength, dtype=dtype))


def build_uniform(mean: Tensor, strength: Tensor):
    return dist.HypersphericalUniform(mean.shape[-1], mean.shape[:-1], dtype=mean.dtype)


def build_projected_normal(mean: Tensor, strength: Tensor):
    return dist.ProjectedNormal(strength.sqrt().unsqueeze(-1) * mean, torch.ones_like(mean))


STRENGTHS = (0.0, 0.5, 10.5, 128.0, 1e6)
CASES = {
    "uniform": Case(build_uniform, ref.uniform_log_density, lambda d, k: ref.uniform_angle(k), (0.0,), symmetric=True),
    "von_mises_fisher": Case(
        dist.VonMisesFisher, ref.von_mises_fisher_log_density, lambda d, k: ref.von_mises_fisher_angle(k), STRENGTHS
    ),
    "power_spherical": Case(
        dist.PowerSpherical, ref.power_spherical_log_density, lambda d, k: ref.power_spherical_angle(k), STRENGTHS
    ),
    "projected_normal": Case(
        build_projected_normal, ref.isotropic_projected_normal_log_density, ref.projected_normal_angle, STRENGTHS
    ),
}
CONCENTRATED = {name: case for name, case in CASES.items() if not case.symmetric}


def unit(dim: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    vector = torch.randn(dim, dtype=F64, generator=torch.Generator().manual_seed(seed + 100 * dim))
    return (vector / vector.norm()).to(dtype)


def at_cosine(mean: Tensor, cos: Tensor) -> Tensor:
    """Points on one meridian with the given cosine to ``mean``."""
    tangent = unit(mean.shape[-1], mean.dtype, seed=1)
    tangent = tangent - (tangent @ mean) * mean
    tangent = tangent / tangent.norm()
    return cos[..., None] * mean + (1 - cos**2).clamp_min(0).sqrt()[..., None] * tangent


def angle_between(z: Tensor, mean: Tensor) -> np.ndarray:
    """Accurate for small angles, unlike acos."""
    return 2 * torch.atan2((z - mean).norm(dim=-1), (z + mean).norm(dim=-1)).numpy()


def over(cases: dict[str, Case], **strengths) -> list:
    return [pytest.param(case, k, id=f"{name}-{k:g}") for name, case in cases.items() for k in case.strengths]


by_name = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
by_concentrated = pytest.mark.parametrize("case", CONCENTRATED.values(), ids=CONCENTRATED)
by_strength = pytest.mark.parametrize(("case", "strength"), over(CASES))
