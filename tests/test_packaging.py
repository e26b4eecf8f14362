"""What a user installs: the wheel, the two folders behind symlinks, the version."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import pyro_contrastive

ROOT = Path(__file__).parents[1]
OUTER = ("models", "guides")
SOURCES = ("pyro_contrastive", "models", "guides", "pyproject.toml", "README.md", "LICENSE")


def expected_modules() -> set[str]:
    """Paths inside the wheel that the source tree asks for."""
    inner = {path.relative_to(ROOT) for path in (ROOT / "pyro_contrastive").rglob("*.py") if not path.is_symlink()}
    outer = {Path("pyro_contrastive", path.relative_to(ROOT)) for name in OUTER for path in (ROOT / name).rglob("*.py")}
    return {path.as_posix() for path in inner | outer}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline by the installed setuptools from a copy (a build leaves folders behind)."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    program = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    target = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", program, target], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_every_module_once_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    code = [name for name in names if ".dist-info/" not in name]
    assert sorted(code) == sorted(expected_modules() | {"pyro_contrastive/py.typed"})
    (licence,) = [name for name in names if name.endswith("/LICENSE")]
    assert b"Apache License" in zipfile.ZipFile(wheel).read(licence)


def test_version_agrees_in_package_wheel_and_changelog(wheel: Path):
    assert wheel.name.split("-")[1] == pyro_contrastive.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == pyro_contrastive.__version__


def test_installed_version_is_that_of_the_sources():
    try:
        installed = version("pyro-contrastive")
    except PackageNotFoundError:
        pytest.skip("run from the source tree, not installed")
    assert installed == pyro_contrastive.__version__, "run `make test` again: pyproject.toml or the version changed"


def test_every_module_of_the_unpacked_wheel_imports(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = """
import importlib, importlib.util, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import pyro_contrastive
assert pyro_contrastive.__file__.startswith(sys.argv[1]), pyro_contrastive.__file__
for module in pkgutil.walk_packages(pyro_contrastive.__path__, "pyro_contrastive."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
for folder in ("models", "guides", "tests"):
    assert importlib.util.find_spec(folder) is None, folder
"""
    # -I: neither the working directory nor PYTHONPATH may lend a module.
    command = [sys.executable, "-I", "-c", program, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dotted = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in expected_modules()}
    assert set(done.stdout.split()) == {d for d in dotted if "." in d and not d.endswith("__main__")}


@pytest.mark.parametrize("name", OUTER)
def test_symlink_is_relative_and_leads_to_the_outer_folder(name: str):
    link = ROOT / "pyro_contrastive" / name
    assert link.is_symlink(), f"git must restore {link} as a symlink (core.symlinks), or install with pip instead"
    assert link.readlink() == Path("..", name)
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", OUTER)
def test_symlink_is_committed_as_one(name: str):
    command = ["git", "ls-files", "--stage", f"pyro_contrastive/{name}"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    assert done.stdout.startswith("120000 "), done.stdout


@pytest.mark.parametrize("name", OUTER)
def test_bare_folder_refuses_to_be_imported(name: str):
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"import pyro_contrastive.{name}" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the shim is a shell script")
def test_find_python_passes_over_a_shim_that_fails(tmp_path: Path):
    wanted = "{}.{}".format(*sys.version_info)
    shim = tmp_path / f"python{wanted}"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    command = [sys.executable, ROOT / "tools" / "find_python.py", "9.9", wanted]
    # Nothing but the shim is on PATH: what is found lies beside the interpreter that runs the search.
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).resolve() == Path(sys.base_prefix, "bin", f"python{wanted}").resolve()
    nothing = subprocess.run([*command[:2], "9.9"], capture_output=True, text=True, check=True)
    assert nothing.stdout.strip() == ""
