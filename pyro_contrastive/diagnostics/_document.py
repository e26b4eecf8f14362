"""Sections of a report, written as one self-contained HTML page and as one flat JSON file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean

__all__ = ["Picture", "Section", "write_html", "write_summary"]


@dataclass(frozen=True)
class Picture:
    """A PNG file and the caption that says how to read it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """One evaluation: figures, pictures and their reading.

    Attributes:
        title: Heading, for example "Handwritten digits, seed 0".
        kind: Short name of the evaluation, "sphere" or "image"; sections of one kind share a table.
        seed: Seed of the run.
        figures: Flat table of numbers; NaN where one does not apply.
        pictures: Pictures in reading order.
        reading: Sentences that say in plain language what the figures mean.
    """

    title: str
    kind: str
    seed: int
    figures: dict[str, float]
    pictures: list[Picture] = field(default_factory=list)
    reading: list[str] = field(default_factory=list)


# key: (name, what it says)
_MEANING: dict[str, tuple[str, str]] = {
    "spearman_concentration": ("rank correlation of concentrations", "estimated against true concentration; 1 is best"),
    "concentration_error": ("relative error of the concentration", "mean of |estimate - truth| / truth; 0 is best"),
    "cosine_correlation": (
        "correlation of pairwise cosines",
        "learned against true geometry, blind to rotations; 1 is best",
    ),
    "mean_angle": ("mean angle to the true direction", "radians, after the best rotation; 0 is best"),
    "coverage_50": ("coverage of 50 % caps", "share of true points inside; .50 is best, less is over-confident"),
    "coverage_80": ("coverage of 80 % caps", "share of true points inside; .80 is best, less is over-confident"),
    "coverage_95": ("coverage of 95 % caps", "share of true points inside; .95 is best, less is over-confident"),
    "exact_coverage_50": ("exact posterior, 50 % caps", "what the sampling noise of this test set allows"),
    "exact_coverage_80": ("exact posterior, 80 % caps", "what the sampling noise of this test set allows"),
    "exact_coverage_95": ("exact posterior, 95 % caps", "what the sampling noise of this test set allows"),
    "pit_pvalue": (
        "p-value of calibration",
        "small when miscalibrated; falls with the number of items for any fixed error",
    ),
    "pair_concentration": ("concentration of the pair prior", "as the model learned it or was given it"),
    "pair_concentration_sampled": (
        "the same, from sampled pairs",
        "fitted to pairs of posterior draws; agrees with a learned prior",
    ),
    "spearman_corruption": ("rank correlation with -corruption", "concentration against damage applied; 1 is best"),
    "knn_clean": ("5-NN accuracy, clean images", "neighbours among clean training images; 1 is best"),
    "knn_corrupted": ("5-NN accuracy, corrupted images", "damage lowers it; the posterior should know where"),
    "accuracy_q1": ("accuracy, surest quartile", "of corrupted images, by concentration"),
    "accuracy_q2": ("accuracy, second quartile", "of corrupted images, by concentration"),
    "accuracy_q3": ("accuracy, third quartile", "of corrupted images, by concentration"),
    "accuracy_q4": ("accuracy, least sure quartile", "of corrupted images, by concentration"),
    "accuracy_drop": ("drop from surest to least sure", "large when the width tells right from wrong"),
    "concentration_q05": ("concentration, 5 % quantile", "finite and varied is healthy"),
    "concentration_q95": (
        "concentration, 95 % quantile",
        "running off to infinity means a pair concentration set too small",
    ),
    "mean_resultant_length": (
        "aggregate: mean length",
        "0 when the latent space is used uniformly, up to 1/sqrt(items)",
    ),
    "eigenvalue_ratio": ("aggregate: largest eigenvalue", "1 when uniform, d when collapsed to a line"),
    "uniformity_pvalue": (
        "aggregate: p-value of uniformity",
        "small when not uniform; read the two effect sizes with it",
    ),
    "partner_accuracy": ("partner found among 256 pairs", "share of items whose most probable partner is right"),
}

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1b;background:#fff;max-width:72rem;margin:0 auto;padding:1rem}
h1{font-size:1.7rem}h2{margin-top:2.5rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.95rem}
th,td{padding:.3rem .8rem;text-align:left;border-bottom:1px solid #e5e5e5}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.m{color:#555}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem;margin:1.2rem 0}
figure{margin:0}figure img{width:100%;height:auto;border:1px solid #e5e5e5;border-radius:4px}
figcaption{font-size:.9rem;color:#444;margin-top:.3rem}summary{cursor:pointer;margin:1rem 0}
"""


def format_figure(value: float) -> str:
    """Formats a figure with three significant digits, "-" where it does not apply."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 10 or value == 0 else f"{value:.3g}"


def write_html(out: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes `report.html`: pictures inline, tables with what each figure means, no file or network needed to read it.

    Sections of one kind (for example several seeds) share a table with one column each and their mean; the pictures of
    the first are shown, those of the others unfold.

    Args:
        out: Folder, created where missing.
        title: Heading of the page.
        sections: Sections in reading order.

    Returns:
        Path of the file.

    Raises:
        ValueError: If there is no section.
    """
    if not sections:
        raise ValueError("`sections` must hold at least one section, got none")
    kinds = list(dict.fromkeys(section.kind for section in sections))
    body = "".join(_group([section for section in sections if section.kind == kind]) for kind in kinds)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
    path = Path(out) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _group(sections: list[Section]) -> str:
    first = sections[0]
    title = first.title.removesuffix(f", seed {first.seed}") if len(sections) > 1 else first.title
    parts = [f"<h2>{escape(title)}</h2>"]
    parts += [f"<p>{escape(sentence)}</p>" for sentence in first.reading]
    parts += [_table(sections), _pictures(first)]
    for section in sections[1:]:
        notes = "".join(f"<p>{escape(sentence)}</p>" for sentence in section.reading)
        parts.append(f"<details><summary>{escape(section.title)}</summary>{notes}{_pictures(section)}</details>")
    return "".join(parts)


def _table(sections: list[Section]) -> str:
    several = len(sections) > 1
    heads = [f"seed {section.seed}" for section in sections] + (["mean"] if several else [])
    head = "".join(f'<th class="n">{escape(text)}</th>' for text in heads)
    rows = []
    for key in dict.fromkeys(key for section in sections for key in section.figures):
        values = [section.figures.get(key, math.nan) for section in sections]
        cells = "".join(f'<td class="n">{format_figure(value)}</td>' for value in values + [fmean(values)] * several)
        name, meaning = _MEANING.get(key, (key.replace("_", " "), ""))
        rows.append(f'<tr><td>{escape(name)}</td>{cells}<td class="m">{escape(meaning)}</td></tr>')
    return (
        f'<div class="scroll"><table><thead><tr><th>figure</th>{head}<th>how to read it</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _pictures(section: Section) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(picture.path.stem.replace("_", " "))}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.path.read_bytes()).decode()}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in section.pictures
    )
    return f'<div class="grid">{figures}</div>'


def write_summary(out: str | Path, sections: Sequence[Section]) -> Path:
    """Writes `summary.json`, one flat object of numbers.

    A figure is called `<kind>_<figure>`. Where several sections share a kind that is their mean, and each one's own
    value stands under `<kind>_seed<seed>_<figure>`. What does not apply (NaN) or is infinite is null.

    Args:
        out: Folder, created where missing.
        sections: Sections in reading order.

    Returns:
        Path of the file.
    """
    summary: dict[str, float] = {}
    for kind in dict.fromkeys(section.kind for section in sections):
        group = [section for section in sections if section.kind == kind]
        for key in dict.fromkeys(key for section in group for key in section.figures):
            summary[f"{kind}_{key}"] = fmean(section.figures.get(key, math.nan) for section in group)
        if len(group) > 1:
            for section in group:
                summary.update({f"{kind}_seed{section.seed}_{key}": value for key, value in section.figures.items()})
    flat = {key: value if math.isfinite(value) else None for key, value in summary.items()}
    path = Path(out) / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(flat, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path
