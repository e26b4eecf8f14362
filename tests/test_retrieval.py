from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, optimize
from torch.nn.functional import normalize

from pyro_contrastive.data import SphereWorld
from pyro_contrastive.diagnostics import (
    cap_area,
    cap_radius,
    credible_sets,
    partner_radius,
    partner_sets,
)
from pyro_contrastive.distributions import HypersphericalUniform, PowerSpherical, VonMisesFisher

INSIDE = credible_sets.__globals__  # its own module, of which collected doctests may have made a second copy
BACKENDS = [
    "torch",
    pytest.param("faiss", marks=pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is missing")),
]


def unit(n: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def kappas(n: int, low: float, high: float, seed: int) -> torch.Tensor:
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return torch.exp(math.log(low) + (math.log(high) - math.log(low)) * uniform)


def brute_force(queries, mean, radius, exclude=None):
    """Double loop in float64; radius(i, j) in radians."""
    a, b = (normalize(m.double(), dim=-1).numpy() for m in (queries.mean_direction, mean))
    return [
        {
            j
            for j in range(len(b))
            if 0.5 * ((a[i] - b[j]) ** 2).sum() <= 2 * math.sin(0.5 * radius[i, j]) ** 2
            and (exclude is None or exclude[i] != j)
        }
        for i in range(len(a))
    ]


@pytest.fixture
def small_steps(monkeypatch):
    """Many blocks, chunks and pieces, with ragged ends."""
    monkeypatch.setattr(INSIDE["_search"], "ENTRIES", 500)
    monkeypatch.setitem(INSIDE, "_ROWS", 7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["points", "posteriors", "power spherical"])
def test_sets_are_those_of_a_double_loop(backend, kind, small_steps):
    dim, n, m = 6, 33, 301
    family = PowerSpherical if kind == "power spherical" else VonMisesFisher
    q = family(unit(n, dim, 0), kappas(n, 0.5, 80.0, 1))
    mean, kappa = unit(m, dim, 2), kappas(m, 2.0, 200.0, 3)
    exclude = torch.arange(n)
    exclude[5] = -1
    if kind == "posteriors":
        radius = partner_radius(0.9, q.concentration.numpy()[:, None], kappa, dim)
        sets = credible_sets(q, VonMisesFisher(mean, kappa), alpha=0.1, exclude=exclude, backend=backend)
    else:
        name = "power_spherical" if kind == "power spherical" else "vmf"
        radius = np.broadcast_to(cap_radius(0.9, q.concentration, dim, family=name)[:, None], (n, m))
        sets = credible_sets(q, mean, alpha=0.1, exclude=exclude, backend=backend)
    expected = brute_force(q, mean, radius, exclude.tolist())
    assert [set(sets[i].tolist()) for i in range(n)] == expected
    assert sets.sizes.tolist() == [len(members) for members in expected] and sets.sizes.max() > 150 > sets.sizes.min()
    assert sets.num_items == m and len(sets) == n
    assert all(np.all(np.diff(sets.indices[a:b]) > 0) for a, b in zip(sets.indptr, sets.indptr[1:], strict=False))
    cosine = (q.mean_direction @ mean.T).numpy()
    np.testing.assert_allclose(sets.cosines, cosine[sets.queries, sets.indices], atol=1e-6)
    nearest = sets[int(sets.sizes.argmax())]
    assert np.all(np.diff(cosine[sets.sizes.argmax()][nearest]) <= 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kappa", [3.0, 1e4, 1e9])
def test_items_at_the_edge_are_decided_in_double_precision(backend, kappa):
    dim, n = 64, 400
    pole = unit(1, dim, 0, torch.float64)
    tangent = unit(n, dim, 1, torch.float64)
    tangent = normalize(tangent - (tangent @ pole.T) * pole, dim=-1)
    radius = float(cap_radius(0.95, kappa, dim))
    step = torch.where(torch.arange(n) % 2 == 0, -1e-7, 1e-7).double()
    angle = (radius * (1 + step)).unsqueeze(-1)  # far closer than float32 can tell
    gallery = torch.cos(angle) * pole + torch.sin(angle) * tangent
    q = VonMisesFisher(pole, torch.tensor([kappa], dtype=torch.float64))
    assert credible_sets(q, gallery, backend=backend).indices.tolist() == list(range(0, n, 2))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_changes_no_set(precision):
    q, mean = VonMisesFisher(unit(50, 16, 0), kappas(50, 1.0, 100.0, 1)), unit(3000, 16, 2)
    sets = credible_sets(q, mean, backend="torch")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        again = credible_sets(q, mean, backend="torch")
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(again.indptr, sets.indptr)
    np.testing.assert_array_equal(again.indices, sets.indices)


@pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is missing")
@pytest.mark.parametrize("widths", [False, True])
def test_faiss_and_torch_agree_on_a_larger_gallery(widths):
    q, mean = VonMisesFisher(unit(200, 32, 0), kappas(200, 5.0, 500.0, 1)), unit(30_000, 32, 2)
    gallery = VonMisesFisher(mean, kappas(30_000, 20.0, 200.0, 3)) if widths else mean
    one, other = (credible_sets(q, gallery, backend=backend) for backend in ("torch", "faiss"))
    np.testing.assert_array_equal(one.indptr, other.indptr)
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_allclose(one.cosines, other.cosines, atol=1e-6)
    assert one.sizes.sum() > 1000


@pytest.mark.parametrize("dim", [2, 3, 10, 64, 512])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 30.0, 1e3, 1e6])
def test_edge_of_the_cap_is_the_quantile_of_the_cosine(dim, kappa):
    spread = math.sqrt((dim - 1) / (kappa + dim))
    mode = math.acos(2 * kappa / (dim - 2 + math.hypot(dim - 2, 2 * kappa)))

    def density(t):
        return math.exp(
            (dim - 2) * (math.log(math.sin(t)) - math.log(math.sin(mode)) if dim > 2 and 0 < t < math.pi else 0.0)
            - 2 * kappa * (math.sin(t / 2) ** 2 - math.sin(mode / 2) ** 2)
        )

    cuts = np.clip(mode + spread * np.array([-15, -6, -3, -1, 0, 1, 3, 6, 15]) / (1 if dim < 4 else dim**0.5), 0, np.pi)
    cuts = np.unique(np.r_[0.0, cuts, np.pi]) if kappa < 1e3 else np.unique(cuts)

    def mass(low, high):
        inner = [low, *cuts[(cuts > low) & (cuts < high)], high]
        return sum(integrate.quad(density, a, b, epsabs=0, epsrel=1e-11)[0] for a, b in pairwise(inner))

    total = mass(cuts[0], cuts[-1])
    edge = optimize.brentq(lambda t: mass(cuts[0], t) / total - 0.95, cuts[0], cuts[-1], xtol=1e-14)
    assert cap_radius(0.95, kappa, dim) == pytest.approx(edge, rel=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 10, 64])
