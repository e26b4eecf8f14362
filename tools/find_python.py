"""Print the path of the first working interpreter of the given versions, or nothing: `find_python.py 3.13 3.12`.

A name on PATH is not enough (a pyenv shim of a version that is not selected fails when it runs), so each candidate
is run and asked for its version. Looked at in this order: PATH, pyenv, and the folders beside the interpreter that
runs this file (where pyenv and uv keep the others).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def _output(*command: str | Path) -> str:
    """Standard output of a command, empty if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _roots() -> Iterator[Path]:
    """Folders whose sub-folders are Python installations."""
    if shutil.which("pyenv") and (root := _output("pyenv", "root")):
        yield Path(root, "versions")
    yield Path(sys.base_prefix).parent


def _candidates(version: str) -> Iterator[str | Path]:
    """Paths that may be an interpreter of `version` ("3.13")."""
    if found := shutil.which(f"python{version}"):
        yield found
    for root in _roots():
        folders = [path for path in root.glob("*") if re.search(rf"(^|-){re.escape(version)}(\D|$)", path.name)]
        for folder in sorted(folders):
            yield folder / "bin" / f"python{version}"


def find(versions: list[str]) -> str | None:
    """The first interpreter that runs and is of one of `versions`, in the order given.

    Args:
        versions: "major.minor" strings.

    Returns:
        The interpreter's own path (`sys.executable`), or None.
    """
    report = "import sys, venv; print('%d.%d' % sys.version_info[:2], sys.executable)"
    for version in versions:
        for candidate in _candidates(version):
            answer = _output(candidate, "-c", report).split(" ", 1)
            if answer[0] == version:
                return answer[1]
    return None


if __name__ == "__main__":
    print(find(sys.argv[1:]) or "")
