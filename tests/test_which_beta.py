"""The example on the right beta runs, goes on where it stopped, and writes its tables."""

from __future__ import annotations


def test_small_run_and_its_tables(example, tmp_path):
    example = example("which_beta")
    figures = example.run(tmp_path, [0], "cpu", True, ("sphere", "digits"))
    assert figures["sphere, VSimCLR, beta 0.1, kernel 8, 0: factor: power"] == 1.0
    assert 0 <= figures["digits, VSupCon, beta 0.1, 0: knn clean"] <= 1
    files = sorted((tmp_path / "rows").glob("*.json"))
    assert len(files) == 2
    stamps = [file.stat().st_mtime_ns for file in files]
    assert example.run(tmp_path, [0], "cpu", True, ("sphere", "digits")) == figures
    assert [file.stat().st_mtime_ns for file in files] == stamps
    table = example.tables(tmp_path)
    assert "| VSimCLR, beta .1, kernel 8 |" in table and "| VSupCon, beta .1 |" in table
    for line in table.split("\n\n"):
        assert len({row.count("|") for row in line.strip().splitlines()}) == 1
