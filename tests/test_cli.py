"""The command line: it teaches, it names what is wrong, and its exit codes can be relied on."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from pyro_contrastive.checkpoint import load_checkpoint
from pyro_contrastive.choices import DATA, EVIDENCES, GUIDES, METHODS
from pyro_contrastive.cli import _load, main
from pyro_contrastive.registry import Run, RunConfig


def fit_args(out, *more):
    return ["fit", "--method", "mcinfonce", "--data", "digits", "--out", str(out), "--steps", "3", "--device", "cpu",
            "--batch-size", "32", "--quiet", *more]  # fmt: skip


def test_help_teaches_with_examples(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("demo", "fit", "report", "list"):
        assert f"pyro-contrastive {command}" in text
    assert "Exit codes: 0 done" in text
    assert main(["fit", "--help"]) == 0
    assert all(name in capsys.readouterr().out for name in ("--method {mcinfonce,rpm,",))


def test_list_names_everything_that_can_be_chosen(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in (*METHODS, *GUIDES, *DATA, *EVIDENCES):
        assert f"\n  {name} " in text
    assert text.count("https://arxiv.org/abs/") == len(METHODS)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["fit", "--method", "moco", "--data", "digits", "--out", "x"], ["'moco'", "mcinfonce", "rpm"]),
        (["fit", "--method", "rpm", "--data", "mnist", "--out", "x"], ["'mnist'", "digits", "sphere"]),
        (["fit", "--method", "rpm", "--data", "digits"], ["--out"]),
        (["train"], ["'train'", "fit", "report", "demo"]),
        ([], ["COMMAND"]),
    ],
)
def test_a_wrong_name_lists_the_valid_ones(capsys, argv, named):
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert all(name in text for name in named) and "Traceback" not in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dim", "1"], "`dim` must be >= 2, got 1"),
        (["--lr", "0"], "`lr` must be > 0"),
        (["--seed", "-1"], "`seed` must be >= 0"),
        (["--batch-size", "5000"], "`batch_size` must be in 1..1400"),
        (["--device", "gpu"], "`device` must be 'auto', 'cpu', 'cuda'"),
        (["--concentration", "nan"], "`concentration` must be > 0, got nan"),
        (["--method", "rpm", "--evidence", "exact"], "choice of mcinfonce only"),
        (["--evidence", "exact", "--concentration", "0"], "`concentration` must be > 0"),
        (["--guide", "delta", "--evidence", "exact"], "closed form of guide 'vmf'"),
        (["--guide", "delta", "--method", "rpm"], "a posterior with a density"),
        (["--guide", "delta", "--method", "vsimclr"], "use one of: projected_normal, vmf, power_spherical"),
        (["--guide", "vmf", "--method", "simsiam"], "simsiam needs points and predictions, got guide 'vmf'"),
        (["--method", "vi_simsiam", "--concentration", "3"], "`concentration` is no choice of vi_simsiam, got 3.0"),
        (["--evidence", "moment_matched", "--concentration", "inf"], "'exact'"),
        (["--ema", "1"], "`ema` must lie in (0, 1)"),
        (["--patience", "0"], "`patience` must be >= 1"),
        (["--chunk-size", "0"], "`chunk_size` must be an integer >= 1"),
        (["--precision", "float16"], "needs a CUDA device"),
    ],
)
def test_wrong_values_are_usage_errors_without_a_traceback(tmp_path, capsys, more, message):
    assert main(fit_args(tmp_path, *more)) == 2
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text
    assert not (tmp_path / "checkpoint.pt").exists()


def test_epochs_instead_of_steps(tmp_path, capsys):
    argv = [a for a in fit_args(tmp_path, "--epochs", "1", "--batch-size", "700") if a not in ("--steps", "3")]
    assert main(argv) == 0
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 2
    assert main(["fit", "--method", "rpm", "--data", "sphere", "--epochs", "2", "--out", str(tmp_path / "s")]) == 2
    assert "use --steps" in capsys.readouterr().err


def test_fit_writes_its_files_and_goes_on_or_refuses(tmp_path, capsys):
    assert main(fit_args(tmp_path)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "config.json", "history.json"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["method"] == "mcinfonce" and config["concentration"] == "inf" and config["evidence"] == "exact"
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["step"] == [1, 2, 3] and all(math.isfinite(value) for value in history["loss"])
    first = load_checkpoint(tmp_path / "checkpoint.pt")
    assert main(fit_args(tmp_path)) == 0  # finished: nothing to do
    again = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(torch.equal(v, again["modules"]["model"][k]) for k, v in first["modules"]["model"].items())
    assert main(fit_args(tmp_path, "--seed", "1")) == 1
    assert "seed: 0 in the file, 1 now" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
    assert main(fit_args(tmp_path, "--seed", "1", "--no-resume")) == 0
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize("data", DATA)
def test_options_of_the_training(tmp_path, capsys, data):
    out = str(tmp_path)
    options = ["--chunk-size", "10", "--precision", "bfloat16", "--ema", "0.9", "--patience", "1", "--deterministic"]
    argv = ["fit", "--method", "mcinfonce", "--data", data, "--out", out, "--steps", "60", "--batch-size", "16"]
    assert main([*argv, "--lr", "0.3", "--device", "cpu", "--quiet", *options]) == 0  # too fast: it gets worse soon
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["precision"], config["ema"], config["patience"]) == ("bfloat16", 0.9, 1)
    payload = load_checkpoint(tmp_path / "checkpoint.pt")
    assert payload["position"]["step"] < 60 and payload["best"]["step"] < payload["position"]["step"]
    run = _load(tmp_path, torch.device("cpu"))  # what `report` judges
    best = payload["best"]["average"]["modules"]["model"]
    assert all(torch.equal(value, best[name]) for name, value in run.model.state_dict().items())
    assert "stopped after" not in capsys.readouterr().err
    assert main([*argv, "--lr", "0.3", "--device", "cpu", "--quiet"]) == 1
    assert "ema" not in RunConfig().as_dict()  # folders of earlier versions stay what they are


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("method", "guide"), [(m, g) for m, method in METHODS.items() for g in method.guides])
def test_every_method_fits_every_kind_of_data(tmp_path, method, guide, data):
    argv = ["fit", "--method", method, "--data", data, "--out", str(tmp_path), "--steps", "2", "--batch-size", "16"]
    argv += ["--guide", guide]
    if METHODS[method].labels and not DATA[data].labels:
        assert main([*argv, "--device", "cpu", "--quiet"]) == 2
        return
    assert main([*argv, "--device", "cpu", "--quiet"]) == 0
    assert load_checkpoint(tmp_path / "checkpoint.pt")["position"]["step"] == 2


def test_methods_with_labels_say_which_data_have_them(tmp_path, capsys):
    assert main(["fit", "--method", "supcon", "--data", "sphere", "--out", str(tmp_path)]) == 2
    assert "supcon needs class labels, and sphere has none; use one of: digits" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["supcon", "vsupcon"])
def test_methods_with_labels_are_fitted_validated_and_judged(tmp_path, method):
    argv = ["fit", "--method", method, "--data", "digits", "--out", str(tmp_path), "--steps", "4", "--patience", "2"]
    assert main([*argv, "--device", "cpu", "--quiet"]) == 0
    batch = next(iter(Run(RunConfig.load(tmp_path)).batches(torch.device("cpu"))))
    assert batch[2].dtype == torch.int64 and int(batch[2].max()) == 9
    assert main(["report", str(tmp_path), "--device", "cpu", "--quiet"]) == 0
    assert (tmp_path / "report.html").exists()


def test_the_configuration_rebuilds_the_same_pair(tmp_path):
    config = RunConfig(method="rpm", data="sphere", dim=5, seed=3)
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config
    state = torch.get_rng_state()
    first, second = Run(config), Run(RunConfig.load(tmp_path))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert Run(RunConfig(data="sphere")).world().pair_concentration == 20.0
    assert Run(RunConfig(data="sphere")).world().pair_concentration == 20.0
    assert Run(RunConfig(data="sphere", concentration=math.inf)).world().pair_concentration == math.inf


def test_report_of_a_folder_without_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 1
    text = capsys.readouterr().err
    assert "holds no run" in text and "pyro-contrastive fit" in text and "Traceback" not in text
    assert main(fit_args(tmp_path)) == 0
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    assert main(["report", str(tmp_path)]) == 1
    assert "not a readable checkpoint" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("[1]")
    assert main(["report", str(tmp_path)]) == 1
    assert "not the configuration of a run" in capsys.readouterr().err


def test_report_prints_its_opinion_and_strict_makes_a_failed_check_an_error(tmp_path, capsys):
    assert main(fit_args(tmp_path)) == 0  # three steps: nothing is learned
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--device", "cpu", "--strict"]) == 1
    text = capsys.readouterr().out
    assert "Do not trust these posteriors yet" in text and "✗ FAIL" in text and "Try: " in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["verdict"] == "fail" and any(check["name"] == "Training" for check in summary["checks"])
    page = (tmp_path / "report.html").read_text()
    assert f"pyro-contrastive report {tmp_path} --device cpu --strict" in page and "method mcinfonce" in page


def test_small_demo_writes_one_report_over_all_runs(tmp_path, capsys):
    assert main(["demo", "--small", "--seeds", "0", "1", "--out", str(tmp_path), "--device", "cpu"]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert {"checkpoint.pt", "config.json", "history.json", "posterior.nc", "report.html", "summary.json"} <= written
    assert {"seed1", "sphere"} <= written and list(tmp_path.glob("*.png")) and list(tmp_path.glob("sphere/*.png"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert any(name.startswith("image_") for name in summary) and any(name.startswith("sphere_") for name in summary)
    text = capsys.readouterr().out
    assert "report.html" in text and "seed 0" in text and "seed 1" in text
    assert "✗ FAIL" in text  # without --strict no error


def test_python_dash_m(tmp_path):
    command = [sys.executable, "-m", "pyro_contrastive", "report", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "holds no run" in result.stderr and "Traceback" not in result.stderr
