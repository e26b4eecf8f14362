"""The HTML of a report: one page without scripts, in which the browser itself forbids any request."""

from __future__ import annotations

import base64
import math
import platform
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean

from pyro_contrastive import __version__
from pyro_contrastive.diagnostics._opinion import Line, by_kind, group_title, lines
from pyro_contrastive.diagnostics.checks import FAMILY_LEVEL, SYMBOLS, Status, verdict
from pyro_contrastive.diagnostics.section import Section

__all__ = ["format_figure", "page"]

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
    "partner_information": (
        "nats per pair over guessing",
        "log score of the partner among candidates, higher is better; never more than the log of their number",
    ),
    "partner_overconfidence": (
        "over-confidence about the partner",
        "in nats; 0 when stated probabilities are right, more is too sure",
    ),
    "knn_accuracy": ("5-NN accuracy", "half of the items against the other half; 1 is best"),
    "partner_accuracy": ("partner found among 256 pairs", "share of items whose most probable partner is right"),
}

_STYLE = """
:root{color-scheme:light dark;--text:#1b1b1b;--soft:#555;--back:#fff;--card:#f6f7f8;--rule:#d9dcdf;
--fail:#b3261e;--warn:#8a5a00;--pass:#18703f;--skip:#5f6368}
@media(prefers-color-scheme:dark){:root{--text:#e8e8e8;--soft:#b4b8bc;--back:#16181b;--card:#202327;--rule:#3a3f45;
--fail:#ff8a80;--warn:#f0b94a;--pass:#6fd19a;--skip:#a9aeb4}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--text);background:var(--back);max-width:72rem;margin:0 auto;
padding:1rem;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0 1rem}
h2{font-size:1.3rem;margin:2.5rem 0 .8rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
h3{font-size:1.05rem;margin:1.6rem 0 .5rem}
a{color:inherit}
:focus-visible{outline:3px solid #56B4E9;outline-offset:2px}
.verdicts,.checks{list-style:none;margin:0;padding:0}
.verdicts>li,.checks>li{display:grid;grid-template-columns:7.2rem minmax(0,1fr);gap:0 .9rem;padding:.7rem .9rem;
margin:0 0 .5rem;background:var(--card);border-left:.35rem solid var(--rule);border-radius:4px;break-inside:avoid}
.verdicts>li{font-size:1.08rem}
.badge{font-weight:700;white-space:nowrap}
.badge i{display:inline-block;width:1.2em;font-style:normal}
.fail>.badge,.one-fail{color:var(--fail)}.warn>.badge,.one-warn{color:var(--warn)}
.pass>.badge,.one-pass{color:var(--pass)}.skip>.badge,.one-skip{color:var(--skip)}
li.fail{border-color:var(--fail)}li.warn{border-color:var(--warn)}
li.pass{border-color:var(--pass)}li.skip{border-color:var(--skip)}
@media(min-width:56rem){.checks>li>div{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:0 1.5rem}}
@media(max-width:55.99rem){.checks>li>div>div+div{margin-top:.25rem}}
code{font-size:.93em}
.checks h4,.checks p,.verdicts p{margin:0;font-size:1rem}.verdicts p{font-size:inherit}.checks p+p{margin-top:.25rem}
.value,.note,td.m,figcaption{color:var(--soft)}.value,.note{font-size:.92rem}
.value span{display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}
th,td{padding:.3rem .8rem;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}tbody th{font-weight:400}
td.m{min-width:14rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.2rem;margin:1rem 0;
align-items:start}
figure{margin:0;break-inside:avoid}
figure img{display:block;width:100%;height:auto;background:#fff;border:1px solid var(--rule);border-radius:4px}
figcaption{font-size:.9rem;margin-top:.4rem}summary{cursor:pointer;margin:.8rem 0}
dl{display:grid;grid-template-columns:minmax(7rem,auto) minmax(0,1fr);gap:.2rem 1rem;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:32rem){.verdicts>li,.checks>li{grid-template-columns:minmax(0,1fr);padding:.6rem .7rem}
th,td{padding:.3rem .5rem}}
@media print{:root{color-scheme:light}body{max-width:none;font-size:11pt}
details::details-content{content-visibility:visible;block-size:auto}.scroll{overflow:visible}td.m{min-width:0}}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WORDS: dict[Status, str] = {"fail": "fail", "warn": "warn", "pass": "pass", "skip": "not judged"}
_PACKAGES = ("torch", "pyro-ppl", "arviz", "numpy", "scipy", "matplotlib")


def format_figure(value: float) -> str:
    """Formats a figure with three significant digits, "-" where it does not apply."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 10 or value == 0 else f"{value:.3g}"


