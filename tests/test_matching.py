"""The matching likelihood: permanents by brute force, invariance, gradients, and what balancing does."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from scipy import optimize
from scipy.special import xlogy

from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.factors import infonce_log_ratio, matching_factor
from pyro_contrastive.kernels import shared_latent_log_ratio
from pyro_contrastive.ops.matching import balance_log_ratios, matching_log_ratio


def grid(size, scale=1.0, seed=0, dtype=torch.float64):
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * noise).to(dtype)


def permanent(matrix):
    size = len(matrix)
    return sum(math.prod(matrix[i][p[i]] for i in range(size)) for p in itertools.permutations(range(size)))


def bethe(log_f, iterations=200):
    """The library's log Bethe permanent, without the parts that make it a likelihood."""
    size = len(log_f)
    constant = size * (math.log(size) + (size - 1) * math.log1p(-1 / size))
    return float(log_f.diagonal().sum() - matching_log_ratio(log_f, iterations=iterations).sum() + constant)


def bethe_by_minimisation(log_f):
    """Vontobel's variational problem over doubly stochastic matrices, by a general constrained optimiser."""
    size, f = len(log_f), log_f.numpy()
    sums = np.vstack([np.kron(np.eye(size), np.ones(size)), np.kron(np.ones(size), np.eye(size))[:-1]])

    def free_energy(gamma):
        return -(gamma @ f.ravel()) + (xlogy(gamma, gamma) - xlogy(1 - gamma, 1 - gamma)).sum()

    def slope(gamma):
        return -f.ravel() + np.log(gamma) + np.log1p(-gamma) + 2

    found = optimize.minimize(
        free_energy, np.full(size * size, 1 / size), jac=slope, method="SLSQP", bounds=[(1e-12, 1 - 1e-12)] * size**2,
        constraints={"type": "eq", "fun": lambda g: sums @ g - 1, "jac": lambda g: sums},
        options={"maxiter": 500, "ftol": 1e-14},
    )  # fmt: skip
    assert found.success
    return -found.fun


@pytest.mark.parametrize(("scale", "seed"), [(0.3, 0), (1.0, 1), (2.0, 2)])
def test_the_bethe_permanent_is_the_minimum_of_its_free_energy(scale, seed):
    log_f = grid(4, scale, seed)
    assert bethe(log_f) == pytest.approx(bethe_by_minimisation(log_f), abs=1e-5)


@pytest.mark.parametrize(("scale", "seed"), [(0.0, 0), (0.5, 1), (1.0, 2), (3.0, 3)])
def test_the_bethe_permanent_against_the_permanent(scale, seed):
    size = 7
    log_f = grid(size, scale, seed)
    exact, approximate = math.log(permanent(log_f.exp().tolist())), bethe(log_f)
    assert approximate <= exact + 1e-9  # Gurvits 2011
    # a dense grid of equal values misses about (1/2) log(2 pi N / e), the rest of Stirling's series
    assert exact - approximate < 0.5 * math.log(2 * math.pi * size / math.e) + 0.1