def test_area_is_the_share_of_uniform_points_inside(dim):
    z = unit(40_000, dim, 5, torch.float64)[:, 0].numpy()
    for radius in (0.4 * math.pi, 0.5 * math.pi):
        share = float(cap_area(radius, dim))
        # 4 standard errors: false-alarm rate 6e-5 (fixed seed)
        assert abs((np.arccos(z) <= radius).mean() - share) < 4 * math.sqrt(share * (1 - share) / len(z))
    assert cap_area(math.pi, dim) == 1.0 and cap_area(0.0, dim) == 0.0


@pytest.mark.parametrize("own_width", [False, True])
def test_known_world_is_covered_as_stated(own_width):
    # 4 standard errors: false-alarm rate 6e-5 each (fixed seed)
    n, alpha = 2500, 0.1
    batch = (world := SphereWorld(8, pair_concentration=math.inf)).sample(n, seed=11)
    gallery = world.posterior(batch, 2) if own_width else batch.z1
    sets = credible_sets(world.posterior(batch, 1), gallery, alpha=alpha)
    found = (sets.indices == sets.queries).sum() / n
    assert abs(found - (1 - alpha)) < 4 * math.sqrt(alpha * (1 - alpha) / n)
    if own_width:  # the caps of the latent hold far fewer partners
        cap = credible_sets(world.posterior(batch, 1), batch.mean_direction2, alpha=alpha)
        assert (cap.indices == cap.queries).sum() / n < 0.6


