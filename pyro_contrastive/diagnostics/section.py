"""A section of a report: what one evaluation found, before it is written anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pyro_contrastive.diagnostics.checks import Check, Status, worst

__all__ = ["Picture", "Section"]


@dataclass(frozen=True)
class Picture:
    """A PNG file and the caption that says how to read it.

    Attributes:
        path: The file.
        caption: How to read it.
        alt: What it shows, for those who do not see it; the file's name where empty.
    """

    path: Path
    caption: str
    alt: str = ""


@dataclass(frozen=True)
class Section:
    """One evaluation: opinion, figures, pictures and their reading.

    Attributes:
        title: Heading, for example "Handwritten digits, seed 0".
        kind: Short name of the evaluation, "sphere", "image" or "pair"; sections of one kind share a table.
        seed: Seed of the run.
        figures: Flat table of numbers; NaN where one does not apply.
        pictures: Pictures in reading order.
        reading: Sentences that say in plain language what the figures mean.
        checks: What was checked, with an opinion on each.
    """

    title: str
    kind: str
    seed: int
    figures: dict[str, float]
    pictures: list[Picture] = field(default_factory=list)
    reading: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def status(self) -> Status:
        """The most serious status of the checks; "skip" without any."""
        return worst(check.status for check in self.checks)
