"""The files of the resumable experiments: one JSON file per run, and a results page with tables below its text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def save_run(path: Path, result: dict[str, Any]) -> None:
    """Write a run so that a file that is there is complete, also after an interruption."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def write_tables(page: Path, marker: str, tables: str) -> None:
    """Put the tables at the end of a page, below its marker; what stands above is kept."""
    text = page.read_text() if page.exists() else ""
    page.write_text(text.partition(marker)[0] + marker + "\n\n" + tables)


def write_all_runs(file: Path, folder: Path) -> None:
    """Gather the runs of a folder in one JSON file, a line each."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    file.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
