from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from pyro import distributions as pyro_dist
from scipy import stats
from torch import nn

from pyro_contrastive import distributions as dist
from pyro_contrastive.diagnostics import _draws as pieces
from pyro_contrastive.diagnostics import cap_radius, energy_score, log_score, sbc, sharpness, tarp


def points(*shape: int, seed: int = 0) -> np.ndarray:
    z = np.random.default_rng(seed).standard_normal(shape)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def vmf(n: int, dim: int, kappa: float, seed: int) -> tuple[dist.VonMisesFisher, torch.Tensor]:
    torch.manual_seed(seed)
    law = dist.VonMisesFisher(torch.from_numpy(points(n, dim, seed=seed)).float(), torch.full((n,), kappa))
    return law, law.sample()


def angle(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.arccos(np.clip(x @ y, -1, 1)))


def chord(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x - y))


@pytest.mark.parametrize(("name", "distance"), [("chordal", chord), ("geodesic", angle)])
@pytest.mark.parametrize("num_draws", [2, 5, 16, 17, 40])
def test_energy_score_is_that_of_a_loop(name, distance, num_draws, monkeypatch):
    draws, truth = points(num_draws, 3, 4, seed=1), points(3, 4, seed=2)
    expected = []
    for i in range(3):
        far = np.mean([distance(z, truth[i]) for z in draws[:, i]])
        groups = [draws[start : start + 16, i] for start in range(0, num_draws, 16)]
        pairs = [distance(g[s], g[t]) for g in groups for s in range(len(g)) for t in range(len(g)) if s != t]
        expected.append(far - 0.5 * np.mean(pairs))
    result = energy_score(draws, truth, distance=name)
    np.testing.assert_allclose(result.values, expected, rtol=1e-6)
    assert result.mean == pytest.approx(np.mean(expected))
    assert result.standard_error == pytest.approx(stats.sem(expected))
    monkeypatch.setattr(pieces, "_NUMBERS", 1)  # many pieces, of one group each
    np.testing.assert_allclose(energy_score(draws, truth, distance=name).values, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("dim", "name", "value"), [(3, "chordal", 2 / 3), (3, "geodesic", np.pi / 4), (2, "chordal", 2 / np.pi)]
)
def test_energy_score_of_the_uniform_law_is_half_the_mean_distance(dim, name, value):
    # E|Z - z| is 4/3 on the ordinary sphere and 4/pi on the circle, wherever z lies
    law = dist.HypersphericalUniform(dim).expand((400,))
    result = energy_score(law, points(400, dim), distance=name, num_draws=64)
    # without bias, so that many items average it out; 4 standard errors: false-alarm rate 6e-5
    assert result.mean == pytest.approx(value, abs=4 * result.standard_error)


def test_energy_score_is_without_bias_for_few_draws():
    kappa = 5.0
    with mpmath.workdps(20):  # angle t to the mean of a law on S^2 has density prop. to sin t exp(kappa cos t)

        def mean(f):
            weight = lambda t: mpmath.sin(t) * mpmath.exp(kappa * mpmath.cos(t))  # noqa: E731
            return mpmath.quad(lambda t: f(t) * weight(t), [0, 1, np.pi]) / mpmath.quad(weight, [0, 1, np.pi])

        far = float(mean(lambda t: 2 * mpmath.sin(t / 2)))
    law = stats.vonmises_fisher([0, 0, 1], kappa)
    rng = np.random.default_rng(0)
    apart = np.linalg.norm(law.rvs(200_000, random_state=rng) - law.rvs(200_000, random_state=rng), axis=-1)
    draws = np.stack([law.rvs(40_000, random_state=rng) for _ in range(3)])
    result = energy_score(draws, np.tile([0.0, 0, 1], (40_000, 1)))
    error = np.hypot(result.standard_error, 0.5 * apart.std() / np.sqrt(200_000))
    # 4 standard errors: false-alarm rate 6e-5 (fixed seed)
    assert result.mean == pytest.approx(far - 0.5 * apart.mean(), abs=4 * error)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m, k: dist.VonMisesFisher(m, 4 * k),
        lambda m, k: dist.VonMisesFisher(m, k / 4),
        lambda m, k: dist.VonMisesFisher(m.roll(1, -1), k),
        lambda m, k: dist.HypersphericalUniform(5).expand((len(m),)),
    ],
)
def test_the_exact_posterior_wins(wrong):
    law, truth = vmf(300, 5, 20.0, seed=1)
    judged = wrong(law.mean_direction, law.concentration)
    for score, sign in ((log_score, 1), (energy_score, -1)):
        gain = sign * (score(law, truth).values - score(judged, truth).values)
        assert stats.ttest_1samp(gain, 0.0, alternative="greater").pvalue < 1e-4


def test_geodesic_score_does_not_see_what_is_the_same_on_both_sides():
    # uniform on a great circle, and uniform on the sphere: both are symmetric, only the chord tells them apart
    circle = np.concatenate([points(2000, 2, seed=1), np.zeros((2000, 1))], axis=-1)
    sphere, truth = points(2000, 3, seed=2), points(100, 3, seed=3)
    scores = {
        name: [energy_score(np.repeat(z[:, None], 100, axis=1), truth, distance=name).mean for z in (circle, sphere)]
        for name in ("chordal", "geodesic")
    }
    assert scores["geodesic"][0] == pytest.approx(scores["geodesic"][1], abs=0.01)
    assert scores["chordal"][0] > scores["chordal"][1] + 0.02


