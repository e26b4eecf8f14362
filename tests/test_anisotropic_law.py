"""The normaliser of the anisotropic law, matched precisions, and the closed form for pairs of posteriors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.kernels import AnisotropicKernel, moment_matched_anisotropic_pairs, moment_matched_log_ratio
from pyro_contrastive.ops import bessel_ratio, inverse_bessel_ratio, log_partition
from pyro_contrastive.ops.anisotropic import log_normalizer, matched_precision, sample_anisotropic


def unit(*shape):
    return normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("dim", [2, 3, 4, 10, 64])
def test_equal_precisions_have_the_normaliser_of_von_mises_and_fisher(dim):
    value = torch.tensor([0.0, 0.01, 0.5, 2.5, 12.5, 100.0, 1e4], dtype=torch.float64)
    got = log_normalizer(unit(7, dim), value.unsqueeze(-1).expand(7, dim))
    want = log_partition(dim, 2 * value) - 2 * value
    torch.testing.assert_close(got, want, rtol=0, atol=0.006 if dim < 10 else 3e-4)


@pytest.mark.parametrize(
    ("precision", "error"),
    [([0.5, 0.1], 0.004), ([12.5, 2.5], 0.02), ([12.5, 7.5, 2.5], 0.02), ([30.0, 1.5], 0.1), ([30.0, 30.0, 1.5], 0.1)],
)
def test_the_normaliser_is_that_of_the_quadrature(precision, error):
    lam = np.array(precision)
    if len(lam) == 2:
        angle = np.linspace(-math.pi, math.pi, 5_001)[:-1]
        u = np.stack([np.cos(angle), np.sin(angle)], -1)
    else:
        height, longitude = np.meshgrid((np.arange(200) + 0.5) / 100 - 1, (np.arange(200) + 0.5) * math.pi / 100)
        radius = np.sqrt(1 - height**2)
        u = np.stack([radius * np.cos(longitude), radius * np.sin(longitude), height], -1).reshape(-1, 3)
    z = unit(40, len(lam)).numpy()
    want = np.log([np.exp(-((u - one) ** 2 @ lam)).mean() for one in z])
    got = log_normalizer(torch.from_numpy(z), torch.from_numpy(lam)).numpy()
    assert np.abs(got - want).max() < error
    assert np.ptp(want) > 5 * error  # it is not a constant


def test_the_normaliser_is_differentiable_and_keeps_its_precision_in_float32():
    z, precision = unit(5, 4).requires_grad_(), (torch.rand(5, 4).double() * 20 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(log_normalizer, (z, precision))
    for value in (torch.tensor([30.0, 30.0, 1.5, 1.5]), torch.tensor([1e4, 1.0, 1.0, 1.0]), torch.full((4,), 1e-3)):
        want = log_normalizer(z.detach(), value.double())
        torch.testing.assert_close(log_normalizer(z.detach().float(), value).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dim", [2, 4, 10, 64])
def test_matched_precisions_multiply_mean_resultant_lengths(dim):
    precision = torch.tensor([0.05, 1.0, 5.0, 30.0, 500.0], dtype=torch.float64).repeat(dim)[:dim]
    for first, second in ((4.0, 50.0), (0.1, 1e3), (math.inf, 20.0)):
        k1, k2 = (torch.tensor(k, dtype=torch.float64) for k in (first, second))
        length = bessel_ratio(dim, 2 * precision) * bessel_ratio(dim, k1) * bessel_ratio(dim, k2)
        want = inverse_bessel_ratio(dim, length) / 2
        torch.testing.assert_close(matched_precision(precision, k1, k2), want, rtol=0.08, atol=0)
    tight = torch.full((dim,), 1e4, dtype=torch.float64)
    torch.testing.assert_close(matched_precision(tight, tight[0]), tight / 3, rtol=2e-2 * dim, atol=0)
    single = torch.full((dim,), 3e6)
    torch.testing.assert_close(matched_precision(single, 2 * single[0]), single / 2, rtol=1e-4, atol=0)
    infinite = torch.tensor(math.inf, dtype=torch.float64)
    torch.testing.assert_close(matched_precision(precision, infinite), precision)


def test_equal_precisions_give_the_moment_matched_evidence_of_the_isotropic_kernel():
    q1 = VonMisesFisher(unit(7, 5), torch.linspace(2.0, 60.0, 7).double())
    q2 = VonMisesFisher(unit(6, 5), torch.linspace(60.0, 4.0, 6).double())
    got = moment_matched_anisotropic_pairs(q1, q2, torch.full((5,), 6.0).double()).grid()
    want = moment_matched_log_ratio(q1, q2, torch.tensor(12.0).double())
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("precision", [[12.5, 9.0, 5.0, 2.5], [12.5] * 5 + [2.5] * 5])
def test_the_evidence_of_a_pair_is_close_to_simulation(precision):
    """E[f(z, z') / C(z)] by draws of z and z', the last posterior in closed form; likely pairs only."""
    torch.manual_seed(1)
    lam, dim = torch.tensor(precision).double(), len(precision)
    errors = []
    for k1, k2 in ((64.0, 16.0), (4.0, 16.0)):
        mean = unit(dim)
        first = VonMisesFisher(mean, torch.tensor(k1).double())
        shown = VonMisesFisher(sample_anisotropic(first.sample((20,)), lam), torch.tensor(k2).double()).sample()
        z2 = sample_anisotropic(first.sample((15_000,)), lam)
        log_density = k2 * shown @ z2.mT - log_partition(dim, torch.tensor(k2).double())
        want = log_density.logsumexp(-1) - math.log(15_000)
        q1 = VonMisesFisher(mean.unsqueeze(0), first.concentration.unsqueeze(0))
        q2 = VonMisesFisher(shown, torch.full((20,), k2).double())
        errors.append(moment_matched_anisotropic_pairs(q1, q2, lam).grid()[0] - want)
    errors = torch.stack(errors)
    assert errors.abs().mean() < 0.1 and errors.abs().max() < 0.5


def test_a_normalised_kernel_is_a_density():
    kernel = AnisotropicKernel(3, [6.0, 2.0, 0.5], learn=False, normalized=True).double()
    density = kernel(unit(8, 3), unit(40_000, 3)).exp().mean(-1)
    assert (density - 1).abs().max() < 0.08  # 5 s.e. are .03, the normaliser is off by up to .045


def test_posteriors_of_another_family_are_refused():
    q = VonMisesFisher(unit(4, 3), torch.ones(4).double())
    with pytest.raises(TypeError, match="VonMisesFisher posteriors"):
        moment_matched_anisotropic_pairs(q, torch.distributions.Normal(0.0, 1.0), torch.ones(3))
