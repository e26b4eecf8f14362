"""The profile along the flat direction: by an independent series, its flatness, its warnings."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from scipy import optimize, special

from pyro_contrastive import models
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.diagnostics import identifiability, plot_identifiability
from pyro_contrastive.distributions import PowerSpherical, VonMisesFisher
from pyro_contrastive.guides import VonMisesFisher as Guide


def fitted(world, pairs, seed=0):
    """Pairs, and the posteriors that a perfect fit would find."""
    batch = world.sample(pairs, seed=seed)
    return world.posterior(batch, 1), world.posterior(batch, 2)


def length(kappa):
    return 1 / math.tanh(kappa) - 1 / kappa if kappa < math.inf else 1.0  # A_3


def inverse_length(value):
    return optimize.brentq(lambda kappa: length(kappa) - value, 1e-3, 1e5)


def infonce(log_f):
    rows, columns = special.logsumexp(log_f, axis=1), special.logsumexp(log_f, axis=0)
    return np.diag(log_f) - 0.5 * (rows + columns) + math.log(len(log_f))


def series(mean1, kappa1, mean2, kappa2, kappa, terms=60):
    """Legendre series of the expected kernel at d = 3, from SciPy's Bessel functions."""
    n = np.arange(terms)

    def a(k):
        return np.ones((1, terms)) if k is math.inf else special.ive(n + 0.5, k[:, None]) / special.ive(0.5, k[:, None])

    pair = a(math.inf if kappa == math.inf else np.array([kappa]))[0]
    weights = (2 * n + 1) * pair * a(kappa1)[:, None] * a(kappa2)[None]
    return np.log((weights * special.eval_legendre(n, np.clip(mean1 @ mean2.T, -1, 1)[..., None])).sum(-1))


def test_profile_by_hand():
    q1, q2 = fitted(SphereWorld(3, (4.0, 16.0), 9.0, observed_dim=8), 48)
    result = identifiability(q1, q2, 9.0, grid=[6.0, 12.0, math.inf], batch_size=24)
    means = [q.mean_direction.double().numpy() for q in (q1, q2)]
    kappas = [q.concentration.double().numpy() for q in (q1, q2)]

    def evidence(k1, k2, kappa):
        parts = [slice(0, 24), slice(24, 48)]
        return np.concatenate([infonce(series(means[0][p], k1[p], means[1][p], k2[p], kappa)) for p in parts])

    for position, kappa in enumerate([6.0, 9.0, 12.0, math.inf]):
        factor = math.sqrt(length(9.0) / length(kappa))
        moved = [np.array([inverse_length(factor * length(k)) for k in one]) for one in kappas]
        reference = evidence(*kappas, 9.0)
        along, alone = evidence(*moved, kappa) - reference, evidence(*kappas, kappa) - reference
        assert result.compensated[position] == pytest.approx(along.mean(), abs=1e-6)
        assert result.compensated_error[position] == pytest.approx(along.std(ddof=1) / math.sqrt(48), abs=1e-6)
        assert result.alone[position] == pytest.approx(alone.mean(), abs=1e-6)
        assert result.level[position] == pytest.approx(np.sort(np.concatenate(moved))[47], rel=1e-4)
    assert result.fitted == 1 and result.compensated[1] == 0.0


@pytest.mark.parametrize("marginal", ["uniform", "empirical"])
def test_pairs_of_a_uniform_world_leave_the_level_open(marginal):
    result = identifiability(*fitted(SphereWorld(), 512), 20.0, grid=[15.0, 40.0, math.inf], marginal=marginal)
    assert np.abs(result.compensated).max() < 2e-3  # nats per pair, of 2: over a factor of two in the level
    assert result.level[0] > 2 * result.level[-1]
    assert result.alone[-1] < -0.3  # the sum of the widths, on the other hand, is known well
    assert result.alone[-1] + 6 * result.alone_error[-1] < 0
    assert result.plausible[1] == math.inf
    assert "their level from the assumed kappa_pos" in result.summary() and not result.too_small


def test_a_pair_concentration_below_the_data_is_ruled_out():
    result = identifiability(*fitted(SphereWorld(), 512), 20.0, grid=[5.0])
    assert result.compensated[0] + 10 * result.compensated_error[0] < 0 and result.at_limit[0] > 0.9
    assert result.plausible == (20.0, 20.0)
    assert "determine the level" in result.summary()


def test_concentrations_that_ran_away_are_called_so():
    world = SphereWorld(concentration=2e3)
    result = identifiability(*fitted(world, 256), 20.0, grid=[40.0])
    assert result.posterior_share == pytest.approx((2 / 2e3) / (2 / 2e3 + 1 / 20), rel=1e-4)
    assert result.too_small and "probably too small" in result.summary()


def test_infinite_pair_concentration_and_default_grid():
    result = identifiability(*fitted(SphereWorld(dim=3, pair_concentration=math.inf), 64), math.inf, batch_size=32)
    assert result.pair_concentration[result.fitted] == math.inf and len(result.pair_concentration) == 12
    assert result.posterior_share == 1.0
    ax = plot_identifiability(result)
    assert len(ax.lines) >= 2 and "κ_pos" in ax.get_xlabel()
    assert np.isfinite(np.concatenate([line.get_xydata() for line in ax.lines[:2]])).all()


def test_wrong_arguments_are_named():
    q1, q2 = fitted(SphereWorld(dim=3), 64)
    with pytest.raises(TypeError, match="VonMisesFisher"):
        identifiability(PowerSpherical(q1.mean_direction, q1.concentration), q2, 20.0)
    with pytest.raises(ValueError, match="batch shape"):
        identifiability(q1, VonMisesFisher(q2.mean_direction[:9], q2.concentration[:9]), 20.0)
    with pytest.raises(ValueError, match="at least 32 pairs"):
        identifiability(q1, q2, 20.0, batch_size=65)
    with pytest.raises(ValueError, match="`marginal`"):
        identifiability(q1, q2, 20.0, batch_size=32, marginal="flat")
    with pytest.raises(ValueError, match="> 0"):
        identifiability(q1, q2, 20.0, batch_size=32, grid=[0.0])


def test_the_model_takes_the_option_for_closed_forms_only():
    guide = Guide(torch.nn.Linear(8, 16), dim=3, batch_norm=False)
    world = SphereWorld(3, pair_concentration=math.inf, prior_concentration=4.0, observed_dim=8)
    batch = world.sample(32, seed=0)
    values = {}
    for marginal in ("uniform", "empirical"):
        model = models.MCInfoNCE(guide, marginal=marginal)
        trace = models_trace(model, batch)
        values[marginal] = trace.nodes["positive"]["log_prob"]
        assert values[marginal].shape == (32,)
    assert not torch.allclose(*values.values(), atol=1e-2)
    with pytest.warns(UserWarning, match="batch_norm=False"):
        models.MCInfoNCE(Guide(torch.nn.Linear(8, 16), dim=3), marginal="empirical")
    with pytest.raises(ValueError, match="closed-form"):
        models.MCInfoNCE(guide, concentration=5.0, evidence="k_sample", marginal="empirical")
    with pytest.raises(ValueError, match="`marginal`"):
        models.MCInfoNCE(guide, marginal="flat")


def models_trace(model, batch):

    trace = pyro.poutine.trace(model).get_trace(batch.x1, batch.x2)
    trace.compute_log_prob()
    return trace