def test_log_score_is_scipys_density():
    law, truth = vmf(50, 7, 12.0, seed=1)
    expected = [
        stats.vonmises_fisher(m.double().numpy() / np.linalg.norm(m.double().numpy()), 12.0).logpdf(z.double().numpy())
        for m, z in zip(law.mean_direction, truth, strict=True)
    ]
    result = log_score(law, truth)
    np.testing.assert_allclose(result.values, np.ravel(expected), rtol=1e-4)
    assert result.standard_error == pytest.approx(stats.sem(np.ravel(expected)), rel=1e-3)


def test_sharpness_in_closed_form_and_by_draws():
    mean = torch.from_numpy(points(20, 6)).float()
    kappa = torch.linspace(0.5, 80.0, 20)

    class Other(dist.PowerSpherical):
        """A family that `sharpness` does not know."""

        def entropy(self):
            raise NotImplementedError

    closed, drawn = (sharpness(family(mean, kappa), num_draws=4000) for family in (dist.PowerSpherical, Other))
    np.testing.assert_allclose(closed.cap_radius, drawn.cap_radius, rtol=0.05)
    np.testing.assert_allclose(closed.resultant_length, drawn.resultant_length, atol=0.03)
    np.testing.assert_allclose(closed.entropy, drawn.entropy, atol=0.12)
    vmf_law = sharpness(dist.VonMisesFisher(mean, kappa), level=0.5)
    np.testing.assert_allclose(vmf_law.cap_radius, cap_radius(0.5, kappa, 6))
    for i in (0, 19):
        scipys = stats.vonmises_fisher(np.eye(6)[0], float(kappa[i]))
        assert vmf_law.entropy[i] == pytest.approx(scipys.entropy(), rel=1e-4)
    assert np.all(np.diff(closed.cap_radius) < 0) and np.all(np.diff(closed.resultant_length) > 0)


def test_sharpness_of_a_point_and_of_the_projected_normal():
    mean = torch.from_numpy(points(4, 5)).float()
    point = sharpness(pyro_dist.Delta(mean, event_dim=1), num_draws=5)
    np.testing.assert_allclose(point.cap_radius, 0.0, atol=1e-6)
    np.testing.assert_allclose(point.resultant_length, 1.0, rtol=1e-6)
    assert np.all(np.isneginf(point.entropy))
    normal = sharpness(dist.ProjectedNormal(10 * mean, torch.ones(4, 5)), num_draws=2000)
    close = sharpness(dist.VonMisesFisher(mean, torch.full((4,), 100.0)))  # nearly the same law
    np.testing.assert_allclose(normal.cap_radius, close.cap_radius, rtol=0.1)
    np.testing.assert_allclose(normal.entropy, close.entropy, atol=0.3)


@pytest.mark.parametrize("dim", [2, 3, 512])
@pytest.mark.parametrize("kappa", [0.0, 1e-3, 1e6])
def test_ends(dim, kappa):
    law, truth = vmf(3, dim, kappa, seed=1)
    for result in (energy_score(law, truth, num_draws=33), log_score(law, truth)):
        assert np.all(np.isfinite(result.values)) and np.isfinite(result.standard_error)
    one = energy_score(law.sample(torch.Size([2]))[:, :1], truth[:1])
    assert np.isfinite(one.mean) and np.isnan(one.standard_error)
    widths = sharpness(law)
    assert np.all((widths.cap_radius >= 0) & (widths.cap_radius <= np.pi)) and np.all(np.isfinite(widths.entropy))


def test_precisions_may_differ():
    law, truth = vmf(300, 5, 20.0, seed=1)
    double = dist.VonMisesFisher(
        nn.functional.normalize(law.mean_direction.double(), dim=-1), law.concentration.double()
    )
    for z in (truth, truth.double(), truth.numpy().astype(np.float64)):
        np.testing.assert_allclose(log_score(law, z).values, log_score(double, z).values, rtol=1e-4, atol=1e-4)
    ranks = sbc(lambda x: double, lambda n, s: (None, truth), num_simulations=300, num_draws=99, batch_size=300)
    assert min(ranks.adjusted_pvalues.values()) > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    assert tarp(double, truth, num_draws=99).pvalue > 1e-4  # the same
    with pytest.raises(ValueError, match="unit"):
        log_score(double, 2 * truth)


def test_caller_keeps_the_random_state_and_the_seed_counts():
    law, truth = vmf(5, 4, 9.0, seed=1)
    before = torch.get_rng_state()
    first, again, other = (energy_score(law, truth, num_draws=20, seed=s).values for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(first, again)
    assert np.all(first != other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: energy_score(points(5, 4, 3), points(4, 3), distance="l2"), '"chordal" or "geodesic"'),
        (lambda: energy_score(points(1, 4, 3), points(4, 3)), "at least two draws per item, got 1"),
        (lambda: energy_score(points(0, 4, 3), points(4, 3)), "at least two draws per item, got 0"),
        (lambda: energy_score(2 * points(5, 4, 3), points(4, 3)), "`draws` must hold unit vectors"),
        (lambda: energy_score(points(5, 4, 3), 2 * points(4, 3)), "`truth` must hold unit vectors"),
        (lambda: energy_score(points(5, 4, 3), points(3, 3)), r"`truth` must be \(N, d\)"),
        (lambda: log_score(vmf(4, 3, 1.0, 0)[0], points(3, 3)), "must have batch shape"),
        (lambda: log_score(pyro_dist.Delta(torch.eye(3), event_dim=1), torch.eye(3)), "posterior with a density"),
        (lambda: sharpness(vmf(4, 3, 1.0, 0)[0], level=1.0), r"`level` must lie in \(0, 1\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