@pytest.mark.parametrize("pair_concentration", [math.inf, 20.0])
def test_partner_sets_are_the_likeliest_items_up_to_the_stated_probability(pair_concentration, monkeypatch):
    monkeypatch.setattr(INSIDE["_search"], "ENTRIES", 16 * 80 * 7)
    n, m, dim, alpha = 24, 80, 3, 0.1
    q = VonMisesFisher(unit(n, dim, 0), kappas(n, 2.0, 60.0, 1))
    items = VonMisesFisher(unit(m, dim, 2), kappas(m, 2.0, 60.0, 3))
    sets = partner_sets(q, items, alpha=alpha, pair_concentration=pair_concentration, exclude=np.arange(n))
    # the evidence by quadrature over the sphere: the nodes carry exp(120 t) to ten digits
    height, weight = np.polynomial.legendre.leggauss(48)
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    flat = np.sqrt(1 - height**2)[:, None]
    grid = np.stack([flat * np.cos(turn), flat * np.sin(turn), np.broadcast_to(height[:, None], (48, 96))], -1)
    grid, weight = grid.reshape(-1, 3), np.repeat(weight, 96) / (2 * 96)

    def density(law):  # relative to the uniform law
        kappa = law.concentration.double().numpy()
        mean = normalize(law.mean_direction.double(), dim=-1).numpy()
        return np.exp(kappa * (grid @ mean.T - 1)) * (2 * kappa / -np.expm1(-2 * kappa))

    partner = density(items)
    if pair_concentration != math.inf:
        partner = np.exp(pair_concentration * (grid @ grid.T - 1)) @ (weight[:, None] * partner)
    evidence = (density(q).T * weight) @ partner
    evidence[np.arange(n), np.arange(n)] = 0.0
    for i in range(n):
        order = np.argsort(-evidence[i])
        mass = np.cumsum(evidence[i][order]) / evidence[i].sum()
        assert np.abs(mass - (1 - alpha)).min() > 1e-5  # no tie with the edge that quadrature could decide wrongly
        assert set(sets[i].tolist()) == set(order[: np.searchsorted(mass, 1 - alpha) + 1].tolist())


@pytest.mark.parametrize("pair_concentration", [math.inf, 20.0])
def test_partner_sets_hold_the_partner_as_often_as_stated(pair_concentration):
    n, alpha = 1200, 0.2
    batch = (world := SphereWorld(8, pair_concentration=pair_concentration)).sample(n, seed=12)
    q, items = world.posterior(batch, 1), world.posterior(batch, 2)
    sets = partner_sets(q, items, alpha=alpha, pair_concentration=pair_concentration)
    found = (sets.indices == sets.queries).sum() / n
    # a set holds 1 - alpha or up to one item more; 4 standard errors: false-alarm rate 3e-5 each (fixed seed)
    error = 4 * math.sqrt(alpha * (1 - alpha) / n)
    assert 1 - alpha - error < found < 1 - alpha + error + 0.05
    assert sets.sizes.min() >= 1
    wrong = partner_sets(VonMisesFisher(q.mean_direction, 4 * q.concentration), items, alpha=alpha)
    assert (wrong.indices == wrong.queries).sum() / n < 1 - alpha - error


def test_sets_are_nested_in_alpha_and_grow_as_the_query_gets_less_sure():
    mean, gallery = unit(1, 5, 0).expand(20, 5), unit(5000, 5, 1)
    q = VonMisesFisher(mean, torch.logspace(3, -1, 20))
    sizes = [credible_sets(q, gallery, alpha=alpha).sizes for alpha in (0.5, 0.1, 0.01)]
    assert all(np.all(np.diff(one) >= 0) for one in [*sizes, *np.transpose(sizes)])
    assert sizes[-1][-1] > 1.5 * sizes[0][-1] > 1000 * sizes[-1][0]


def test_nothing_of_the_caller_is_touched():
    mean = unit(50, 4, 0, torch.float64) * (1 + 5e-4)
    kappa = torch.full((3,), 9.0, requires_grad=True)
    before, state = mean.clone(), torch.get_rng_state()
    q = VonMisesFisher(unit(3, 4, 1), kappa)
    sets = credible_sets(q, mean.numpy())
    np.testing.assert_array_equal(credible_sets(q, mean).indices, sets.indices)
    assert torch.equal(mean, before) and torch.equal(torch.get_rng_state(), state)


