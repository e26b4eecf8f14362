"""The controlled experiments of AnInfoNCE: that they run, resume, make a table and a picture; what the oracle is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch


def test_runs_resume_and_make_a_table_and_a_picture(example, tmp_path, capsys):
    module = example("aninfonce_controlled")
    out = tmp_path / "runs"
    rows = ["oracle-hard-signed", "bimodal-infonce", "ensemble", "ambiguous"]
    command = ["--small", "--rows", *rows, "--seeds", "1", "--out", str(out)]
    module.main(module.parse(command))
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert set(found) == {f"{row}-1" for row in rows}
    assert all(one["steps"] == 20 and one["status"] == "done" for one in found.values())
    assert found["oracle-hard-signed-1"]["r2"] > 0.9999 and found["bimodal-infonce-1"]["precision_error"] is None
    assert 0 <= found["ambiguous-1"]["coverage_50"] <= 1 and found["ensemble-1"]["precision_error"] > 0
    assert "1 of 4" in capsys.readouterr().out
    module.main(module.parse(command))
    assert capsys.readouterr().out == ""  # nothing was missing
    lines = module.table(out, [*rows, "linear"]).splitlines()
    row = next(line for line in lines if line.startswith("| bimodal-infonce:"))
    assert f"| 1 | {found['bimodal-infonce-1']['r2']:.3f} |" in row and "| - | - | 20 |" in row
    assert sum("not run" in line for line in lines) == 1
    assert sum(line.startswith("## ") for line in lines) == 2
    page = tmp_path / "page.md"
    page.write_text("# Mine\n")
    for tables in ("first\n", "second\n"):
        module.write_tables(page, module.MARKER, tables)
    assert page.read_text() == f"# Mine\n{module.MARKER}\n\nsecond\n"
    module.draw(tmp_path / "new" / "picture.png", out, rows)
    assert (tmp_path / "new" / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_rows_are_what_they_say(example):
    rows = example("_aninfonce").ROWS
    module = example("_aninfonce")
    for name, row in rows.items():
        world = module.AnisotropicWorld(row.precision, **row.world)
        model, guide = module.make_pair(row, world, 0)
        assert (guide.batch_norm is not None) == (row.start == "spread"), name
        assert guide.dim == world.dim and (row.method == "ensemble") == (len(world.precision) > 1)
        if row.start == "oracle":
            z = world.sample(5, seed=0).z1
            torch.testing.assert_close(guide.posterior(z).mean, z)
            assert [p.shape for p in model.parameters() if p.requires_grad] == [(world.dim,)]


def test_the_matched_likelihood_is_largest_at_the_exact_widths(example):
    nats = example("_aninfonce").likelihood_of_scales([0.5, 1.0, 2.0], batches=10)  # the same batches: .05 nats apart
    assert max(nats, key=nats.get) == 1.0


def test_an_unknown_row_is_refused(example, capsys):
    with pytest.raises(SystemExit):
        example("aninfonce_controlled").parse(["--rows", "bimodel"])
    assert "no row matches; the rows are oracle, " in capsys.readouterr().err


@pytest.fixture
def colour_images(tmp_path):
    """An npz file of random colour images: the label is the colour."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, size in (("train", 120), ("test", 60)):
        labels = np.arange(size) % 3
        pixels = rng.integers(0, 100, (size, 12, 12, 3))
        pixels[np.arange(size), :, :, labels] += 120
        arrays |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": labels}
    np.savez(tmp_path / "colours.npz", **arrays)
    return tmp_path / "colours.npz"


def test_read_out_runs_resumes_and_makes_a_table(example, colour_images, tmp_path, capsys):
    module = example("aninfonce_readout")
    rows = ["untrained", "infonce", "ensemble-blocks"]
    command = [
        "--data",
        str(colour_images),
        "--rows",
        *rows,
        "--small",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "runs"),
    ]
    module.main(module.parse(command))
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")}
    assert set(found) == {f"colours-small-{row}-0" for row in rows}
    figures = found["colours-small-ensemble-blocks-0"]["figures"]
    assert {key.split("_")[1] for key in figures if "_" in key} == {"features", "latents", "content", "style"}
    assert figures["augmentation_style"] == np.mean([figures[f"{name}_style"] for name in module.READ])
    assert found["colours-small-untrained-0"]["figures"]["class_features"] > 0.9  # the colour
    capsys.readouterr()
    module.main(module.parse(command))
    assert capsys.readouterr().out == ""  # nothing was missing
    lines = module.tables(tmp_path / "runs").splitlines()
    assert next(line for line in lines if line.startswith("| untrained:")).endswith(" | - / - | - / - | 0 |")
    with pytest.raises(SystemExit, match="made with other options"):
        module.main(module.parse([*command, "--steps", "4"]))


def test_pairs_of_the_read_out_share_the_image_or_the_augmentation(example):
    module = example("aninfonce_readout")
    colours = torch.arange(8).reshape(8, 1, 1, 1).expand(8, 3, 6, 6) * 0.1
    grey = module.augment.keywords | {"jitter": 0.0, "hue": 0.0, "grey": 0.0}
    module.augment = module.functools.partial(module.crop_flip_jitter, **grey)
    first, second, third = next(iter(module.PairsOf(colours, "ensemble", batch_size=8)))
    assert torch.allclose(first, second, atol=1e-6) and not torch.allclose(first, third, atol=0.05)
    rows = (torch.arange(6) / 6).reshape(1, 1, 6, 1).expand(8, 3, 6, 6)  # all images alike: what differs is the crop
    first, second, third = next(iter(module.PairsOf(rows, "ensemble", batch_size=8)))
    assert torch.equal(first, third) and not torch.allclose(first, second, atol=0.05)
    for row, wanted in (("augmentation", (first, third)), ("blocks", (first, second)), ("infonce", (first, second))):
        seen = next(iter(module.PairsOf(rows, row, batch_size=8)))
        assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
