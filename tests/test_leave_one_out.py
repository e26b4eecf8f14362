"""The example that shows why pointwise leave-one-out fails on coupled rows: identity, sampler, outcome, options."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, special

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("example_leave_one_out", ROOT / "examples" / "leave_one_out.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_likelihood(theta, x, y):
    total = 0.0
    for i in range(len(x)):
        logits = [float((theta * x[i]) @ y[j]) for j in range(len(y))]
        total += logits[i] - special.logsumexp(logits)
    return total


def test_pair_left_out_is_its_row_and_its_column(example):
    rng = np.random.default_rng(0)
    x, y, theta = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.normal(size=(2, 3))
    found = example.log_without(example.log_softmax(theta, x, y))
    for s in range(2):
        for i in range(6):
            keep = np.arange(6) != i
            expected = log_likelihood(theta[s], x, y) - log_likelihood(theta[s], x[keep], y[keep])
            assert found[s, i] == pytest.approx(expected)


def test_sampler_is_that_of_quadrature(example):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 1))
    draws, log_weight = example.posterior(x, y, 40_000, rng)

    def integral(function):
        return integrate.quad(lambda t: function(t) * np.exp(log_likelihood(t, x, y) - 0.5 * t**2), -8, 8)[0]

    weight = special.softmax(log_weight)
    for function in (lambda t: t, np.square):
        value = function(draws[:, 0])
        expected = integral(function) / integral(lambda t: 1.0)
        error = np.sqrt((weight**2 * (value - expected) ** 2).sum())
        assert abs(weight @ value - expected) < 4 * error < 0.1  # false-alarm rate 6e-5
    assert example.log_mean(draws[:, 0], log_weight) == pytest.approx(np.log(weight @ np.exp(draws[:, 0])))


def test_coupled_ratio_agrees_with_refits_and_the_rows_own_does_not(example, monkeypatch):
    monkeypatch.setattr(example, "PAIRS", 24)
    monkeypatch.setattr(example, "WEIGHTS", 8)
    found = example.bilinear(num_sets=6, num_draws=1_000, seed=0)
    assert abs(found["bilinear_coupled_minus_refit"]) < 4 * found["bilinear_coupled_minus_refit_se"] < 0.05
    assert found["bilinear_arviz_loo_minus_refit"] < -5 * found["bilinear_arviz_loo_minus_refit_se"]
    assert found["bilinear_training"] > found["bilinear_refit"] + 0.2
    assert found["bilinear_khat"] < 0.2  # and no alarm rings


def test_example_runs_with_its_options(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "examples" / "leave_one_out.py"),
        "--small",
        "--device",
        "cpu",
        "--out",
        "run",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"bilinear_refit", "by_heart_arviz_loo", "by_heart_new_pairs"} < set(summary)
    assert all(isinstance(value, float) for value in summary.values())
