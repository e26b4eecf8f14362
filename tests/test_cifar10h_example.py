"""The CIFAR-10H example on noise in the place of its images: options, resuming, what it writes, its encoder."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pyro_contrastive import guides
from pyro_contrastive.nets import feature_size

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))  # for _options
    try:
        spec = importlib.util.spec_from_file_location("example_cifar10h", EXAMPLES / "cifar10h.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture
def options(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(100) % 10
    images = {f"x_{part}": rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8) for part in ("test", "train")}
    counts = np.eye(10, dtype=int)[labels] * 40 + rng.integers(0, 5, (100, 10))
    np.savez(tmp_path / "data.npz", y_test=labels, y_train=labels, human_counts=counts, **images)
    return f"--data {tmp_path}/data.npz --out {tmp_path}/run --small --device cpu --width 4 --batch-size 10".split()


@pytest.mark.parametrize(
    "more",
    ["--variant self", "--variant soft --negatives dissimilar --bf16", "--concentration 16 inf"],
)
def test_it_writes_a_flat_summary_and_a_table(example, options, tmp_path, more, capsys):
    example.main([*options, "--steps", "2", *more.split()])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(isinstance(value, float) and math.isfinite(value) for value in summary.values())
    assert {"spearman_entropy", "spearman_crop", "recall_at_1", "aurc", "spearman_crop_se"} <= set(summary)
    table = (tmp_path / "run" / "table.md").read_text().splitlines()
    assert len(table) - 2 == sum(not name.endswith("_se") for name in summary)
    assert "fold 0" in table[0] and "fold 1" in table[0]
    assert "step" in capsys.readouterr().err  # a progress bar


def test_finished_folds_are_read_and_other_options_refused(example, options, tmp_path, monkeypatch):
    run = [*options, "--steps", "2", "--folds", "0"]
    example.main(run)
    first = (tmp_path / "run" / "summary.json").read_text()
    monkeypatch.setattr(example, "fit", None)  # would fail if it were called
    example.main(run)
    assert (tmp_path / "run" / "summary.json").read_text() == first
    with pytest.raises(SystemExit, match="other options"):
        example.main([*run, "--lr", "0.1"])


def test_the_candidate_with_the_highest_validation_evidence_is_scored(example, options, tmp_path, monkeypatch):
    values = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(example, "evidence", lambda model, pairs: next(values))
    scored = []
    monkeypatch.setattr(example, "score", lambda guide, *rest: scored.append(guide.dim) or {"recall_at_1": 0.5})
    example.main([*options, "--steps", "1", "--folds", "0", "--dim", "4", "5", "6"])
    done = json.loads((tmp_path / "run" / "fold0.json").read_text())
    assert done["chosen"] == "kinf-lr0.003-d5-n1" and done["scores"]["validation_evidence"] == 0.3
    assert scored[-1] == 5 and len(done["validation_evidence"]) == 3


def test_the_test_part_is_in_no_batch(example, options):
    data = example.load_cifar10h(options[1], train=True)
    for variant in ("soft", "self"):
        args = example.parse([*options, "--variant", variant])
        train, validation, test = example.loaders(data, 3, args)
        trained, validated = ({x.numpy().tobytes() for x in part.images} for part in (train, validation))
        assert not trained & validated
        assert not (trained | validated) & {x.numpy().tobytes() for x in data.images[test]}
        assert len(trained) == (60 if variant == "soft" else 90)


def test_encoder_is_torchvisions_resnet18_with_another_stem(example):
    from torchvision.models import resnet18

    encoder, reference = example.Encoder(64), resnet18()
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = reference.fc = nn.Identity()
    state = reference.state_dict()
    encoder.load_state_dict(dict(zip(encoder.state_dict(), state.values(), strict=True)))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), reference.eval()(encoder[0](x)), rtol=1e-4, atol=1e-5)
    small = example.Encoder(8, pool=True, bf16=True)
    assert feature_size(small) == 64 and small(x).dtype == torch.bfloat16
    assert guides.VonMisesFisher(small, dim=5).posterior(x).mean_direction.dtype == torch.float32


def test_recall_at_one_against_a_loop(example):
    directions = nn.functional.normalize(torch.randn(1_205, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels = torch.arange(1_205) % 7
    found = example.nearest_is_right(directions, labels)
    for i in range(0, 1_205, 50):
        others = [j for j in range(1_205) if j != i]
        nearest = max(others, key=lambda j: float(directions[i] @ directions[j]))
        assert bool(found[i]) == (nearest % 7 == i % 7)


@pytest.mark.parametrize(
    "more", ["--variant self --negatives dissimilar", "--negatives dissimilar --evidence k_sample"]
)
def test_options_that_do_not_go_together(example, options, more, capsys):
    with pytest.raises(SystemExit):
        example.parse([*options, *more.split()])
    assert "dissimilar goes with" in capsys.readouterr().err
