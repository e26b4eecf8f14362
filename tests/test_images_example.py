"""The example on images of noise: every method, options, pieces that add up, tables, the encoder's precision."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_contrastive import nets
from pyro_contrastive.fit import fit

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))  # for _options
    try:
        spec = importlib.util.spec_from_file_location("example_images", EXAMPLES / "images.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclass looks itself up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLES))
        sys.modules.pop("example_images", None)


@pytest.fixture
def options(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (80, 8, 8), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "noise.npz", **arrays, **{f"y_{part}": np.arange(80) % 4 for part in ("train", "test")})
    sizes = "--steps 4 --batch-size 20 --dim 5 --width 4 --small --device cpu"
    return f"--data {tmp_path}/noise.npz --out {tmp_path}/run {sizes}".split()


def test_a_method_is_fitted_judged_and_not_repeated(example, options, tmp_path, capsys):
    strangers = ["--ood", str(tmp_path / "noise.npz")]
    example.main([*options, "--method", "vsimclr", "simclr", *strangers])
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "run").glob("*.json")}
    assert set(files) == {"noise-small-vsimclr-0", "noise-small-simclr-0"}
    figures = files["noise-small-vsimclr-0"]["figures"]
    assert {"linear", "knn", "information", "latent_rank", "uncertainty", "noise_auroc_5", "length_realised_4"} <= set(
        figures
    )
    assert figures["ood_noise"] == 0.5  # the strangers are the test images
    assert "uncertainty" not in files["noise-small-simclr-0"]["figures"]
    assert "nearest neighbours" in capsys.readouterr().out
    example.main([*options, "--method", "vsimclr", *strangers])
    assert capsys.readouterr().out == ""  # it was there
    with pytest.raises(SystemExit, match="made with other options"):
        example.main([*options, "--method", "vsimclr", "--beta", "0.5"])

    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\n{example.MARKER}\n\nold\n")
    example.main(["--table", str(page), "--out", str(tmp_path / "run")])
    text = page.read_text()
    assert text.startswith("# Mine") and "old" not in text and "## noise, small" in text
    cells = [line.split("|") for line in text.splitlines() if line.startswith("| vsimclr |")]
    assert len(cells) == 2 and f"{figures['linear']:.3f}" in cells[0][3]
    widths = [line for line in text.splitlines() if line.startswith("| simclr |")][1]
    assert set(widths.removeprefix("| simclr |")) == set("-| ")


def test_pieces_add_up(example, options, tmp_path, capsys):
    said = ""
    for _ in range(4):  # one step each
        assert "4 steps" not in said
        example.main([*options, "--method", "vi_simsiam", "--minutes", "0"])
        said = capsys.readouterr().out
    assert "4 steps; call again" in said
    assert not list((tmp_path / "run").glob("*.json"))  # no time was left for scores
    example.main([*options, "--method", "vi_simsiam", "--minutes", "5"])
    piecewise = json.loads((tmp_path / "run" / "noise-small-vi_simsiam-0.json").read_text())
    whole_folder = [str(tmp_path / "whole") if o == str(tmp_path / "run") else o for o in options]
    example.main([*whole_folder, "--method", "vi_simsiam"])
    whole = json.loads((tmp_path / "whole" / "noise-small-vi_simsiam-0.json").read_text())
    assert whole["figures"] == piecewise["figures"]


@pytest.mark.parametrize(
    "method", ["simclr", "supcon", "vsimclr", "vsupcon", "simsiam", "vi_simsiam", "mcinfonce", "rpm"]
)
def test_every_method_trains(example, options, method):
    args = example.parse(options)
    data = example.load(args)
    encoder = example.build_encoder(data["train"][0], data["kind"], data["setting"], True, False)
    model, guide, elbo = example.build_pair(method, encoder, 5, args)
    before = encoder[0][0].weight.clone()
    views = torch.rand(2, 16, 1, 8, 8)
    labels = [torch.arange(16) % 4] if "supcon" in method else []
    result = fit(model, guide, [(*views, *labels)], steps=1, num_views=None, elbo=elbo, device="cpu", progress=False)
    assert result.status == "done" and not torch.equal(before, encoder[0][0].weight)
    assert encoder.features(views[0]).shape == (16, 16) and example.METHODS.count(method) == 1


def test_kinds_of_images_get_their_encoder_and_augmentation(example, tmp_path):
    for shape, kind, width in (((9, 8, 8), "tiny", 128), ((9, 28, 28), "grey", 128), ((9, 32, 32, 3), "colour", 128)):
        arrays = {f"x_{part}": np.zeros(shape, np.uint8) for part in ("train", "test")}
        np.savez(tmp_path / "x.npz", **arrays, y_train=np.arange(9), y_test=np.arange(9))
        args = example.parse(["--data", str(tmp_path / "x.npz"), "--out", "o", "--small", "--batch-size", "7"])
        data = example.load(args)
        assert data["kind"] == kind and data["setting"].batch_size == 7 and data["strangers"] == {}
        encoder = example.build_encoder(data["train"][0], kind, data["setting"], True, True)
        view, _ = example.build_augment("x", kind)(data["train"][0])
        features = encoder.features(view)
        assert features.shape == (9, width) and features.dtype == torch.bfloat16
        assert nets.feature_size(encoder) == width


def test_optimisers(example, monkeypatch, tmp_path):
    parameters = [torch.nn.Parameter(torch.ones(3))]
    adam = example.build_optimizer("adamw", 1024, None, 0.1)(parameters)
    assert isinstance(adam, torch.optim.AdamW) and adam.param_groups[0]["lr"] == pytest.approx(2e-3)
    sgd = example.build_optimizer("sgd", 512, None, 0.1)(parameters)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.12) and sgd.param_groups[0]["momentum"] == 0.9
    assert example.build_optimizer("sgd", 512, 0.5, 0.1)(parameters).param_groups[0]["lr"] == 0.5
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(SystemExit, match="lars needs timm: pip install timm"):
        example.build_optimizer("lars", 256, None, 0.1)
    made = types.ModuleType("timm.optim")
    made.Lars = lambda parameters, **options: options
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.optim", made)
    assert example.build_optimizer("lars", 512, None, 0.1)(parameters) == {
        "lr": 0.6,
        "momentum": 0.9,
        "weight_decay": 0.1,
    }


def test_strangers_that_are_not_there(example, options, tmp_path, capsys):
    assert example.load(example.parse([*options, "--root", str(tmp_path)]))["strangers"] == {}
    with pytest.raises(FileNotFoundError, match="holds no intact mnist"):
        example.load(example.parse([*options, "--root", str(tmp_path), "--ood", "mnist"]))
    with pytest.raises(SystemExit):
        example.parse(["--data", "digits"])
    assert "--out is needed" in capsys.readouterr().err
