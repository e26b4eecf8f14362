"""Which alarm must ring for which wrong posterior, and which must stay silent."""

from __future__ import annotations

import pytest

from benchmarks.alarms import CASES, main, pvalues

CALIBRATION = {"caps", "log density", "TARP", "axes", "VSBC, axes"}
SCORES = {"log score", "energy score"}
# By case: what must ring, what must be silent. The rest depends on the number of items.
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "right": (set(), CALIBRATION | SCORES),
    "over-confident: kappa x 4": (SCORES | CALIBRATION - {"VSBC, axes"}, {"VSBC, axes"}),
    "under-confident: kappa / 4": (SCORES | CALIBRATION - {"VSBC, axes"}, {"VSBC, axes"}),
    "rotated by .2": (SCORES | {"caps", "log density"}, {"VSBC, axes"}),
    "tilted to a pole by .15": (SCORES | {"axes", "VSBC, axes"}, set()),
    "tilted, widened until its caps hold": (SCORES | {"axes", "VSBC, axes"}, {"caps", "log density"}),
    "wrong family: round, truth elongated": (SCORES | {"caps", "log density", "axes"}, {"VSBC, axes"}),
    "widths of other items": (SCORES | {"caps", "log density"}, {"VSBC, axes"}),
    "ignores the input: uniform": (SCORES, CALIBRATION),
}


@pytest.mark.parametrize("name", CASES)
def test_alarms(name):
    found = pvalues(CASES[name], num_items=600, num_draws=199, seed=0)
    ring, silent = TABLE[name]
    # false-alarm rate .001 for each silent entry, fixed seed
    assert {check for check in ring if found[check] > 1e-3} == set(), found
    assert {check for check in silent if found[check] < 1e-3} == set(), found
    if name == "right":
        assert found["k-hat > .7"] == 0.0
    if name.startswith(("over", "ignores")):
        assert found["k-hat > .7"] > 0.5


def test_the_command_prints_one_row_per_case(tmp_path, capsys):
    out = tmp_path / "alarms.json"
    assert main(["--items", "40", "--draws", "39", "--runs", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in CASES) and out.exists()
