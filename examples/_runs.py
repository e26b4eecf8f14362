"""The files of the resumable experiments: one JSON file per run, and a results page with tables below its text."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any


def save_run(path: Path, result: dict[str, Any]) -> None:
    """Write a run so that a file that is there is complete, also after an interruption."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def is_done(path: Path, config: dict[str, Any]) -> bool:
    """Whether a run is there; one of other options is no run to keep, and ends the program."""
    if not path.exists():
        return False
    if json.loads(path.read_text())["config"] != config:
        raise SystemExit(f"{path} was made with other options; choose another --out, or remove it")
    return True


def in_pieces(path: Path, config: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Arguments of ``fit`` for a run that stops at a deadline (``time.monotonic``) and goes on in the next call."""
    return {
        "out": path.with_suffix(""),
        "max_seconds": max(0.0, deadline - time.monotonic()) if math.isfinite(deadline) else None,
        "config": {key: str(value) for key, value in config.items()},
        "progress": path.stem,
    }


def write_tables(page: Path, marker: str, tables: str) -> None:
    """Put the tables at the end of a page, below its marker; what stands above is kept."""
    text = page.read_text() if page.exists() else ""
    page.write_text(text.partition(marker)[0] + marker + "\n\n" + tables)


def write_all_runs(file: Path, folder: Path) -> None:
    """Gather the runs of a folder in one JSON file, a line each."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    file.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
