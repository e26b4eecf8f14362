"""The controlled experiment and the race: their rows, scores, files, tables; that they run and resume."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from pyro_contrastive.data import PairWorld, SphereWorld
from pyro_contrastive.distributions import VonMisesFisher


class Oracle(nn.Module):
    """Reads the truth off a pair world, in a rotated frame, with concentrations off by a factor."""

    def __init__(self, world, factor=1.0):
        super().__init__()
        self.world, self.factor = world, factor
        self.rotation = torch.linalg.qr(torch.randn(world.dim, world.dim))[0]

    def posterior(self, x):
        mean, kappa = self.world.truth(x)
        return VonMisesFisher(nn.functional.normalize(mean @ self.rotation, dim=-1), self.factor * kappa)


def test_the_exact_posterior_gets_perfect_scores(example):
    world = PairWorld(dim=3, smoothing_steps=100, candidates=512)
    scores = example("_controlled").score(Oracle(world), world, seed=0)
    for name in ("cosine", "kappa", "length"):
        assert scores[f"{name}_pearson"] == pytest.approx(1.0, abs=1e-5)
        assert scores[f"{name}_spearman"] == pytest.approx(1.0, abs=1e-5)
        assert scores[f"{name}_mae"] == pytest.approx(0.0, abs=1e-4)
    assert scores["kappa_error"] == pytest.approx(0.0, abs=1e-5)
    for level in (50, 80, 95):  # 2,000 items: s.d. at most .0112; 4.5 s.d., false alarm below 1e-5 per level over seeds
        assert scores[f"coverage_{level}"] == pytest.approx(level / 100, abs=0.05)


def test_scores_say_by_how_much_the_concentrations_are_off(example):
    world = PairWorld(dim=3, smoothing_steps=100, candidates=512)
    scores = example("_controlled").score(Oracle(world, 2.0), world, seed=0)
    assert scores["kappa_error"] == pytest.approx(1.0, abs=1e-4)
    kappa = world.sample(4_000, seed=0).concentration1.double().numpy()
    assert scores["kappa_mae"] == pytest.approx(kappa.mean(), rel=1e-4)
    length = 1 / np.tanh(2 * kappa) - 1 / (2 * kappa) - (1 / np.tanh(kappa) - 1 / kappa)  # A_3 in closed form
    assert scores["length_mae"] == pytest.approx(length.mean(), rel=1e-3)
    assert scores["coverage_50"] < 0.42  # twice as sure as it should be


def test_cosine_scores_are_those_of_the_pairs_below_the_diagonal(example, monkeypatch):
    module = example("_controlled")
    monkeypatch.setattr(module, "SCORED_PAIRWISE", 40)
    world, other = PairWorld(dim=3, smoothing_steps=50), PairWorld(dim=3, smoothing_steps=50, seed=1)
    scores = module.score(Oracle(other), world, seed=3)
    x = world.sample(4_000, seed=3).x1[:40]
    (a, _), (b, _) = world.truth(x), other.truth(x)
    truth = [float(a[i] @ a[j]) for i in range(40) for j in range(i)]
    estimate = [float(b[i] @ b[j]) for i in range(40) for j in range(i)]
    assert scores["cosine_pearson"] == pytest.approx(stats.pearsonr(truth, estimate).statistic, abs=1e-5)
    assert scores["cosine_spearman"] == pytest.approx(stats.spearmanr(truth, estimate).statistic, abs=1e-4)
    assert scores["cosine_mae"] == pytest.approx(np.mean(np.abs(np.subtract(truth, estimate))), abs=1e-5)


def test_rows_are_those_of_the_scripts(example):
    module = example("_controlled")
    rows = module.ROWS
    for dim in (4, 8, 16, 32, 64, 128):
        assert rows[f"encoder-{dim}"].encoder_dim == dim and rows[f"encoder-{dim}"].dim == 10
    for dim in (16, 32, 40, 48, 56, 64, 128):
        assert rows[f"highdim-{dim}"].dim == dim
    assert {rows[f"samples-{k}"].num_samples for k in (1, 4, 16, 64, 256, 512)} == {1, 4, 16, 64, 256, 512}
    for name, row in rows.items():
        model, guide = module.make_pair(row, 10, seed=4)
        assert guide.dim == (row.encoder_dim or row.dim), name
        assert float(getattr(model, "concentration", 20.0)) in (20.0, math.inf)
    assert isinstance(module.make_world(rows["clear"], "sphere", 4), SphereWorld)
    assert module.make_world(rows["laplace"], "pair", 4, small=True).family == "laplace"
    assert rows["laplace"].worlds() == ("pair",)
    first, second = (module.make_pair(rows[name], 10, seed=4)[1] for name in ("ambiguous", "samples-16"))
    assert torch.equal(first.direction.weight, second.direction.weight)  # from the same initialisation


@pytest.mark.parametrize("name", ["injective", "laplace"])
def test_runs_resume_and_make_a_table(example, tmp_path, capsys, name):
    module = example("mcinfonce_controlled")
    command = ["--small", "--rows", name, "samples-4", "--seeds", "4", "--worlds", "pair", "--out", str(tmp_path)]
    module.main(module.parse(command))
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"pair-{name}-4.json", "pair-samples-4-4.json"}
    result = json.loads((tmp_path / f"pair-{name}-4.json").read_text())
    assert result["steps"] == 20 and result["status"] == "done" and result["cpu_seconds"] > 0
    assert (result["kappa_error"] is None) == (name == "injective")
    assert "1 of 2" in capsys.readouterr().out
    module.main(module.parse(command))
    assert capsys.readouterr().out == ""  # nothing was missing
    lines = module.table(tmp_path, ["ambiguous", name, "samples-4"]).splitlines()
    row = next(line for line in lines if line.startswith(f"| {name}:"))  # the pair world comes first
    assert f"{result['cosine_mae']:.3f}" in row
    assert sum("not run" in line for line in lines) == (4 if name == "injective" else 3)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    page = tmp_path / "page.md"
    page.write_text("# Mine\n")
    for tables in ("first\n", "second\n"):
        module.write_tables(page, module.MARKER, tables)
    assert page.read_text() == f"# Mine\n{module.MARKER}\n\nsecond\n"


def test_an_unknown_row_is_refused(example, capsys):
    with pytest.raises(SystemExit):
        example("mcinfonce_controlled").parse(["--rows", "ambigous"])
    assert "no row matches; the rows are ambiguous, clear" in capsys.readouterr().err


def test_the_race_runs_resumes_and_is_drawn(example, tmp_path, capsys):
    module = example("mcinfonce_race")
    command = ["--small", "--contenders", "exact", "16 samples", "--out", str(tmp_path)]
    module.main(module.parse(command))
    curves = [json.loads((tmp_path / name).read_text())["curve"] for name in ("exact.json", "16-samples.json")]
    assert curves[0][0]["kappa_error"] == curves[1][0]["kappa_error"]  # from the same weights
    for curve in curves:
        seconds = [point["cpu_seconds"] for point in curve]
        assert seconds == sorted(seconds) and seconds[-1] < 10 and curve[-1]["step"] >= 2
    capsys.readouterr()
    module.main(module.parse(command))
    assert capsys.readouterr().out == ""
    module.main(module.parse(["--out", str(tmp_path), "--figure", str(tmp_path / "figures" / "race.png")]))
    assert (tmp_path / "figures" / "race.png").read_bytes()[:4] == b"\x89PNG"
