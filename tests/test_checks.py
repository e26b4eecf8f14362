"""Opinions with a known answer: which line must ring for which wrong posterior, and that a right one is left alone.

Tests of one page share a false-alarm rate of 1 % (Bonferroni); seeds are fixed.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pyro_contrastive import diagnostics as dg
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.diagnostics.checks import FAMILY_LEVEL, Check, grade, verdict, worst
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.kernels import expected_log_ratio

D, N, TESTS = 10, 600, 6
WORLD = SphereWorld(dim=D, pair_concentration=20.0)
NON_UNIFORM = SphereWorld(D, pair_concentration=math.inf, prior_concentration=20.0)


def page(
    seed: int = 0, *, world=WORLD, n: int = N, factor: float = 1.0, move=lambda m: m, permute=False, scale: float = 1.0
) -> dict[str, Check]:
    """All checks of a posterior that is the exact one but for what is changed, by name."""
    batch = world.sample(n, seed=seed)
    laws = []
    for view in (1, 2):
        exact = world.posterior(batch, view)
        kappa = exact.concentration * factor
        laws.append(VonMisesFisher(move(exact.mean_direction), kappa.flip(0) if permute else kappa))
    law = laws[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draws = law.sample().numpy()
    each = FAMILY_LEVEL / TESTS
    score = dg.align_and_score(
        law.mean_direction,
        law.concentration,
        batch.z1,
        true_mean_direction=batch.mean_direction1,
        true_concentration=batch.concentration1,
        seed=seed,
    )
    pit = dg.cap_pit(law, batch.z1)
    views = [torch.cat([one.mean_direction, one.concentration[:, None]], dim=-1) for one in laws]

    def logits(*rows):
        inner = [VonMisesFisher(row[:, :D], row[:, D]) for row in rows]
        return scale * expected_log_ratio(*inner, world.pair_concentration)

    partner = dg.partner_check(logits, None, views, num_candidates=n // 20)
    checks = [
        dg.judge_coverage(pit, level=each),
        dg.judge_pit(pit, level=each),
        dg.judge_tarp(dg.tarp(law, batch.z1, num_draws=49, num_bootstrap=1, seed=seed), level=each),
        dg.judge_recovery(law.concentration, batch.concentration1),
        dg.judge_directions(score.cosine_correlation, score.mean_angle),
        dg.judge_partner(partner, level=each),
        dg.judge_partner_reliability(partner, level=each),
        dg.judge_concentration(law.concentration, D),
        dg.judge_uniformity(draws, level=each),
        dg.judge_dimensions(law.mean_direction),
    ]
    return {check.name: check for check in checks}


def test_the_exact_posterior_passes_every_check():
    # Each page raises any alarm with probability 1 % at most, so that any of 20 pages does with 18 % at most; the other
    # checks have no chance to (their thresholds are more than six standard errors away). Fixed seeds.
    for seed in range(20):
        found = page(seed)
        assert {name for name, check in found.items() if check.status != "pass"} == set(), seed
        assert verdict(list(found.values()))[0] == "pass"


COVERAGE, PIT, RECOVERY = "Coverage of caps", "PIT uniformity", "Concentration recovery"
WIDTHS, AGGREGATE, DIMENSIONS = "Range of the concentrations", "Uniform aggregate", "Dimensions in use"
DIRECTIONS, PARTNER, STATED = "Direction recovery", "Partner among candidates", "Partner probabilities"


def to_the_pole(strength: float):
    return lambda m: normalize(m + strength * torch.eye(D)[0], dim=-1)


@pytest.mark.parametrize(
    ("wrong", "ringing", "meaning", "remedy"),
    [
        ({"factor": 4.0}, [COVERAGE, PIT, RECOVERY], "over-confident", "larger pair concentration"),
        ({"factor": 0.25}, [COVERAGE, PIT, RECOVERY], "under-confident", "smaller pair concentration"),
        ({"factor": 1e-4}, [WIDTHS, COVERAGE], "collapsed", "`models.RPM`"),
        ({"factor": 1e4}, [WIDTHS, COVERAGE], "ran away", "`math.inf`"),
        ({"permute": True}, [RECOVERY], "do not rank", "More steps"),
        ({"world": NON_UNIFORM}, [AGGREGATE], "not uniform", 'marginal="empirical"'),
        ({"move": to_the_pole(5.0)}, [DIMENSIONS, AGGREGATE, COVERAGE], "crowded", "`nn.BatchNorm1d(width"),
        ({"move": lambda m: torch.cat([m[:, :2], 0 * m[:, 2:]], -1)}, [DIRECTIONS, COVERAGE], "geometry", "encoder"),
        ({"move": lambda m: m[torch.randperm(len(m))]}, [PARTNER, DIRECTIONS, COVERAGE], "find its partner", "row i"),
        ({"scale": 4.0}, [STATED], "too sure", "over-fitting"),
    ],
    ids=["over", "under", "collapsed", "runaway", "order", "non-uniform", "crowded", "flat", "shuffled", "sure"],
)  # fmt: skip
def test_the_right_line_rings_and_names_the_remedy(wrong, ringing, meaning, remedy):
    if "move" in wrong:
        inner = wrong["move"]
        wrong = {**wrong, "move": lambda m: normalize(inner(m), dim=-1)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = page(**wrong)
    for name in ringing:
        assert found[name].status == "fail", (name, found[name])
    assert meaning in found[ringing[0]].meaning and remedy in found[ringing[0]].remedy, found[ringing[0]]


def test_lines_that_a_fault_does_not_concern_stay_silent():
    over = page(factor=4.0)
    assert {over[name].status for name in (DIRECTIONS, PARTNER, WIDTHS, AGGREGATE, DIMENSIONS)} == {"pass"}
    tilted = page(world=SphereWorld(D, pair_concentration=math.inf, prior_concentration=2.0))  # mean length .2: a note
    assert tilted[AGGREGATE].status == "warn" and "level of the widths" in tilted[AGGREGATE].meaning
    cautious = page(scale=0.25)[STATED]
    assert cautious.status in ("warn", "fail") and "cautious" in cautious.meaning


def gap_pit(gap: float, n: int) -> np.ndarray:
    """PIT values, evenly spread, whose share below one half is half plus the gap."""
    u = (np.arange(n) + 0.5) / n
    return np.where(u < 0.5 + gap, u / (1 + 2 * gap), 1 - (1 - u) / (1 - 2 * gap))


@pytest.mark.parametrize("judge", [dg.judge_coverage, dg.judge_pit])
def test_neither_many_items_nor_few_make_an_opinion(judge):
    assert judge(gap_pit(0.02, 100_000)).status == "pass"  # p < 1e-30, and nobody would notice
    assert judge(gap_pit(0.05, 100_000)).status == "warn"
    assert judge(gap_pit(-0.15, 100_000)).status == "fail"
    few = judge(gap_pit(0.15, 50))
    assert few.status == "skip" and "judge more items" in few.meaning


def test_a_gap_names_its_side():
    assert "under-confident" in dg.judge_coverage(gap_pit(0.2, 1000)).meaning
    assert "over-confident" in dg.judge_coverage(gap_pit(-0.2, 1000)).meaning


def test_simulation_based_calibration_names_the_quantity():
    rng = np.random.default_rng(0)
    pit = {"angle": rng.uniform(size=2000), "density": rng.beta(2, 2, size=2000)}
    sbc = SimpleNamespace(pit=pit, pvalues={name: dg.uniformity_pvalue(values) for name, values in pit.items()})
    check = dg.judge_sbc(sbc)
    assert check.status == "fail" and check.meaning.endswith("in: density.")
    del pit["density"]
    assert dg.judge_sbc(sbc).status == "pass"
    pit["angle"] = pit["angle"][:20]
    assert dg.judge_sbc(sbc).status == "skip"
    with pytest.raises(ValueError, match="at least one quantity"):
        dg.judge_sbc(SimpleNamespace(pit={}, pvalues={}))
    shifted = SimpleNamespace(probabilities=pit, statistics={"angle": 0.3}, pvalues={"angle": 1e-9})
    assert dg.judge_variational_sbc(shifted).status == "fail"


def test_concentration_recovery_at_its_ends():
    truth = np.geomspace(16.0, 64.0, 200)
    assert dg.judge_recovery(1.1 * truth, truth).status == "pass"
    assert dg.judge_recovery(1.5 * truth, truth).status == "warn"
    infinite = dg.judge_recovery(np.full(200, np.inf), truth)
    assert infinite.status == "fail" and "too large" in infinite.meaning and "do not rank" in infinite.meaning
    assert dg.judge_recovery(np.zeros(200), truth).status == "fail"
    assert dg.judge_recovery(np.full(200, np.inf), np.full(200, np.inf)).status == "pass"  # views without ambiguity
    constant = dg.judge_recovery(np.full(200, 30.0), truth)
    assert constant.status == "fail" and "do not rank" in constant.meaning
    with pytest.raises(ValueError, match="judge more items"):
        dg.judge_recovery(truth[:5], truth[:5])


def test_concentrations_at_their_ends():
    assert dg.judge_concentration([np.nan, 1.0], 4).status == "fail"
    assert dg.judge_concentration([np.inf] * 20, 4).status == "skip"  # a point guide
    assert dg.judge_concentration([np.inf] * 2 + [9.0, 10.0] * 9, 4).status == "warn"
    assert dg.judge_concentration([0.0] * 20, 4).status == "fail"
    assert "same width" in dg.judge_concentration([30.0] * 20, 4).meaning
    assert dg.judge_concentration([30.0], 4).status == "pass"
    assert dg.judge_concentration(np.geomspace(100, 400, 50), 512).status == "pass"
    with pytest.raises(ValueError, match="at least one item"):
        dg.judge_concentration([], 4)


def test_a_fit_that_assumes_no_uniform_marginal_is_not_blamed_for_one():
    points = np.tile(np.eye(3), (50, 1))
    check = dg.judge_uniformity(points, assumed=False)
    assert check.status == "pass" and "does not assume" in check.meaning


def test_dimensions():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2000, 32))
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z, z * (np.arange(32) < 6), z * (np.arange(32) < 2))]
    assert [dg.judge_dimensions(u).status for u in unit] == ["pass", "warn", "fail"]
    assert dg.judge_dimensions(unit[1]).value.startswith("6.0 of 32 dimensions")


def test_the_level_is_an_assumption_unless_it_is_too_small():
    batch = WORLD.sample(256, seed=0)
    exact = [WORLD.posterior(batch, view) for view in (1, 2)]
    profile = dg.identifiability(*exact, 20.0, grid=[40.0, math.inf], batch_size=128)
    check = dg.judge_level(20.0, profile=profile)
    assert check.status == "skip" and "20 to infinity" in check.value and "assumption" in check.meaning
    ran_away = [VonMisesFisher(law.mean_direction, 1e3 * law.concentration) for law in exact]
    profile = dg.identifiability(*ran_away, 5.0, grid=[40.0], batch_size=128)
    check = dg.judge_level(5.0, profile=profile)
    assert check.status == "warn" and "too small" in check.meaning and "larger" in check.remedy


def test_the_level_without_a_profile():
    for check in (dg.judge_level(20.0), dg.judge_level(math.inf), dg.judge_level(None)):
        assert check.status == "skip"
    assert "learned" in dg.judge_level(12.0, learned=True).value and "shared latent" in dg.judge_level(math.inf).value


def noisy(curve: np.ndarray) -> dict[str, list[float]]:
    return {"loss": list(curve + 0.01 * np.random.default_rng(0).normal(size=len(curve)))}


STEPS = np.linspace(0.0, 1.0, 60)


@pytest.mark.parametrize(
    ("history", "status", "text"),
    [
        (noisy(np.exp(-12 * STEPS)), "pass", "settled"),
        (noisy(np.exp(-4 * STEPS)), "warn", "still falling"),
        (noisy(1 - STEPS), "fail", "still falling"),
        (noisy(np.exp(-12 * STEPS) + np.maximum(STEPS - 0.7, 0.0)), "warn", "rose again"),
        (noisy(0 * STEPS), "fail", "has not fallen"),
        (noisy(STEPS), "fail", "has not fallen"),
        ({"loss": [3.0, math.nan, 2.0]}, "fail", "not finite"),
        ({"loss": [3.0] * 20 + [None]}, "fail", "not finite"),
        ({"loss": [3.0, 2.0, 1.0]}, "skip", "log more often"),
        ({"elbo": [3.0]}, "skip", "no column"),
    ],
)
def test_training(history, status, text):
    check = dg.judge_training(history)
    assert check.status == status and text in check.meaning, check


def test_batch_size():
    assert dg.judge_batch(256, 64).status == "pass"
    assert dg.judge_batch(100, 64).status == "warn" and dg.judge_batch(64, 64).status == "fail"
    check = dg.judge_batch(64, 8, nats=3.5)  # log 64 = 4.2
    assert check.status == "warn" and "91 pairs" in check.remedy  # exp(4.5)
    with pytest.raises(ValueError, match=">= 2"):
        dg.judge_batch(1, 8)


def test_corruption():
    rng = np.random.default_rng(0)
    level = rng.uniform(size=500)
    assert dg.judge_corruption(-level, level).status == "pass"
    assert dg.judge_corruption(-level + 0.8 * rng.normal(size=500), level).status == "warn"  # rank correlation .35
    assert dg.judge_corruption(rng.normal(size=500), level).status == "fail"
    assert dg.judge_corruption(rng.normal(size=20), level[:20]).status == "skip"
    assert dg.judge_corruption(np.ones(500), level).status == "skip"


def test_mistakes():
    rng = np.random.default_rng(0)
    kappa = rng.normal(size=1000)
    for slope, status in ((2.0, "pass"), (0.3, "warn"), (0.0, "fail"), (-1.0, "fail")):
        correct = rng.uniform(size=1000) < 1 / (1 + np.exp(-slope * kappa))
        assert dg.judge_accuracy(kappa, correct).status == status, slope
    assert dg.judge_accuracy(kappa, np.ones(1000)).status == "skip"  # no mistakes
    assert dg.judge_accuracy(np.full(1000, np.inf), kappa > 0).status == "skip"
    assert dg.judge_accuracy(kappa[:24], np.arange(24) % 2 == 0).status == "skip"


def test_khat():
    def check(*values: float) -> Check:
        return dg.judge_khat(SimpleNamespace(khat=np.array(values), threshold=0.7))

    assert check(*[0.2] * 40).status == "pass"
    assert check(*[0.2] * 38, 0.9, math.inf).status == "warn"
    assert check(*[0.2] * 10, *[math.nan] * 10).status == "fail" and "family" in check(0.9).remedy


def test_partner_on_few_pairs():
    logits = np.random.default_rng(0).normal(size=(12, 12))
    one = dg.partner_check(logits, num_candidates=12)
    assert dg.judge_partner(one).status == "skip" and dg.judge_partner_reliability(one).status == "skip"
    assert dg.judge_partner(dg.partner_check(9 * np.eye(12), num_candidates=4)).status == "pass"


def test_a_check_must_say_what_to_try():
    with pytest.raises(ValueError, match="must name a `remedy`"):
        Check("x", "warn", "1", "bad")
    with pytest.raises(ValueError, match="`status` must be one of fail, warn"):
        Check("x", "ok", "1", "fine")  # type: ignore[arg-type]


def test_grades_and_verdicts():
    assert grade(math.nan, 1, 2) == ("skip", False)
    assert grade(3, 1, 2, significant=False) == ("pass", False)
    assert worst([]) == "skip" and worst(["skip", "pass", "warn", "fail"]) == "fail"
    runs = [Check("A", "pass", "", ""), Check("A", "fail", "", "", "try"), Check("B", "skip", "", "")]
    assert verdict(runs) == ("fail", "Do not trust these posteriors yet: 1 fails (A), 1 cannot be judged.")
    assert verdict([])[1] == "Nothing could be judged: no checks."