def test_a_constant_grid_says_nothing_and_a_perfect_one_almost_log_n():
    assert torch.allclose(matching_log_ratio(torch.full((50, 50), 3.0)), torch.zeros(50), atol=1e-5)
    perfect = matching_log_ratio(200.0 * torch.eye(50))
    assert torch.allclose(perfect, torch.full((50,), math.log(50) + 49 * math.log1p(-1 / 50)), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_of_one_view_cancel(dtype):
    log_f = grid(40, 2.0, 4, dtype).requires_grad_()
    row, column = 5 * grid(40, 1.0, 5, dtype)[:1].mT, 5 * grid(40, 1.0, 6, dtype)[:1]
    total, shifted = matching_log_ratio(log_f).sum(), matching_log_ratio(log_f + row + column).sum()
    assert float((total - shifted).detach()) == pytest.approx(0.0, abs=1e-3 if dtype == torch.float32 else 1e-6)
    (slope,) = torch.autograd.grad(total, log_f)
    assert float(slope.sum(0).abs().max()) < 1e-4 and float(slope.sum(1).abs().max()) < 1e-4  # so no gradient either


def test_gradient_is_that_of_the_log_likelihood():
    log_f = grid(6, 1.5, 7).requires_grad_()
    (slope,) = torch.autograd.grad(matching_log_ratio(log_f, iterations=300).sum(), log_f)
    step = 1e-5
    for i, j in ((0, 0), (0, 1), (3, 5), (5, 5)):
        change = torch.zeros(6, 6, dtype=torch.float64)
        change[i, j] = step
        up, down = (matching_log_ratio(log_f.detach() + sign * change, iterations=300).sum() for sign in (1.0, -1.0))
        assert float(slope[i, j]) == pytest.approx(float((up - down) / (2 * step)), abs=1e-6)


def test_gradient_is_identity_minus_the_marginals_of_the_matching():
    """Against exact marginals by enumeration, on a dense grid; Bethe's are off by a part of 1/N in absolute terms."""
    size = 8
    log_f = grid(size, 0.7, 8).requires_grad_()
    (slope,) = torch.autograd.grad(matching_log_ratio(log_f, iterations=300).sum(), log_f)
    f = log_f.detach().exp().tolist()
    marginals, total = np.zeros((size, size)), 0.0
    for p in itertools.permutations(range(size)):
        weight = math.prod(f[i][p[i]] for i in range(size))
        total += weight
        marginals[range(size), p] += weight
    assert np.abs(np.eye(size) - marginals / total - slope.numpy()).max() < 0.25 / size
    assert np.abs(marginals / total - 1 / size).max() > 0.5 / size  # they are not all the same


@pytest.mark.parametrize("prior", [0.0, 30.0])
def test_the_truth_is_stationary_whatever_the_marginal(prior):
    """The derivative along a common temperature is zero at the true law, half way to the prior, for both marginals."""
    world = SphereWorld(10, (16.0, 64.0), math.inf, prior_concentration=prior)
    batch = world.sample(16 * 256, seed=0)
    laws = [world.posterior(batch, view, prior_power=0.5) for view in (1, 2)]
    scores = {"matching": [], "softmax": []}
    for start in range(0, 16 * 256, 256):
        part = slice(start, start + 256)
        q1, q2 = (VonMisesFisher(q.mean_direction[part], q.concentration[part]) for q in laws)
        log_f = shared_latent_log_ratio(q1, q2)
        temperature = torch.ones((), requires_grad=True)
        for name, value in (
            ("matching", matching_log_ratio(temperature * log_f)),
            ("softmax", infonce_log_ratio(temperature * log_f, symmetric=True)),
        ):
            scores[name].append(float(torch.autograd.grad(value.mean(), temperature)[0]))
    means = {name: np.mean(values) for name, values in scores.items()}
    errors = {name: np.std(values, ddof=1) / 4 for name, values in scores.items()}
    assert abs(means["matching"]) < 4.5 * errors["matching"]  # t law with 15 degrees: false alarm 4e-4
    if prior:
        assert abs(means["softmax"]) > 2.5 * errors["softmax"]  # the softmax pulls away from the truth there


def test_extreme_grids_stay_finite():
    for log_f in (1e4 * torch.eye(9), -1e4 * torch.eye(9), 300 * grid(9, dtype=torch.float32)):
        log_f = log_f.clone().requires_grad_()
        value = matching_log_ratio(log_f)
        (slope,) = torch.autograd.grad(value.sum(), log_f)
        assert bool(value.isfinite().all()) and bool(slope.isfinite().all())


def test_ten_rounds_suffice_for_a_batch():
    log_f = (grid(128, 2.0, 9, torch.float32) + 5 * torch.eye(128)).requires_grad_()
    ten, many = (matching_log_ratio(log_f, iterations=n) for n in (10, 300))
    assert float((ten.mean() - many.mean()).detach().abs()) < 1e-4
    slopes = [torch.autograd.grad(value.sum(), log_f)[0] for value in (ten, many)]
    assert float((slopes[0] - slopes[1]).abs().max()) < 1e-3


def test_leading_dimensions_are_batches():
    stack = torch.stack([grid(5, seed=seed) for seed in range(6)]).view(2, 3, 5, 5)
    values, balanced = matching_log_ratio(stack), balance_log_ratios(stack)
    assert values.shape == (2, 3, 5) and balanced.shape == stack.shape
    assert torch.allclose(values[1, 2], matching_log_ratio(stack[1, 2]))
    assert torch.allclose(balanced[1, 2], balance_log_ratios(stack[1, 2]))


def test_balancing_finds_the_density_ratio_of_a_joint_law():
    """Symbols with a known joint: the evidence is the ratio times a factor per view, and the ratio comes back."""
    generator = torch.Generator().manual_seed(0)
    joint = (torch.randn(6, 6, generator=generator, dtype=torch.float64) + 2 * torch.eye(6)).exp()
    joint = joint / joint.sum()
    ratio = joint / (joint.sum(1, keepdim=True) * joint.sum(0))
    cells = torch.multinomial(joint.view(-1), 1_000, replacement=True, generator=generator)
    first, second = cells // 6, cells % 6
    wrong = (ratio.log() + 2 * grid(6, seed=1)[:1].mT + 2 * grid(6, seed=2)[:1])[first][:, second]
    balanced = balance_log_ratios(wrong, iterations=20)
    truth = ratio.log()[first][:, second]
    # each term is estimated from 1,000 pairs with ratios up to 5: standard error below 0.07, 4 s.e. here
    assert float((balanced - truth).abs().max()) < 0.28
    assert float((wrong - truth).abs().max()) > 1.0


def test_factor_in_a_plate():
    log_f = grid(8)

    def model():
        with pyro.plate("pairs", 8):
            return matching_factor("positive", log_f)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert torch.allclose(trace.nodes["positive"]["log_prob"], matching_log_ratio(log_f))


@pytest.mark.parametrize("shape", [(4, 5), (4,), (2, 2)])
def test_grids_that_hold_no_matching_are_refused(shape):
    with pytest.raises(ValueError, match=r"grid \(..., N, N\)"):
        matching_log_ratio(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"grid \(..., N, N\)"):
        balance_log_ratios(torch.zeros(shape))
    with pytest.raises(ValueError, match="`iterations`"):
        matching_log_ratio(torch.zeros(4, 4), iterations=0)
