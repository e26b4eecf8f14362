"""The report in a real browser: nothing overflows, nothing is asked for, every picture is there, nothing is logged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pyro_contrastive.diagnostics import Check, Picture, Section, opinion_text, plots, write_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")

LONG = "models.MCInfoNCE(marginal='empirical')_" * 4  # a word that must not widen the page
FAIL = Check("Coverage of caps", "fail", "80 % caps hold 60 % <of> 500", "Over-confident.", f"Try `{LONG}` & more.")
WARN = Check("Dimensions in use", "warn", "3.0 of 16 dimensions", "Few.", "Centre the features.")
PASS = Check("Training", "pass", "loss from 3 to 1", "Settled.")
SKIP = Check("Level of the concentrations", "skip", "stated", "An assumption.")


def sections(folder: Path) -> list[Section]:
    pictures = []
    for index in range(2):
        path = folder / f"curve_{index}.png"
        plots.plot_history({"loss": [3.0, 2.0, 1.0]}).figure.savefig(path, dpi=40)
        pictures.append(Picture(path, "How it fell.", "Training: loss against step"))
    figures = {"coverage_80": 0.6, "a_figure_with_a_long_name_of_its_own": 12345.678}
    return [
        Section("Images, seed 0", "image", 0, figures, pictures[:1], ["Read it."], [FAIL, PASS, SKIP]),
        Section("Images, seed 1", "image", 1, figures, pictures[1:], [], [Check(**{**vars(PASS), "name": FAIL.name})]),
        Section("A world", "sphere", 0, figures, pictures, [], [PASS, WARN]),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    settings = {"command": "pyro-contrastive report " + "runs/" * 40, "device": "cpu"}
    return write_html(folder, "A report", sections(folder), settings=settings)


class Outline(HTMLParser):
    """Headings, ids, links and pictures of a page, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.attributes: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if re.fullmatch(r"h\d", tag):
            self.levels.append(int(tag[1]))
        for name, value in attrs:
            self.attributes.setdefault(f"{tag}.{name}", []).append(value or "")


def test_the_opinion_comes_first_and_the_worst_line_before_the_others(page):
    html = page.read_text()
    places = [
        html.index(text) for text in ("Do not trust", "<h2>Checks", "<h2>Pictures", "<h2>Figures", "<h2>Settings")
    ]
    assert places == sorted(places)
    checks = html[places[1] : places[2]]
    found = re.findall(r'<li class="(\w+)"><span class="badge"><i aria-hidden="true">(.)</i>([\w ]+)</span>', checks)
    assert found == [
        ("fail", "✗", "fail"), ("pass", "✓", "pass"), ("skip", "–", "not judged"),
        ("warn", "!", "warn"), ("pass", "✓", "pass"),
    ]  # fmt: skip
    assert "seed 1: loss from 3 to 1" in checks and "✓ pass" in checks  # the seed that differs from its line says so
    assert "&lt;of&gt;" in checks and f"<code>{LONG}</code> &amp; more." in checks


def test_headings_links_and_pictures_make_sense_without_eyes(page):
    outline = Outline(page.read_text())
    assert outline.levels[0] == 1 and outline.levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(outline.levels, outline.levels[1:], strict=False))  # no level is left out
    assert {link.removeprefix("#") for link in outline.attributes["a.href"]} <= set(outline.attributes["h3.id"])
    assert len(set(outline.attributes["h3.id"])) == len(outline.attributes["h3.id"])
    assert outline.attributes["img.alt"] == ["Training: loss against step"] * 4
    assert outline.attributes["html.lang"] == ["en"] and set(outline.attributes["th.scope"]) == {"col", "row"}


def test_the_terminal_shows_the_same_opinion(tmp_path):
    text = opinion_text(sections(tmp_path), width=90)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 90
    sentence = "Do not trust these posteriors yet: 1 fails (Coverage of caps), 1 passes, 1 cannot be judged."
    assert sentence in " ".join(lines)
    assert "✗ FAIL  Coverage of caps" in text and "seed 1 (pass): loss from 3 to 1" in text
    assert "Try: Centre the features." in text and text.index("! WARN") < text.index("loss from 3 to 1", 600)


PROBE = """<!doctype html><body>
<iframe id="page" src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {{  // which waits for the pictures
  const page = frame.contentDocument, root = page.documentElement;
  for (const part of page.querySelectorAll("details")) part.open = true;
  const wide = [...page.querySelectorAll("body *")]
    .filter(part => !part.closest(".scroll") && part.getBoundingClientRect().right > {width} + 0.5);
  document.body.textContent = "FOUND" + JSON.stringify({{
    width: root.clientWidth,
    scroll: root.scrollWidth,
    wide: wide.map(part => part.outerHTML.slice(0, 90)),
    images: [...page.images].map(image => image.naturalWidth),
    background: getComputedStyle(page.body).backgroundColor,
  }});
}});
</script></body>
"""


def browse(folder: Path, width: int, *options: str) -> tuple[dict, str]:
    """What the probe found in `folder/report.html` at a width in pixels, and what the page wrote to the console.

    A frame has that width: the browser's own window does not get narrower than 500 pixels.
    """
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width))
    command = [
        *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--enable-logging=stderr", "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}"),
        *("--window-size=1400,1000", *options, "--dump-dom", probe.as_uri()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"FOUND(\{.*\})", result.stdout, re.DOTALL)
    assert result.returncode == 0 and found, f"{result.stdout[-500:]}\n{result.stderr[-2000:]}"
    console = "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(unescape(found.group(1))), console


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, False), (400, True)])
def test_in_a_browser(page, tmp_path, width, dark):
    shutil.copy(page, tmp_path / "report.html")
    found, console = browse(tmp_path, width, *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    assert found["width"] >= width - 20 and found["scroll"] <= found["width"], found
    assert found["wide"] == []
    assert len(found["images"]) == 4 and min(found["images"]) > 0
    assert console == ""  # a request of the page would be refused by its own policy, and that is logged
    brightness = sum(map(int, re.findall(r"\d+", found["background"])[:3])) / 3
    assert brightness < 60 if dark else brightness > 240


@needs_browser
def test_the_probe_sees_what_is_wrong(page, tmp_path):
    faults = '<div style="width:900px">wide</div><img alt="" src="data:image/png;base64,xx"><img alt="" src="x.png">'
    head, body = page.read_text().split("<body>")
    (tmp_path / "report.html").write_text(f"{head}<body>{faults}{re.sub('<img[^>]*>', '', body)}")
    found, console = browse(tmp_path, 400)
    assert found["scroll"] > found["width"] and len(found["wide"]) == 1
    assert found["images"] == [0, 0] and "Content Security Policy" in console and "x.png" in console
