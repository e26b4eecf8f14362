"""Sections of a report, written as one self-contained HTML page and as one flat JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from pyro_contrastive.diagnostics._opinion import by_kind
from pyro_contrastive.diagnostics._page import page
from pyro_contrastive.diagnostics.checks import worst
from pyro_contrastive.diagnostics.section import Section

__all__ = ["write_html", "write_summary"]


def write_html(
    out: str | Path, title: str, sections: Sequence[Section], *, settings: Mapping[str, object] | None = None
) -> Path:
    """Writes `report.html`: the opinion first, then pictures and figures; no file or network is needed to read it.

    Sections of one kind (for example several seeds) share a list of checks and a table of figures, with one column each
    and their mean; the pictures of the first are shown, those of the others unfold.

    Args:
        out: Folder, created where missing.
        title: Heading of the page.
        sections: Sections in reading order.
        settings: What made the report, by name (command, device, hyper-parameters); the versions of Python, of this
            package and of those it rests on are added.

    Returns:
        Path of the file.

    Raises:
        ValueError: If there is no section.
    """
    if not sections:
        raise ValueError("`sections` must hold at least one section, got none; make one with `pair_report`")
    path = Path(out) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, sections, settings or {}), encoding="utf-8")
    return path


def write_summary(out: str | Path, sections: Sequence[Section]) -> Path:
    """Writes `summary.json`: one flat object of numbers, with the opinion under `verdict` and `checks`.

    A figure is called `<kind>_<figure>`. Where several sections share a kind that is their mean, and each one's own
    value stands under `<kind>_seed<seed>_<figure>`. What does not apply (NaN) or is infinite is null. Where there are
    checks, `verdict` is the most serious status and `checks` a list of objects: kind, seed, name, status, value,
    meaning, remedy.

    Args:
        out: Folder, created where missing.
        sections: Sections in reading order.

    Returns:
        Path of the file.
    """
    summary: dict[str, float] = {}
    for group in by_kind(sections):
        kind = group[0].kind
        for key in dict.fromkeys(key for section in group for key in section.figures):
            summary[f"{kind}_{key}"] = fmean(section.figures.get(key, math.nan) for section in group)
        if len(group) > 1:
            for section in group:
                summary.update({f"{kind}_seed{section.seed}_{key}": value for key, value in section.figures.items()})
    written: dict[str, Any] = {key: value if math.isfinite(value) else None for key, value in summary.items()}
    checks = [
        {"kind": section.kind, "seed": section.seed, **asdict(check)}
        for section in sections
        for check in section.checks
    ]
    if checks:
        written |= {"verdict": worst(section.status for section in sections), "checks": checks}
    path = Path(out) / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(written, indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path
