"""The examples run with their options, and the user's own model also through pyro-api's backend."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LEVELS = ("50%", "80%", "95%")
RETRIEVAL = {
    *(f"sphere_{what}_{which}_{p}" for what in ("latent", "partner") for which in ("learned", "exact") for p in LEVELS),
    *(f"sphere_{which}_among_all_{p}" for which in ("learned", "exact") for p in (*LEVELS, "size")),
    *(f"sphere_partner_in_{kind}_{which}" for kind in ("set", "cap") for which in ("learned", "exact")),
    *(f"sphere_{kind}_size_{which}" for kind in ("set", "cap") for which in ("learned", "exact")),
    *(f"digits_{what}_{p}" for what in ("partner", "among_all") for p in LEVELS),
    *(
        f"digits_{kind}_{score}"
        for kind in ("set", "cap")
        for score in ("size", "empty", "precision", "recall", "f1", "size_vs_damage")
    ),
    *(f"digits_{score}" for score in ("among_all_size", "recall_at_1", "map_at_r", "aurc", "excess_aurc")),
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("quickstart", {"spearman", "kappa_error", "coverage_50%", "coverage_80%", "coverage_95%"}),
        ("own_model", {"loss", "first_loss", "kappa", "pair_cosine"}),
        ("retrieval", RETRIEVAL),
    ],
)
def test_example_runs_with_its_options_and_writes_a_flat_summary(tmp_path, name, figures):
    command = [
        sys.executable,
        str(EXAMPLES / f"{name}.py"),
        "--small",
        "--seed",
        "1",
        "--device",
        "cpu",
        "--out",
        "run",
    ]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) == figures and all(isinstance(value, float) for value in summary.values())
    assert "it/s" in result.stderr or "step/s" in result.stderr or "s/step" in result.stderr  # a progress bar


def test_own_model_learns_through_the_pyro_api_backend(monkeypatch):
    pyroapi = pytest.importorskip("pyroapi")
    example = load("own_model")
    monkeypatch.setattr(example, "pyro", pyroapi.pyro)
    monkeypatch.setattr(example, "SVI", pyroapi.infer.SVI)
    monkeypatch.setattr(example, "Trace_ELBO", pyroapi.infer.Trace_ELBO)
    monkeypatch.setattr(example, "Adam", pyroapi.optim.Adam)
    state = pyro.util.get_rng_state()
    try:
        with pyroapi.pyro_backend("pyro"):
            figures = example.train(steps=200, device="cpu", batch_size=128)
    finally:
        pyro.util.set_rng_state(state)
        pyro.clear_param_store()
    assert figures["loss"] < figures["first_loss"] - 0.3
    assert figures["kappa"] > 0
