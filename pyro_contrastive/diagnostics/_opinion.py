"""The opinions of several sections, brought together line by line: for the page, for the terminal and for JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from pyro_contrastive.diagnostics.checks import SYMBOLS, Check, Status, verdict, worst
from pyro_contrastive.diagnostics.section import Section

__all__ = ["Line", "by_kind", "group_title", "lines", "opinion_text"]

_ORDER: tuple[Status, ...] = ("fail", "warn", "pass", "skip")


@dataclass(frozen=True)
class Line:
    """One check over the sections of a kind.

    Attributes:
        check: The most serious of its checks, whose meaning and remedy the line shows.
        values: Status and figures of each section, with its seed.
    """

    check: Check
    values: list[tuple[int, Status, str]]


def by_kind(sections: Sequence[Section]) -> list[list[Section]]:
    """Sections grouped by kind, in the order of first appearance."""
    kinds = dict.fromkeys(section.kind for section in sections)
    return [[section for section in sections if section.kind == kind] for kind in kinds]


def group_title(group: Sequence[Section]) -> str:
    """Heading of sections of one kind: that of the first, without its seed where there are several."""
    first = group[0]
    return first.title.removesuffix(f", seed {first.seed}") if len(group) > 1 else first.title


def lines(group: Sequence[Section]) -> list[Line]:
    """The checks of sections of one kind, one line per name, the most serious first."""
    found: dict[str, list[tuple[int, Check]]] = {}
    for section in group:
        for check in section.checks:
            found.setdefault(check.name, []).append((section.seed, check))
    result = []
    for members in found.values():
        status = worst(check.status for _, check in members)
        leading = next(check for _, check in members if check.status == status)
        result.append(Line(leading, [(seed, check.status, check.value) for seed, check in members]))
    return sorted(result, key=lambda line: _ORDER.index(line.check.status))  # stable: page order within a status


def opinion_text(sections: Sequence[Section], *, width: int = 100) -> str:
    """The opinion as plain text for a terminal.

    Args:
        sections: Sections in reading order; those without checks are left out.
        width: Columns.

    Returns:
        Lines of text: a verdict per kind, then its checks, with meaning and remedy where one does not pass.
    """
    out: list[str] = []
    for group in by_kind(sections):
        rows = lines(group)
        if not rows:
            continue
        _, sentence = verdict([check for section in group for check in section.checks])
        out += ["", group_title(group), *textwrap.wrap(sentence, width)]
        for line in rows:
            status = line.check.status
            values = [
                value if len(line.values) == 1 else f"seed {seed}{'' if own == status else f' ({own})'}: {value}"
                for seed, own, value in line.values
            ]
            head = f"  {SYMBOLS[status]} {status.upper():<5} {line.check.name}"
            out += textwrap.wrap(
                f"{head}: {values[0]}" if len(values) == 1 else head, width, subsequent_indent=" " * 10
            )
            for value in values[1:] and values:
                out += textwrap.wrap(value, width, initial_indent=" " * 10, subsequent_indent=" " * 12)
            if status != "pass":
                out += textwrap.wrap(line.check.meaning, width, initial_indent=" " * 10, subsequent_indent=" " * 10)
            if line.check.remedy:
                text = f"Try: {line.check.remedy}"
                out += textwrap.wrap(text, width, initial_indent=" " * 10, subsequent_indent=" " * 10)
    return "\n".join([*out, ""])
