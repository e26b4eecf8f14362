"""The benchmarks: one command gives one table and valid JSON, and both sides of a row compute the same thing."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import infonce, measure, spherical
from benchmarks.__main__ import NAMES, main

KEYS = {"benchmark", "task", "setting", "unit", "ours", "peer", "theirs", "ratio", "goal", "met"}


def test_one_command_gives_a_table_and_json(tmp_path, capsys):
    out, threads = tmp_path / "new" / "rows.json", torch.get_num_threads()
    try:
        assert main(["--quick", "--only", "spherical", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert found["settings"]["only"] == ["spherical"] and found["machine"]["torch"] == torch.__version__
    assert len(found["rows"]) == 2 * (2 + 2 + 1) and all(set(row) >= KEYS for row in found["rows"])
    text = capsys.readouterr().out
    for row in found["rows"]:
        assert row["task"] in text and row["peer"] in text and row["ours"] > 0
        assert (row["theirs"] is None) == (row["ratio"] is None)
        assert row["ratio"] is None or row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert any(row["peer"].startswith("scipy") and row["ratio"] for row in found["rows"])


def test_rows_say_whether_a_goal_is_met_and_what_is_not_installed():
    met = measure.row("a", "", 1.0, "b", 2.0, goal=0.5)
    missed = measure.row("a", "", 1.0, "b", 2.0, goal=0.9, goal_of="ours")
    absent = measure.row("a", "", 1.0, "b", None, goal=0.5)
    assert [r["met"] for r in (met, missed, absent)] == [True, False, None]
    lines = measure.table([met, missed, absent]).splitlines()
    assert lines[1].endswith("yes") and "no" in lines[2].split() and measure.NOT_INSTALLED in lines[3]
    assert measure.peer("a_module_that_is_not_there") is None
    assert "7 % of ceiling" in measure.table([measure.row("a", "", 1.0, "b", 2.0, bound=0.07)])


def test_the_losses_that_are_compared_are_one_loss():
    found = infonce.losses()
    z1, z2 = torch.nn.functional.normalize(torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    values = {name: loss(z1, z2) for name, loss in found.items() if loss is not None}
    offset = {"InfoNCE": 16, "NT-Xent": 31}  # ours are log ratios
    for theirs, ours in infonce.PEERS.items():
        if theirs in values:
            want = values[ours] + torch.tensor(offset[ours]).log()
            torch.testing.assert_close(values[theirs], want, rtol=1e-5, atol=1e-5)


def test_memory_and_time_of_the_losses():
    rows = infonce.compare([16, 32], 16, 1, torch.device("cpu"))
    assert {row["setting"].split(",")[0] for row in rows} == {"N = 16", "N = 32"}
    assert all(row["ours"] > 0 for row in rows if row["unit"] == "s")
    (large,) = (row for row in rows if "N = 32" in row["setting"] and row["task"] == "InfoNCE, time")
    assert large["theirs"] is None and large["peer"] == infonce.GRID


def test_every_name_is_a_module_with_rows():
    import importlib.util

    assert spherical.rows
    for name in NAMES:
        spec = importlib.util.find_spec(f"benchmarks.{name}")
        assert spec is not None or name == "overhead"
        if spec is not None:
            assert callable(importlib.import_module(f"benchmarks.{name}").rows)