Q = VonMisesFisher(unit(3, 4, 0), torch.ones(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: credible_sets(Q, unit(5, 3, 0)), ValueError, "one dimension, got 4 and 3"),
        (lambda: credible_sets(Q, torch.zeros(0, 4)), ValueError, r"`gallery` must hold at least one.*\(0, 4\)"),
        (lambda: credible_sets(Q, 2 * unit(5, 4, 0)), ValueError, r"finite unit vectors, got a norm of 2 \(5 of 5\)"),
        (lambda: credible_sets(Q, unit(5, 4, 0) * math.nan), ValueError, "finite unit vectors, got a norm of nan"),
        (lambda: credible_sets(Q, torch.ones(5, 4).long()), ValueError, "floating point"),
        (lambda: credible_sets(Q, unit(5, 4, 0), alpha=0.0), ValueError, r"`alpha` must lie in \(0, 1\), got 0.0"),
        (lambda: credible_sets(Q, unit(5, 4, 0), alpha=95), ValueError, r"`alpha` must lie in \(0, 1\), got 95"),
        (lambda: credible_sets(Q, unit(5, 4, 0), alpha=math.nan), ValueError, "got nan"),
        (lambda: credible_sets(Q.expand((2, 3)), unit(5, 4, 0)), ValueError, r"batch shape \(N,\), got \(2, 3\)"),
        (
            lambda: credible_sets(VonMisesFisher(unit(3, 4, 0), torch.tensor([1.0, 0.0, 2.0])), unit(5, 4, 0)),
            ValueError,
            r"`queries` must have concentrations > 0 and finite, got 0 \(1 of 3\)",
        ),
        (
            lambda: credible_sets(Q, VonMisesFisher(unit(3, 4, 0), torch.zeros(3))),
            ValueError,
            "`gallery` must have concentrations > 0",
        ),
        (lambda: credible_sets(unit(3, 4, 0), unit(5, 4, 0)), TypeError, "`queries` must be VonMisesFisher or Power"),
        (lambda: credible_sets(HypersphericalUniform(4), unit(5, 4, 0)), TypeError, "direction_and_concentration"),
        (lambda: credible_sets(Q, HypersphericalUniform(4)), TypeError, "`gallery` must be unit vectors"),
        (
            lambda: credible_sets(PowerSpherical(unit(3, 4, 0), torch.ones(3)), Q),
            TypeError,
            "pass its mean directions",
        ),
        (lambda: credible_sets(Q, unit(5, 4, 0), exclude=[0, 1]), ValueError, "`exclude` must be 3 integers"),
        (lambda: credible_sets(Q, unit(5, 4, 0), exclude=[0, 1, 5]), ValueError, r"in -1..4 .*, 0 to 5"),
        (lambda: credible_sets(Q, unit(5, 4, 0), exclude=[0.0, 1, 2]), ValueError, "of float64"),
        (lambda: credible_sets(Q, unit(5, 4, 0), backend="annoy"), ValueError, '"torch" or "faiss", got'),
        (lambda: partner_sets(Q, unit(5, 4, 0)), TypeError, "`gallery` must be VonMisesFisher posteriors, got Tensor"),
        (lambda: partner_sets(Q, Q, pair_concentration=0.0), ValueError, "`pair_concentration` must be > 0"),
        (lambda: partner_sets(Q, Q, alpha=1.0), ValueError, r"`alpha` must lie in \(0, 1\), got 1.0"),
        (lambda: cap_area(4.0, 3), ValueError, "`radius` must be in"),
        (lambda: credible_sets(Q, unit(5, 4, 0))[3], IndexError, "`query` must be in 0..2, got 3"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_missing_faiss_is_told_and_the_default_does_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'pip install "pyro-contrastive\[retrieval\]"; or pass backend="torch"'):
        credible_sets(Q, unit(5, 4, 0), backend="faiss")
    assert len(credible_sets(Q, unit(5, 4, 0))) == 3
