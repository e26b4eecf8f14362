"""The objective of every model against loops, quadrature, scipy and PyTorch's own cross entropy."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy import special, stats
from torch import nn

from pyro_contrastive import guides, models
from pyro_contrastive.nets import mlp
from pyro_contrastive.objectives import KSampleELBO

DIM, SIZE = 3, 10


def mcinfonce(evidence, **kwargs):
    options = {"concentration": math.inf if evidence == "exact" else 8.0, "evidence": evidence, "num_samples": 6}
    return lambda guide: models.MCInfoNCE(guide, **options | kwargs)


def views(dtype=torch.float32):
    """Two noisy looks at one thing."""
    x = torch.randn(SIZE, 6, dtype=dtype)
    return x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)


def loop_infonce(logits, symmetric):
    """Sum over items of log f_ii - log mean_j f_ij (and the same over columns), by two loops."""
    n, total = len(logits), 0.0
    for i in range(n):
        row = sum(math.exp(float(logits[i, j])) for j in range(n)) / n
        column = sum(math.exp(float(logits[j, i])) for j in range(n)) / n
        normaliser = 0.5 * (math.log(row) + math.log(column)) if symmetric else math.log(row)
        total += float(logits[i, i]) - normaliser
    return total


@pytest.mark.parametrize("evidence", ["exact", "moment_matched"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_closed_forms_have_no_variance_and_equal_the_loop(evidence, symmetric):
    guide = guides.VonMisesFisher(mlp([6, 16, 12]), DIM).double()
    model = mcinfonce(evidence, symmetric=symmetric)(guide).double()
    data = views(dtype=torch.float64)
    losses = [Trace_ELBO()(model, guide)(*data).item() for _ in range(3)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12) and losses[2] == pytest.approx(losses[0], rel=1e-12)
    assert losses[0] == pytest.approx(-loop_infonce(model.partner_logits(*data).detach(), symmetric), rel=1e-10)


def test_exact_partner_logits_are_the_integral_over_the_shared_latent():
    """log of the integral of R(z|x) R(z|x') / U(z), in the plane by the trapezoidal rule with scipy's densities."""
    guide = guides.VonMisesFisher(mlp([6, 16, 12]), 2).double()
    x1, x2 = views(dtype=torch.float64)
    got = models.MCInfoNCE(guide).double().partner_logits(x1, x2[:4])
    assert got.shape == (SIZE, 4)
    angles = torch.arange(2_000).double() * (2 * math.pi / 2_000)
    q1, q2 = guide.posterior(x1), guide.posterior(x2[:4])

    def density(q, i):
        m = q.mean_direction[i].detach()
        return stats.vonmises.pdf(angles, q.concentration[i].item(), loc=math.atan2(m[1], m[0]))

    for i in range(SIZE):
        for j in range(4):
            integral = (density(q1, i) * density(q2, j)).sum() * (2 * math.pi / 2_000)
            assert got[i, j].item() == pytest.approx(math.log(2 * math.pi * integral), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("family", [guides.VonMisesFisher, guides.PowerSpherical, guides.ProjectedNormal])
def test_elbo_evidence_under_the_k_sample_bound_is_the_k_sample_evidence(family):
    guide = family(mlp([6, 16, 12]), DIM)
    data = views()
    k_sample, elbo = mcinfonce("k_sample")(guide), mcinfonce("elbo")(guide)
    with torch.no_grad():
        left, right, single = (
            torch.stack([objective(*data) for _ in range(250)])
            for objective in (
                Trace_ELBO()(k_sample, guide),
                KSampleELBO(6)(elbo, guide),
                Trace_ELBO()(elbo, guide),
            )
        )

    def gap(a, b):
        return (a.mean() - b.mean()).abs() / math.sqrt((a.var() + b.var()).item() / 250)

    assert gap(left, right) < 4.5  # false alarm 7e-6 per family
    assert gap(left, single) > 4.5  # and the test can tell K = 6 from K = 1


def test_point_embeddings_give_the_cross_entropy_of_plain_infonce():
    guide = guides.Delta(mlp([6, 16, 12]), DIM)
    x1, x2 = views()
    z1, z2 = (guide.posterior(x).rsample() for x in (x1, x2))
    logits, target = 8.0 * z1 @ z2.mT, torch.arange(SIZE)
    rows = nn.functional.cross_entropy(logits, target, reduction="sum")
    columns = nn.functional.cross_entropy(logits.mT, target, reduction="sum")
    for symmetric, entropy in ((False, rows), (True, 0.5 * (rows + columns))):
        model = mcinfonce("elbo", symmetric=symmetric)(guide)
        loss = Trace_ELBO()(model, guide)(x1, x2)
        assert loss.item() == pytest.approx(entropy.item() - SIZE * math.log(SIZE), rel=1e-4, abs=1e-4)


def test_rpm_elbo_by_hand():
    """ELBO = sum of log P(z1, z2) - log R(z1) - log R(z2), R the batch average, with scipy's densities."""
    guide = guides.VonMisesFisher(mlp([6, 16, 12]), DIM).double()
    model = models.RPM(guide, concentration=7.0).double()
    data, drawn = views(dtype=torch.float64), {}

    def recording(*x):
        with poutine.trace() as capture:
            guide(*x)
        drawn.update({k: capture.trace.nodes[k]["value"].detach().numpy() for k in ("z1", "z2")})

    elbo = -Trace_ELBO().loss(model, recording, *data)
    area = 2 * math.pi ** (DIM / 2) / special.gamma(DIM / 2)
    kappa = model.concentration.item()  # 7 up to rounding: the parameter, its logarithm, was made in float32
    assert kappa == pytest.approx(7.0, rel=1e-6)
    want = 0.0
    for i in range(SIZE):
        z1, z2 = drawn["z1"][i], drawn["z2"][i]
        want += -math.log(area) + stats.vonmises_fisher(z1, kappa).logpdf(z2)
        for z, x in ((z1, data[0]), (z2, data[1])):
            q = guide.posterior(x)
            each = [
                stats.vonmises_fisher(m, k).pdf(z)
                for m, k in zip(q.mean_direction.detach().numpy(), q.concentration.tolist(), strict=True)
            ]
            want -= math.log(sum(each) / SIZE)
    assert elbo == pytest.approx(float(want), rel=1e-9)


def test_rpm_partner_logits_are_the_expected_prior_ratio():
    """vMF prior over vMF posteriors, by a double sum over a Monte-Carlo sample of scipy's."""
    guide = guides.VonMisesFisher(mlp([6, 16, 12]), DIM).double()
    model = models.RPM(guide, concentration=3.0).double()
    x1, x2 = views(dtype=torch.float64)
    got = model.partner_logits(x1, x2[:4], num_samples=4_000)
    assert got.shape == (SIZE, 4)
    q1, q2 = guide.posterior(x1), guide.posterior(x2[:4])
    for i, j in ((0, 0), (3, 1), (9, 3)):
        a, b = (
            stats.vonmises_fisher(q.mean_direction[n].detach().numpy(), q.concentration[n].item()).rvs(
                200_000, random_state=seed
            )
            for seed, q, n in ((0, q1, i), (1, q2, j))
        )
        # E exp(3 z1.z2) over the value for uniform latents, sinh(3) / 3
        weights = torch.as_tensor(3.0 * (a * b).sum(-1)).exp()
        want = math.log(weights.mean().item() / (math.sinh(3.0) / 3.0))
        spread = (weights.std() / weights.mean()).item()
        assert got[i, j].item() == pytest.approx(want, abs=5 * spread / math.sqrt(4_000))  # 5 sigma: 2e-6 in all
