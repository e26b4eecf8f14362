"""The gallery script draws every picture of docs/plots.md, small enough to be committed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def test_gallery_draws_every_picture_of_the_page(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(ROOT / "examples" / "gallery.py"), "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    named = set(re.findall(r"figures/(gallery_\w+\.\w+)", (ROOT / "docs" / "plots.md").read_text()))
    assert named == {path.name for path in tmp_path.iterdir()}
    for name in named:
        committed = ROOT / "docs" / "figures" / name
        assert committed.stat().st_size < 60_000, name
        if committed.suffix == ".png":
            assert Image.open(committed).size == Image.open(tmp_path / name).size
