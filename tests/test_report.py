from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import arviz as az
import numpy as np
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_contrastive import distributions as dist
from pyro_contrastive.diagnostics import (
    Check,
    Picture,
    Section,
    image_report,
    pair_report,
    sphere_report,
    write_html,
    write_summary,
)

D = 4


class World:
    """Views show the exact posterior in a rotated frame: x = (m R, log kappa)."""

    def __init__(self) -> None:
        self.rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]

    def sample(self, n, *, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            z1 = nn.functional.normalize(torch.randn(n, D), dim=-1)
            z = [z1, dist.VonMisesFisher(z1, torch.full((n,), 20.0)).sample()]
            kappa = [torch.exp(torch.empty(n).uniform_(math.log(8), math.log(64))) for _ in z]
            m = [dist.VonMisesFisher(a, k).sample() for a, k in zip(z, kappa, strict=True)]
        x = [torch.cat([a @ self.rotation, k.log()[:, None]], dim=-1) for a, k in zip(m, kappa, strict=True)]
        return SimpleNamespace(
            x1=x[0], x2=x[1], z1=z[0], z2=z[1],
            mean_direction1=m[0], mean_direction2=m[1], concentration1=kappa[0], concentration2=kappa[1],
        )  # fmt: skip

    def posterior(self, batch, view=1):
        return dist.VonMisesFisher(batch.mean_direction1, batch.concentration1)


class Guide(PyroModule):
    """Reads the posterior off the view, its concentration times a factor (1 is exact)."""

    def __init__(self, factor: float = 1.0, family: str = "vmf") -> None:
        super().__init__()
        self.factor, self.family = factor, family

    def posterior(self, x):
        direction, kappa = nn.functional.normalize(x[..., :D], dim=-1), self.factor * x[..., D].exp()
        if self.family == "delta":
            return pyro_dist.Delta(direction, event_dim=1)
        return dist.VonMisesFisher(direction, kappa)

    def forward(self, x1, x2):
        with pyro.plate("pairs", len(x1)):
            return pyro.sample("z1", self.posterior(x1)), pyro.sample("z2", self.posterior(x2))


class Model(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.concentration = 20.0

    def forward(self, x1, x2):
        with pyro.plate("pairs", len(x1)):
            z1 = pyro.sample("z1", dist.HypersphericalUniform(D))
            pyro.sample("z2", dist.VonMisesFisher(z1, torch.tensor(self.concentration)))

    def partner_logits(self, x1, x2):
        return 20.0 * x1.flatten(1)[:, :D] @ x2.flatten(1)[:, :D].mT


def test_sphere_report_of_an_exact_posterior(tmp_path):
    section = sphere_report(Model(), Guide(), World(), tmp_path, num_items=800, seed=1, history={"loss": [3.0, 2.0]})
    figures = section.figures
    assert figures["spearman_concentration"] == pytest.approx(1.0)
    assert figures["concentration_error"] < 1e-4 and figures["cosine_correlation"] == pytest.approx(1.0)
    # 400 items: 4 standard errors of a binomial share, false-alarm rate 2e-4 in all (fixed seed)
    for level in (50, 80, 95):
        bound = 4 * math.sqrt(level / 100 * (1 - level / 100) / 400)
        assert abs(figures[f"coverage_{level}"] - level / 100) < bound
    assert figures["pit_pvalue"] > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    # the pairs of draws of exact posteriors are less concentrated than the latents: m is not z
    assert figures["pair_concentration"] == 20.0 and 2 < figures["pair_concentration_sampled"] < 20
    assert figures["partner_accuracy"] > 0.05
    assert {p.path.name for p in section.pictures} == {
        *("coverage.png", "pit.png", "concentration_recovery.png", "aggregate.png", "history.png")
    }
    data = az.from_netcdf(tmp_path / "posterior.nc")
    assert data["posterior"]["z1"].shape == (1, 100, 256, D)
    assert "calibrated" in section.reading[0] and "close to uniform" in section.reading[1]
    # six tests share a false-alarm rate of 1 % (fixed seed)
    statuses = {check.name: check.status for check in section.checks}
    assert {name for name, status in statuses.items() if status == "pass"} == {
        *("Coverage of caps", "PIT uniformity", "Expected coverage (TARP)", "Concentration recovery"),
        *("Direction recovery", "Partner among candidates", "Range of the concentrations", "Uniform aggregate"),
        "Dimensions in use",
    }
    # these logits are not those of the exact evidence; two rows are no history
    assert statuses["Partner probabilities"] == "fail" and statuses["Training"] == "skip"


def test_sphere_report_calls_wrong_widths_by_their_name(tmp_path):
    over = sphere_report(Model(), Guide(4.0), World(), tmp_path / "over", num_items=600)
    under = sphere_report(Model(), Guide(0.25), World(), tmp_path / "under", num_items=600)
    assert "over-confident" in over.reading[0] and "under-confident" in under.reading[0]
    for section in (over, under):
        failing = {check.name for check in section.checks if check.status == "fail"}
        assert failing >= {"Coverage of caps", "PIT uniformity", "Concentration recovery"}
        assert section.status == "fail" and "Uniform aggregate" not in failing
    assert over.figures["concentration_error"] == pytest.approx(3.0, rel=1e-3)
    assert over.figures["pit_pvalue"] < 1e-10 and under.figures["pit_pvalue"] < 1e-10


def test_sphere_report_of_a_point_guide(tmp_path):
    section = sphere_report(Model(), Guide(family="delta"), World(), tmp_path, num_items=100)
    assert math.isnan(section.figures["spearman_concentration"])
    statuses = {check.name: check.status for check in section.checks}
    assert statuses["Range of the concentrations"] == "skip" and statuses["Concentration recovery"] == "fail"
    assert section.figures["coverage_95"] == 0.0 and math.isinf(section.figures["concentration_q05"])
    assert json.loads(write_summary(tmp_path, [section]).read_text())["sphere_concentration_q05"] is None


class ImageGuide(PyroModule):
    """Embeds an image by its colour channels' means; the dimmer, the less sure."""

    def __init__(self, family: str = "vmf") -> None:
        super().__init__()
        self.family = family

    def posterior(self, x):
        direction = nn.functional.normalize(x.reshape(len(x), D, -1).mean(-1) + 1e-3, dim=-1)
        if self.family == "delta":
            return pyro_dist.Delta(direction, event_dim=1)
        return dist.VonMisesFisher(direction, 100 * x.flatten(1).mean(-1) + 1)

    def forward(self, x1, x2):
        with pyro.plate("pairs", len(x1)):
            return pyro.sample("z1", self.posterior(x1)), pyro.sample("z2", self.posterior(x2))


def labelled_images(n: int, seed: int):
    """Class c is bright in the c-th quarter of its rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, D, (n,), generator=generator)
    images = 0.3 * torch.rand(n, D, 2, 8, generator=generator)
    images[torch.arange(n), labels] += 0.6
    return images.reshape(n, 1, 8, 8), labels


def dropout(images, level, generator):
    keep = torch.rand(images.shape, generator=generator) >= level.reshape(-1, 1, 1, 1)
    return images * keep


def test_image_report(tmp_path):
    images, labels = labelled_images(200, 0)
    train, train_labels = labelled_images(300, 1)
    section = image_report(
        Model(), ImageGuide(), images, labels, train, train_labels, dropout, tmp_path, seed=3, max_level=0.95
    )
    figures = section.figures
    assert figures["spearman_corruption"] > 0.9 and figures["knn_clean"] == 1.0
    assert figures["knn_corrupted"] < 1.0
    assert figures["knn_corrupted"] == pytest.approx(np.mean([figures[f"accuracy_q{k}"] for k in (1, 2, 3, 4)]))
    assert figures["accuracy_drop"] == pytest.approx(figures["accuracy_q1"] - figures["accuracy_q4"]) and (
        figures["accuracy_drop"] > 0
    )
    assert {p.path.stem for p in section.pictures} == {
        *(
            "concentration_vs_corruption",
            "accuracy_by_quartile",
            "neighbours_surest",
            "neighbours_least_sure",
            "aggregate",
        )
    }
    assert az.from_netcdf(tmp_path / "posterior.nc")["posterior"]["z2"].shape == (1, 100, 200, D)
    assert "not uniform" in section.reading[-1]
    statuses = {check.name: check.status for check in section.checks}
    assert statuses["Width against corruption"] == "pass" and statuses["Uniform aggregate"] != "pass"
    again = image_report(
        Model(), ImageGuide(), images, labels, train, train_labels, dropout, tmp_path, seed=3, max_level=0.95
    )
    assert again.figures == figures


def test_image_report_of_a_point_guide(tmp_path):
    images, labels = labelled_images(40, 0)
    section = image_report(Model(), ImageGuide("delta"), images, labels, images, labels, dropout, tmp_path)
    assert math.isnan(section.figures["spearman_corruption"]) and math.isnan(section.figures["accuracy_q1"])
    assert [p.path.stem for p in section.pictures] == ["aggregate"]


def test_pair_report_of_ones_own_pair(tmp_path):
    batch = World().sample(480, seed=4)
    labels = batch.mean_direction1.abs().argmax(-1)  # no class is more ambiguous than another
    own = Check("My own check", "warn", "7", "It is seven.", "Make it eight.")
    history = {"step": list(range(40)), "loss": list(np.exp(-np.arange(40.0)))}
    section = pair_report(
        Model(), Guide(), (batch.x1, batch.x2), tmp_path, labels=labels, history=history, batch_size=256, checks=[own]
    )
    statuses = {check.name: check.status for check in section.checks}
    assert section.checks[0] == own and section.kind == "pair" and section.status == "fail"
    assert statuses["Mistakes among the least sure"] in ("fail", "skip", "warn")  # kappa has nothing to do with labels
    for name in ("Partner among candidates", "Uniform aggregate", "Dimensions in use", "Training", "Batch size"):
        assert statuses[name] == "pass", name
    figures = section.figures
    assert figures["knn_accuracy"] > 0.5 and figures["partner_information"] > 0.5  # guessing: .25 and 0
    assert {p.path.stem for p in section.pictures} == {
        *("risk_coverage", "accuracy_by_quartile", "aggregate", "history")
    }  # fmt: skip
    assert all(": " in picture.alt for picture in section.pictures)
    assert az.from_netcdf(tmp_path / "posterior.nc")["posterior"]["z1"].shape == (1, 100, 256, D)
    summary = json.loads(write_summary(tmp_path, [section]).read_text())
    assert summary["verdict"] == "fail" and summary["pair_knn_accuracy"] == figures["knn_accuracy"]
    assert summary["checks"][0] == {
        "kind": "pair", "seed": 0, "name": "My own check", "status": "warn", "value": "7", "meaning": "It is seven.",
        "remedy": "Make it eight.",
    }  # fmt: skip


def test_pair_report_needs_little(tmp_path):
    batch = World().sample(64, seed=0)
    views = (batch.x1, batch.x2)

    def model(x1, x2):
        with pyro.plate("pairs", len(x1)):
            pyro.sample("z1", dist.HypersphericalUniform(D))
            pyro.sample("z2", dist.HypersphericalUniform(D))

    before = torch.get_rng_state()
    section = pair_report(model, Guide(), views, tmp_path)  # a plain function without logits; no labels, no history
    assert torch.equal(before, torch.get_rng_state())
    statuses = {check.name: check.status for check in section.checks}
    assert statuses["Partner among candidates"] == "skip" and statuses["Level of the concentrations"] == "skip"
    assert section.pictures[-1].path.stem == "aggregate"
    with pytest.raises(ValueError, match="one length >= 40, got lengths \\[64, 63\\]"):
        pair_report(model, Guide(), (batch.x1, batch.x2[1:]), tmp_path)
    with pytest.raises(ValueError, match="`labels` must have shape"):
        pair_report(model, Guide(), views, tmp_path, labels=[1, 2])
    with pytest.raises(TypeError, match="must have a method posterior"):
        pair_report(model, model, views, tmp_path)


@dataclass
class Written:
    html: str
    summary: dict


@pytest.fixture
def written(tmp_path):
    png = tmp_path / "a_picture.png"
    png.write_bytes(b"\x89PNG fake")
    sections = [
        Section(
            "Images <b>",
            "image",
            seed,
            {"knn_clean": 0.9 + seed / 100, "own_figure": math.nan},
            [Picture(png, "cap & tion")],
        )
        for seed in (0, 1)
    ] + [Section("World", "sphere", 5, {"coverage_50": 0.512, "concentration_q95": math.inf}, [], ["All is well."])]
    html = write_html(tmp_path / "new" / "folder", "A report", sections).read_text()
    return Written(html, json.loads(write_summary(tmp_path, sections).read_text()))


def test_html_is_self_contained_and_has_a_table_over_seeds(written):
    assert not re.search(r'(src|href)="(?!data:|#)', written.html) and "://" not in written.html
    assert written.html.count("data:image/png;base64,iVBORyBmYWtl"[:22]) == 2
    assert "seed 0" in written.html and "seed 1" in written.html and ">mean<" in written.html
    for text in ("0.900", "0.910", "0.905", "own figure", "0.512", "All is well."):
        assert text in written.html
    assert "Images &lt;b&gt;" in written.html and "cap &amp; tion" in written.html
    assert written.html.count("<details>") == 1  # the second seed unfolds


def test_summary_is_flat_valid_json(written):
    assert written.summary == {
        "image_knn_clean": pytest.approx(0.905),
        "image_own_figure": None,
        "image_seed0_knn_clean": 0.9,
        "image_seed0_own_figure": None,
        "image_seed1_knn_clean": 0.91,
        "image_seed1_own_figure": None,
        "sphere_coverage_50": 0.512,
        "sphere_concentration_q95": None,
    }


def test_a_report_needs_a_section(tmp_path):
    with pytest.raises(ValueError, match="at least one section"):
        write_html(tmp_path, "empty", [])
