"""The gap between ELBO and evidence: bounds that are ordered, and a Gaussian case in closed form."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_contrastive import diagnostics, guides, models, priors
from pyro_contrastive.objectives import KSampleELBO

N = 40


class Wide:
    """z ~ N(0, 1), x ~ N(z, 1), and a guide that is the posterior with its standard deviation times `factor`."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def model(self, x):
        with pyro.plate("pairs", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("pairs", len(x)):
            pyro.sample("z", dist.Normal(x / 2, self.factor * math.sqrt(0.5)))


def test_gap_of_a_gaussian_guide_is_its_divergence():
    """gap = KL(q || p) = (f^2 - 1) / 2 - log f per item.

    Over 40,000 draws of a log weight with sd .7, and of a weight with sd .5: tolerances of 5 errors, 1 in 1e6.
    """
    x = torch.linspace(-2, 2, N)
    wide = Wide(1.4)
    found = diagnostics.evidence_gap(wide.model, wide.guide, (x,), num_samples=1_000, sizes=(1, 10))
    assert found.num_samples.tolist() == [1, 10, 1_000]
    assert found.gap[0] == pytest.approx((1.4**2 - 1) / 2 - math.log(1.4), abs=0.0175)
    log_evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).mean().item()
    assert found.evidence == pytest.approx(log_evidence, abs=0.0175)
    assert found.elbo < found.bound[1] < found.evidence
    assert found.gap[-1] == 0 and found.unreliable == 0.0
    assert found.khat.shape == (N,)
    assert "settle it for 100%" in found.summary()


def test_tight_guide_has_no_gap():
    exact = Wide(1.0)
    found = diagnostics.evidence_gap(exact.model, exact.guide, (torch.linspace(-2, 2, N),), num_samples=40, sizes=(1,))
    np.testing.assert_allclose(found.gap, 0.0, atol=1e-6)
    assert (found.khat < 0).all()  # all weights are equal: no tail


def test_too_narrow_a_guide_is_said_to_settle_nothing():
    narrow = Wide(0.2)
    found = diagnostics.evidence_gap(narrow.model, narrow.guide, (torch.linspace(-2, 2, N),), num_samples=300)
    assert found.unreliable > 0.5
    assert "the gap is larger" in found.summary()


def test_bounds_of_a_model_are_those_of_pyro():
    torch.manual_seed(3)
    guide = guides.VonMisesFisher(nn.Linear(6, 12), 3).eval()
    model = models.RPM(guide, priors.VonMisesFisherChain(3, concentration=10.0)).eval()
    views = torch.randn(2, N, 6)
    found = diagnostics.evidence_gap(model, guide, views, num_samples=200, sizes=(1, 8))
    with torch.no_grad():
        for position, elbo in (
            (0, Trace_ELBO(200, vectorize_particles=True, max_plate_nesting=1)),
            (1, KSampleELBO(8)),
        ):
            repeats = 1 if position == 0 else 25
            values = [-elbo(model, guide)(*views).item() / N for _ in range(repeats)]
            # two means over 200 draws of the batch, sd of one below .5 nats: 5 standard errors of their difference
            assert found.bound[position] == pytest.approx(np.mean(values), abs=5 * 0.5 * math.sqrt(2 / 200))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 10}, "`num_samples` must be >= 30, got 10"),
        ({"num_samples": 40, "sizes": (64,)}, r"integers in 1..40 \(`num_samples`\), got \[64\]"),
        ({"sizes": (0, 1)}, "integers in 1..256"),
    ],
)
def test_arguments_are_checked(options, message):
    wide = Wide(1.0)
    with pytest.raises(ValueError, match=message):
        diagnostics.evidence_gap(wide.model, wide.guide, (torch.zeros(4),), **options)
