"""The documentation says nothing that the code does not: links, names, commands, code blocks."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import pyro_contrastive

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pyro_contrastive.__path__, "pyro_contrastive.")
    if not module.name.endswith("__main__")
)
PARTS = {name.split(".")[1] for name in MODULES}


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that the headings of a page get: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_first_block_of_the_readme_is_the_quickstart():
    source = (ROOT / "examples" / "quickstart.py").read_text()
    (region,) = re.findall(r"^# \[quickstart\]\n(.*?)^# \[/quickstart\]", source, re.MULTILINE | re.DOTALL)
    region = re.sub(r", (device|out)=args\.\w+", "", region)  # the script's options, at their defaults
    region = region.replace("args.seed", "0").replace("args.steps", "2_000")
    assert "args" not in region
    shown = blocks(ROOT / "README.md", "python")[0]
    assert shown.strip() == region.strip(), "copy the marked region of the example into the README"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: {file.name} has the headings {sorted(anchors(file))}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_code_names_exist(page: Path):
    # `models.RPM`, `diagnostics.to_arviz`, `models.MCInfoNCE(guide, ...)`: a part of the package, a dot, a name.
    for part, name in re.findall(r"`(?:pyro_contrastive\.)?(\w+)\.(\w+)", page.read_text()):
        if part in PARTS and name != "py":
            module = importlib.import_module(f"pyro_contrastive.{part}")
            assert hasattr(module, name), f"pyro_contrastive.{part} has no `{name}`"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page: Path):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", page.read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "tutorial.md"], ids=page_id)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The tutorial has its own test. The blocks of a page are read from top to bottom, so a later one may use the names
    # of an earlier one.
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page, "python"):
        block = block.replace("steps=2_000", "steps=20")  # that it runs, not what it learns
        exec(compile(block, page_id(page), "exec"), namespace)


def public(module: ModuleType) -> list[str]:
    """Names that a module offers: `__all__`, or what it defines without an underscore."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return list(getattr(module, "__all__", [name for name in defined if not name.startswith("_")]))


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name: str):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for symbol in public(module):
        value = getattr(module, symbol)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        assert value.__doc__, f"{name}.{symbol} has no docstring of its own"
        if inspect.isclass(value) and value.__module__.startswith("pyro_contrastive"):
            for attribute, member in vars(value).items():
                if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    assert inspect.getdoc(getattr(value, attribute)), f"{name}.{symbol}.{attribute} has no docstring"
