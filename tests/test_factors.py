"""Factors against double Python loops, inside every handler a factor can meet."""

import math

import pyro
import pyro.distributions as pd
import pytest
import torch
from pyro import poutine

from pyro_contrastive.distributions import PowerSpherical, ProjectedNormal, VonMisesFisher
from pyro_contrastive.factors import infonce_factor, log_ratio_factor, recognition_factor
from pyro_contrastive.kernels import VonMisesFisherKernel


def unit(*shape, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def in_plate(function, size):
    with poutine.trace() as capture, pyro.plate("pairs", size):
        function()
    capture.trace.compute_log_prob()
    return capture.trace


def loop_infonce(z1, z2, kappa):
    """log f_ii - log (1/N) sum_j f_ij by two loops, in float64."""
    out = []
    for i in range(len(z1)):
        f = [math.exp(kappa * float(z1[i] @ z2[j])) for j in range(len(z2))]
        out.append(math.log(f[i]) - math.log(sum(f) / len(f)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("symmetric", [False, True])
def test_infonce_factor_equals_the_double_loop(symmetric):
    torch.manual_seed(0)
    z1, z2 = unit(7, 5), unit(7, 5)
    kernel = VonMisesFisherKernel(6.0)
    trace = in_plate(lambda: infonce_factor("positive", z1, z2, kernel, symmetric=symmetric), 7)
    want = loop_infonce(z1, z2, 6.0)
    if symmetric:
        want = 0.5 * (want + loop_infonce(z2, z1, 6.0))
    torch.testing.assert_close(trace.nodes["positive"]["log_prob"], want, rtol=1e-10, atol=1e-10)


def test_identical_embeddings_give_zero_and_perfect_ones_log_n():
    z = torch.eye(4, dtype=torch.float64)
    same = z[:1].expand(4, 4)
    kernel = VonMisesFisherKernel(1e3)
    perfect = in_plate(lambda: infonce_factor("f", z, z, kernel), 4).nodes["f"]["log_prob"]
    equal = in_plate(lambda: infonce_factor("f", same, same, kernel), 4).nodes["f"]["log_prob"]
    torch.testing.assert_close(perfect, torch.full((4,), math.log(4), dtype=torch.float64))
    torch.testing.assert_close(equal, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", [VonMisesFisher, PowerSpherical, ProjectedNormal])
def test_recognition_factor_equals_the_double_loop(family):
    torch.manual_seed(1)
    mean = unit(6, 4)
    width = torch.rand(6, 4).double() + 0.2 if family is ProjectedNormal else 20 * torch.rand(6).double()
    posterior, z = family(mean, width), unit(6, 4)
    trace = in_plate(lambda: recognition_factor("x1", z, posterior), 6)
    for i in range(6):
        densities = [float(family(mean[j], width[j]).log_prob(z[i]).exp()) for j in range(6)]
        want = math.log(densities[i]) - math.log(sum(densities) / 6)
        assert trace.nodes["x1"]["log_prob"][i].item() == pytest.approx(want, abs=1e-9)


def test_recognition_factor_takes_any_law_with_a_density():
    torch.manual_seed(2)
    posterior, z = pd.Normal(torch.randn(5, 3), 1.0).to_event(1), torch.randn(5, 3)
    value = in_plate(lambda: recognition_factor("x", z, posterior), 5).nodes["x"]["log_prob"]
    grid = torch.stack([posterior.log_prob(z[i]) for i in range(5)])
    torch.testing.assert_close(value, grid.diagonal() - grid.logsumexp(-1) + math.log(5))


def test_vectorised_particles_are_independent_batches():
    torch.manual_seed(3)
    z1, z2, posterior = unit(4, 6, 3), unit(4, 6, 3), VonMisesFisher(unit(6, 3), 10 * torch.rand(6).double())
    kernel = VonMisesFisherKernel(5.0)

    def both(a, b):
        infonce_factor("f", a, b, kernel)
        recognition_factor("r", a, posterior)

    with pyro.plate("particles", 4, dim=-2):
        together = in_plate(lambda: both(z1, z2), 6)
    for p in range(4):
        alone = in_plate(lambda p=p: both(z1[p], z2[p]), 6)
        for name in ("f", "r"):
            assert together.nodes[name]["log_prob"].shape == (4, 6)
            torch.testing.assert_close(together.nodes[name]["log_prob"][p], alone.nodes[name]["log_prob"])


def test_scale_and_subsampling_act_as_on_any_site():
    torch.manual_seed(4)
    z1, z2, kernel = unit(5, 3), unit(5, 3), VonMisesFisherKernel(5.0)
    plain = in_plate(lambda: infonce_factor("f", z1, z2, kernel), 5).nodes["f"]["log_prob_sum"]
    with poutine.scale(scale=0.5):
        scaled = in_plate(lambda: infonce_factor("f", z1, z2, kernel), 5).nodes["f"]["log_prob_sum"]
    with poutine.trace() as capture, pyro.plate("pairs", 50, subsample_size=5):
        infonce_factor("f", z1, z2, kernel)
    capture.trace.compute_log_prob()
    torch.testing.assert_close(scaled, 0.5 * plain)
    torch.testing.assert_close(capture.trace.nodes["f"]["log_prob_sum"], 10 * plain)


def test_gradients_by_finite_differences():
    torch.manual_seed(5)
    raw, kernel = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), VonMisesFisherKernel(4.0)

    def value(raw):
        z = torch.nn.functional.normalize(raw, dim=-1)
        posterior = VonMisesFisher(z[1], raw[0].square().sum(-1))
        trace = in_plate(lambda: (infonce_factor("f", z[0], z[1], kernel), recognition_factor("r", z[0], posterior)), 4)
        return trace.nodes["f"]["log_prob"], trace.nodes["r"]["log_prob"]

    assert torch.autograd.gradcheck(value, raw)


def test_logits_beyond_the_range_of_exp_stay_finite():
    z1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    far = in_plate(lambda: infonce_factor("f", z1, z1.flip(0), VonMisesFisherKernel(1e6)), 2).nodes["f"]["log_prob"]
    torch.testing.assert_close(far, torch.full((2,), -2e6 + math.log(2)))


def test_mistakes_are_named():
    z, kernel = unit(4, 3), VonMisesFisherKernel(5.0)
    posterior = VonMisesFisher(z, torch.ones(4).double())
    with pytest.raises(ValueError, match="inside the plate"):
        infonce_factor("f", z, z, kernel)
    with pytest.raises(ValueError, match=r"plate 'pairs' \(dim -1, size 5\)"):
        in_plate(lambda: infonce_factor("f", z, z, kernel), 5)
    with pytest.raises(ValueError, match="one shape"):
        in_plate(lambda: infonce_factor("f", z, z[:3], kernel), 4)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        in_plate(lambda: infonce_factor("f", z[:1], z[:1], kernel), 1)
    with pytest.raises(ValueError, match="grid"):
        in_plate(lambda: log_ratio_factor("f", torch.zeros(4, 3)), 4)
    with pytest.raises(ValueError, match=r"\(N, d\) and a posterior of batch shape \(N,\)|posterior of batch shape"):
        in_plate(lambda: recognition_factor("r", z[:3], posterior), 4)
    with pytest.raises(ValueError, match="Delta"):
        in_plate(lambda: recognition_factor("r", z, pd.Delta(z, event_dim=1)), 4)
    with pytest.raises(ValueError, match="positive and finite"):
        VonMisesFisherKernel(0.0)
