"""The controlled experiments of AnInfoNCE: that they run, resume, make a table and a picture; what the oracle is."""

from __future__ import annotations

import json

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


def test_an_unknown_row_is_refused(example, capsys):
    with pytest.raises(SystemExit):
        example("aninfonce_controlled").parse(["--rows", "bimodel"])
    assert "no row matches; the rows are oracle, " in capsys.readouterr().err
