"""Peer supervision runs, goes on where it stopped and scores rightly; the twist leaves MI alone and InfoNCE not."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy import integrate, stats

from pyro_contrastive import guides, nets

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peers, twists = load("peer_supervision"), load("mi_versus_infonce")


def test_peer_supervision_runs_and_resumes(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "peer_supervision.py"), "--small", "--device", "cpu"]
    command += ["--views", "3", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for attempt in range(2):
        started = time.time()
        result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        assert ("step/s" in result.stderr or "s/step" in result.stderr) == (attempt == 0)  # nothing is fitted twice
        rows = sorted((tmp_path / "run").glob("restart-*.json"))
        assert len(rows) == 2 and (attempt == 0 or all(row.stat().st_mtime < started for row in rows))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(isinstance(value, float) for value in summary.values())
    found = [json.loads(row.read_text()) for row in rows]
    best = max(found, key=lambda row: row["log_likelihood"])
    assert summary["test_accuracy_of_highest_likelihood"] == best["test_accuracy"]
    assert result.stdout.count("(highest)") == 1 and len({row["log_likelihood"] for row in found}) == 2


@pytest.mark.parametrize("size", [2, 3])
def test_groups_share_a_class_and_no_image(size):
    labels = torch.randint(10, (500,), generator=torch.Generator().manual_seed(0))
    index = peers.groups(labels, size, seed=3)
    assert bool((labels[index] == labels[index[:, :1]]).all()) and len(index.unique()) == index.numel()
    assert index.numel() > 500 - 10 * size and not torch.equal(index, peers.groups(labels, size, seed=4))


def test_scores_do_not_depend_on_the_names_of_the_states():
    labels = torch.arange(200) % 10
    log_f = torch.full((200, 10), -30.0)
    log_f[torch.arange(200), (3 * labels + 1) % 10] = 0.0  # knows the class, under another name
    test_labels = labels.clone()
    test_labels[:20] = 0  # 18 of 200 are then wrong: two of these are zeros
    found = peers.score((log_f, log_f), (labels, test_labels), peers.groups(labels, 2, seed=0))
    assert found["train_accuracy"] == 1.0 and found["classes_found"] == 10
    assert found["test_accuracy"] == pytest.approx(182 / 200)
    assert found["log_likelihood"] == pytest.approx(np.log(10), abs=1e-4)


def test_score_has_the_likelihood_of_the_model_and_heads_share_one_pass():
    images, labels = torch.rand(60, 1, 8, 8), torch.arange(60) % 10
    index = peers.groups(labels, 3, seed=0)
    encoder = nets.mlp([64, 16])
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    model = peers.Heads(encoder, 4).eval()
    log_f = peers.recognise(model, images)
    assert log_f.shape == (4, 60, 10) and len(calls) == 1
    for number, head in enumerate(model.models):
        evidence = float(head.log_evidence(*(images[column] for column in index.T)).detach().mean())
        found = peers.score((log_f[number], log_f[number]), (labels, labels), index)
        assert found["log_likelihood"] == pytest.approx(evidence, abs=1e-5)
    calls.clear()
    views = list(torch.rand(2, 30, 1, 8, 8))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda *views: None, *views)
    assert len(calls) == 2
    assert loss == pytest.approx(-sum(float(m.log_evidence(*views).detach().sum()) for m in model.models), abs=1e-3)


def test_mnist_is_read_from_an_npz_file(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, num in (("train", 6), ("test", 4)):
        arrays[f"x_{split}"] = generator.integers(0, 256, (num, 28, 28), np.uint8)
        arrays[f"y_{split}"] = np.arange(num, dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    (x, y), (x_test, _) = peers.load_mnist(tmp_path / "mnist.npz", download=False)
    assert x.shape == (6, 1, 28, 28) and x_test.shape == (4, 1, 28, 28) and y.tolist() == list(range(6))
    torch.testing.assert_close(x[:, 0], torch.from_numpy(arrays["x_train"]) / 255)
    assert guides.Categorical(peers.convnet(), 10).posterior(x).probs.shape == (6, 10)


def test_a_twist_is_undone_and_keeps_areas():
    s, _ = twists.sample(50, seed=0)
    torch.testing.assert_close(twists.twist(twists.twist(s, 7.0), -7.0), s, atol=1e-12, rtol=0)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda point: twists.twist(point, 7.0)))(s)
    torch.testing.assert_close(torch.linalg.det(jacobian), torch.ones(50, dtype=s.dtype), atol=1e-10, rtol=0)


def test_density_ratio_averages_to_one_over_partners():
    """The sum over p(s') of p(s'|s)/p(s') is one, with p(s'|s) and p(s') of SciPy for one coordinate."""
    t = np.linspace(0, 1, 801)

    def conditional(u, a):
        return stats.truncnorm.pdf(u, -a / 0.05, (1 - a) / 0.05, loc=a, scale=0.05)

    a, b = np.array([0.02, 0.4]), np.array([0.05, 0.37])
    marginal = [integrate.simpson(conditional(u, t), x=t) for u in b]
    expected = np.log(conditional(b, a) / marginal).sum()
    found = twists.log_density_ratio(torch.from_numpy(a[None]), torch.from_numpy(b[None]))
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_mutual_information_is_blind_to_the_twist_and_the_prior_is_not():
    rows = twists.measure(400, seed=0)
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    assert np.ptp(column["mi"]) < 1e-9 and abs(column["mi"][0] - column["true_mi"][0]) < 0.1
    assert column["mi"][0] - column["infonce"][0] < 0.05  # the kernel is right where nothing is twisted
    assert np.all(np.diff(column["infonce"]) < -0.1) and column["infonce"][-1] < 0.3 * column["mi"][-1]
    assert np.all(np.diff(column["width"]) >= 0) and column["width"][0] == 0.05
    assert column["r2"][0] > 1 - 1e-12 and np.all(np.diff(column["r2"]) < 0) and column["r2"][-1] < 0.1
