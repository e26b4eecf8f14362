"""The architecture, read from the syntax trees: who may import whom, what is imported late, how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "pyro_contrastive"

# The layer that each part of the package is in; a part imports from lower numbers, and from itself. The package's own
# __init__ is above all of them.
LAYERS = {
    "ops": 0,
    "modules": 0,
    "distributions": 1,
    "kernels": 2,
    "aggregates": 2,
    "factors": 3,
    "objectives": 4,
    "positives": 4,
    "priors": 4,
    "shared_latent": 4,
    "distributed": 5,
    "encoding": 5,
    "nets": 5,
    "schedules": 5,
    "models": 6,
    "guides": 6,  # never from models, nor models from guides: a model is handed its recognition module
    "checkpoint": 6,
    "trackers": 6,
    "validation": 6,
    "_fit_state": 6,
    "_fit_data": 7,
    "_fit_processes": 6,
    "_fit_step": 7,
    "_fit_settings": 7,
    "_fit_problem": 8,
    "fit": 9,
    "_embedding_parts": 0,
    "data": 10,
    "diagnostics": 11,
    "embedding": 12,
    "choices": 11,
    "registry": 12,
    "cli": 13,
    "__main__": 14,
}
METHODS = {"models", "guides"}
JOINS_METHODS = {"choices", "registry", "cli", "__main__"}  # the only parts that know both a method and the core
LATE = {
    "torchvision",
    "sklearn",
    "matplotlib",
    "arviz",
    "xarray",
    "faiss",
    "pyarrow",
}  # slow to import: inside functions only
EXTRAS = {
    "faiss": ("retrieval", "faiss-cpu"),
    "pyarrow": ("parquet", "pyarrow"),
    "zarr": ("zarr", "zarr"),
}  # modules that only an extra installs, and their distributions
WITH_TORCH = {"triton"}  # the Linux builds of torch bring it along; one file needs it, which is imported on first use
NEED_TRITON = {"_fused_kernels"}
MAX_LINES = 420


def files() -> list[Path]:
    """Every source file under its installed path."""
    inner = [path for path in (ROOT / PACKAGE).rglob("*.py") if not METHODS & set(path.parts)]
    return sorted(inner + [path for name in METHODS for path in (ROOT / PACKAGE / name).rglob("*.py")])


def imports(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """The dotted names that `source` imports, and whether that happens when the file is imported.

    Args:
        source: Python text.
        package: Dotted name of the package that the file is in (what a relative import starts from).

    Yields:
        `(name, early)`; `from a import b` gives "a.b", so that a sub-module b is seen.
    """
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while pending:
        node, early = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, early) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", early) for alias in node.names)
        if isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING":
            pending += [(child, False) for child in node.body]
            pending += [(child, early) for child in node.orelse]
        else:
            late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            pending += [(child, early and not late) for child in ast.iter_child_nodes(node)]


def part_of(dotted: str) -> str:
    """The part (a key of `LAYERS`) that a dotted name inside the package belongs to, "" for the package itself."""
    return (dotted.split(".") + [""])[1]


def faults(source: str, module: str, package: str) -> list[str]:
    """Broken rules of one file, in words.

    Args:
        source: Python text.
        module: Dotted name of the file, e.g. "pyro_contrastive.fit".
        package: Dotted name of the package it is in.
    """
    part = part_of(module)
    if part and part not in LAYERS:
        return [f"{module} is in no layer: add `{part}` to LAYERS"]
    found = []
    for name, early in imports(source, package):
        top = name.split(".")[0]
        if top in METHODS:
            found.append(f"{module} imports the bare folder `{top}`: write pyro_contrastive.{top}")
        elif top in LATE and (early or (top == "torchvision" and part not in {"data", "nets"})):
            found.append(f"{module} imports {top}" + (" when it is imported" if early else ": only data and nets may"))
        elif top == PACKAGE and part and (target := part_of(name)) in LAYERS and target != part:
            if LAYERS[target] >= LAYERS[part]:
                found.append(f"{module} imports {name}, which is not in a lower layer")
            elif target in METHODS and part not in JOINS_METHODS:
                found.append(f"{module} imports {name}: the core knows no method")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts).removesuffix(".__init__")
    assert faults(path.read_text(), module, ".".join(parts[:-1])) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyro_contrastive.ops.bessel", "from pyro_contrastive.distributions import VonMisesFisher"),
        ("pyro_contrastive.ops.bessel", "from ..distributions import VonMisesFisher"),
        ("pyro_contrastive.kernels", "from pyro_contrastive import factors"),
        ("pyro_contrastive.models.rpm", "from pyro_contrastive.guides import Delta"),
        ("pyro_contrastive.guides.delta", "from ..models import RPM"),
        ("pyro_contrastive.guides.delta", "import models"),
        ("pyro_contrastive.fit", "def f():\n    from pyro_contrastive import models"),
        ("pyro_contrastive.diagnostics.plots", "import pyro_contrastive.guides.delta"),
        ("pyro_contrastive.data.views", "import torchvision"),
        ("pyro_contrastive.nets", "import torchvision.models"),
        ("pyro_contrastive.factors", "def f():\n    import torchvision.models"),
        ("pyro_contrastive.diagnostics.plots", "class A:\n    from matplotlib.figure import Figure"),
        ("pyro_contrastive.helpers", ""),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str):
    assert len(faults(source, module, module.rpartition(".")[0])) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pyro_contrastive.factors", "from pyro_contrastive import __version__, kernels"),
        ("pyro_contrastive.models.rpm", "from pyro_contrastive.objectives import KSampleELBO\nfrom . import base"),
        ("pyro_contrastive.cli", "from pyro_contrastive import guides, models"),
        ("pyro_contrastive.data.views", "def f():\n    import torchvision"),
        ("pyro_contrastive.nets", "def f():\n    import torchvision.models"),
        ("pyro_contrastive.data.views", "if TYPE_CHECKING:\n    import torchvision"),
        ("pyro_contrastive.diagnostics.plots", "def f():\n    from matplotlib.figure import Figure"),
    ],
)
def test_a_kept_rule_is_let_through(module: str, source: str):
    assert faults(source, module, module.rpartition(".")[0]) == []


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_one_purpose(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines, at most {MAX_LINES}: a file over about 400 lines is two files"


def test_every_library_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line).group().lower() for line in project["dependencies"]}
    for module, (extra, owner) in EXTRAS.items():
        assert any(line.startswith(owner) for line in project["optional-dependencies"][extra]), f"declare {module}"
    distributions = packages_distributions()
    for path in files():
        for name, _ in imports(path.read_text(), ".".join(path.relative_to(ROOT).parts[:-1])):
            top = name.split(".")[0]
            if top not in {PACKAGE, *EXTRAS, *WITH_TORCH, *sys.stdlib_module_names}:
                assert declared & {owner.lower() for owner in distributions[top]}, f"{path} imports {top}: declare it"


def test_importing_everything_loads_no_slow_library(record_property):
    chosen = [path for path in files() if path.stem not in {"__main__", *NEED_TRITON}]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in chosen]
    # What pyro itself loads is not ours to avoid, hence the difference.
    program = f"""
import importlib, sys, time
import pyro
before, start = set(sys.modules), time.perf_counter()
for name in {modules!r}:
    importlib.import_module(name.removesuffix(".__init__"))
print(round(time.perf_counter() - start, 3), *sorted({LATE!r} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, *loaded = done.stdout.split()
    record_property("seconds to import every module, after pyro", seconds)
    assert loaded == []
