"""The width that held-out pairs want, where the right one is known."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions
import pytest
import torch

from pyro_contrastive import diagnostics
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import HypersphericalUniform, ProjectedNormal, VonMisesFisher
from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.kernels import expected_log_ratio

DIM = 5
INF = math.inf


def exact(pair_concentration, size=1024, seed=0):
    world = SphereWorld(DIM, (4.0, 64.0), pair_concentration)
    batch = world.sample(size, seed=seed)
    return batch, [world.posterior(batch, view) for view in (1, 2)]


def bent(q, level, power):
    return VonMisesFisher(q.mean_direction, level * (q.concentration / 16) ** power)


@pytest.mark.parametrize(
    ("pair_concentration", "level", "power"), [(INF, 16.0, 1.0), (INF, 144.0, 0.5), (20.0, 64.0, 0.7)]
)
def test_the_right_width_is_found(pair_concentration, level, power):
    """4 standard errors on either figure: a false alarm in 8,000 seeds, were the errors normal and known."""
    _, laws = exact(pair_concentration, 1024)
    wrong = [bent(q, level, power) for q in laws]
    found = diagnostics.calibrate_width(*wrong, pair_concentration, batch_size=64)
    # level' = 16 (kappa / level)^(1 / power), read at the centre
    log_factor = -0.5 * (math.log(16) + math.log(found.centre / level) / power - math.log(found.centre))
    assert abs(math.log(found.factor) - log_factor) < 4 * found.factor_error
    assert abs(found.power - 1 / power) < 4 * found.power_error
    assert found.factor_error < 0.1 and found.power_error < 0.5 and not found.at_limit
    right = laws[0].concentration.double()
    error = (found.concentration(wrong[0].concentration) / right).log().abs().mean()
    assert error < 0.25  # from 2.2 of the second case


def test_evidence_is_that_of_the_calibrated_laws_and_largest_there():
    _, laws = exact(INF, 512)
    wrong = [bent(q, 100.0, 1.0) for q in laws]
    found = diagnostics.calibrate_width(*wrong, INF, batch_size=128, stretch=False)

    def evidence(factor):
        parts = [VonMisesFisher(q.mean_direction.double(), q.concentration.double() / factor**2) for q in wrong]
        grids = []
        for start in range(0, 512, 128):
            rows = [VonMisesFisher(q.mean_direction[start:][:128], q.concentration[start:][:128]) for q in parts]
            grids.append(infonce_log_ratio(expected_log_ratio(*rows, INF), symmetric=True).mean().item())
        return np.mean(grids)

    np.testing.assert_allclose(found.evidence, [evidence(1.0), evidence(found.factor)], rtol=1e-6)
    assert all(found.evidence[1] > evidence(found.factor * other) for other in (0.9, 1.1))
    assert (found.power, found.power_error) == (1.0, 0.0)
    assert found.num_pairs == 512 and found.gain_error > 0


def test_calibrated_projected_normals_cover_the_truth():
    """Shares of 1,024 latents inside caps: 4 standard errors."""
    _, laws = exact(INF, 512, seed=1)
    truth, tested = exact(INF, 1024, seed=2)
    narrow = [
        ProjectedNormal(q.mean_direction, 0.3 * q.concentration.rsqrt().unsqueeze(-1)) for q in (*laws, tested[0])
    ]
    found = diagnostics.calibrate_width(*narrow[:2], INF, batch_size=64)
    before = diagnostics.coverage(diagnostics.cap_pit(narrow[2], truth.z1))
    after = diagnostics.coverage(diagnostics.cap_pit(found.posterior(narrow[2]), truth.z1))
    assert (before.upper < before.levels).all()
    assert (abs(after.empirical - after.levels) < 4 * np.sqrt(after.levels * (1 - after.levels) / 1024)).all()
    assert "too narrow" in found.summary() and "to the power" in found.summary()


def test_a_right_width_is_called_right():
    _, laws = exact(INF, 512)
    found = diagnostics.calibrate_width(*laws, batch_size=64, stretch=False)
    assert abs(math.log(found.factor)) < 4 * found.factor_error
    wide = [bent(q, 2.0, 1.0) for q in laws]
    assert "too wide" in diagnostics.calibrate_width(*wide, batch_size=64, stretch=False).summary()


def test_directions_that_no_width_explains():
    _, laws = exact(20.0, 512)
    same = [laws[0], VonMisesFisher(laws[0].mean_direction, laws[1].concentration)]
    found = diagnostics.calibrate_width(*same, 20.0, batch_size=64, stretch=False)
    assert found.at_limit and found.factor < 1
    assert "No factor within" in found.summary()


def test_random_state_is_left_alone():
    _, laws = exact(INF, 256)
    narrow = [ProjectedNormal(q.mean_direction, q.concentration.rsqrt().unsqueeze(-1)) for q in laws]
    state = torch.get_rng_state()
    one, two = (diagnostics.calibrate_width(*narrow, batch_size=128, stretch=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.factor == two.factor


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda q: q, {"pair_concentration": 0.0}, "`pair_concentration` must be > 0"),
        (lambda q: q, {"batch_size": 200}, "two batches"),
        (lambda q: q, {"batch_size": 1}, "two batches"),
        (lambda q: VonMisesFisher(q.mean_direction[:9], q.concentration[:9]), {}, "one batch shape"),
        (lambda q: pyro.distributions.Delta(q.mean_direction, event_dim=1), {}, "must have a width"),
        (lambda q: VonMisesFisher(q.mean_direction, 0 * q.concentration), {}, "must have a width"),
        (lambda q: HypersphericalUniform(DIM), {}, "one batch shape"),
    ],
)
def test_bad_input(change, options, message):
    _, laws = exact(INF, 256)
    with pytest.raises(ValueError, match=message):
        diagnostics.calibrate_width(laws[0], change(laws[1]), **{"batch_size": 64, **options})