def page(title: str, sections: Sequence[Section], settings: Mapping[str, object]) -> str:
    """The page: verdict, checks, pictures, figures, settings.

    Args:
        title: Heading of the page.
        sections: Sections in reading order, at least one.
        settings: What made the report, by name.

    Returns:
        HTML.
    """
    groups = by_kind(sections)
    judged = [group for group in groups if any(section.checks for section in group)]
    body = [f"<header><h1>{escape(title)}</h1>"]
    body += [_verdicts(judged), "</header><main>"] if judged else ["</header><main>"]
    if judged:
        body.append("<section><h2>Checks</h2>")
        body += [_checks(group) for group in judged]
        body.append("</section>")
    for heading, content in (("Pictures", _pictures), ("Figures", _figures)):
        body.append(f"<section><h2>{heading}</h2>{''.join(content(group) for group in groups)}</section>")
    body.append(f"<section><h2>Settings</h2>{_settings(settings)}</section></main>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _badge(status: Status) -> str:
    return f'<span class="badge"><i aria-hidden="true">{SYMBOLS[status]}</i>{_WORDS[status]}</span>'


def _identity(group: Sequence[Section]) -> str:
    return f"checks-{escape(group[0].kind)}"


def _verdicts(groups: Sequence[Sequence[Section]]) -> str:
    items = []
    for group in groups:
        status, sentence = verdict([check for section in group for check in section.checks])
        link = f'<a href="#{_identity(group)}">{escape(group_title(group))}</a>'
        items.append(f'<li class="{status}">{_badge(status)}<p>{link}. {escape(sentence)}</p></li>')
    note = (
        "A check fails or warns where an effect matters <em>and</em> is not chance. The tests of each part raise a "
        f"false alarm with a probability of at most {FAMILY_LEVEL * 100:g} %. No check proves that a posterior is "
        "right."
    )
    return f'<ul class="verdicts">{"".join(items)}</ul><p class="note">{note}</p>'


def _checks(group: Sequence[Section]) -> str:
    rows = "".join(_line(line) for line in lines(group))
    return f'<h3 id="{_identity(group)}">{escape(group_title(group))}</h3><ul class="checks">{rows}</ul>'


def _line(line: Line) -> str:
    check = line.check
    if len(line.values) == 1:
        value = escape(check.value)
    else:
        value = "".join(
            f"<span>seed {seed}: {escape(text)}"
            + ("" if own == check.status else f' <b class="one-{own}">{SYMBOLS[own]} {_WORDS[own]}</b>')
            + "</span>"
            for seed, own, text in line.values
        )
    remedy = f"<p><strong>Try:</strong> {_prose(check.remedy)}</p>" if check.remedy else ""
    return (
        f'<li class="{check.status}">{_badge(check.status)}<div><div><h4>{escape(check.name)}</h4>'
        f'<p class="value">{value}</p></div><div><p>{_prose(check.meaning)}</p>{remedy}</div></div></li>'
    )


def _prose(text: str) -> str:
    """Escaped text with `code` between backticks marked as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _pictures(group: Sequence[Section]) -> str:
    first, *others = group
    parts = [f"<h3>{escape(group_title(group))}</h3>", _grid(first)]
    parts += [f"<details><summary>{escape(other.title)}</summary>{_grid(other)}</details>" for other in others]
    return "".join(parts)


def _grid(section: Section) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(picture.alt or picture.path.stem.replace("_", " "))}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.path.read_bytes()).decode()}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in section.pictures
    )
    return f'<div class="grid">{figures}</div>'


def _figures(group: Sequence[Section]) -> str:
    several = len(group) > 1
    title = group_title(group)
    heads = [f"seed {section.seed}" for section in group] + (["mean"] if several else [])
    head = "".join(f'<th class="n" scope="col">{escape(text)}</th>' for text in heads)
    rows = []
    for key in dict.fromkeys(key for section in group for key in section.figures):
        values = [section.figures.get(key, math.nan) for section in group]
        cells = "".join(f'<td class="n">{format_figure(value)}</td>' for value in values + [fmean(values)] * several)
        name, meaning = _MEANING.get(key, (key.replace("_", " "), ""))
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}<td class="m">{escape(meaning)}</td></tr>')
    reading = "".join(f"<p>{escape(sentence)}</p>" for sentence in group[0].reading)
    return (
        f"<h3>{escape(title)}</h3>{reading}"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Figures: {escape(title)}"><table><thead><tr>'
        f'<th scope="col">figure</th>{head}<th scope="col">how to read it</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _settings(settings: Mapping[str, object]) -> str:
    shown = {**settings, "Python": platform.python_version(), "pyro-contrastive": __version__}
    for package in _PACKAGES:
        try:
            shown[package] = version(package)
        except PackageNotFoundError:
            continue
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in shown.items())
    return f"<dl>{items}</dl>"
