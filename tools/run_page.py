"""Run the Python blocks of a documentation page in order, and renew the output that the page shows for them.

``python tools/run_page.py docs/tutorial.md`` writes into the page what each block printed: into the ``text`` block that
follows it. Files that the blocks write go to the current folder.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

PAIR = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def run(text: str, name: str = "page") -> tuple[list[tuple[str, str, float]], dict[str, Any]]:
    """Run the blocks of a page in one namespace.

    Args:
        text: The page, in Markdown.
        name: File name for tracebacks.

    Returns:
        For each block what the page shows below it (empty where it shows nothing), what it printed, and the CPU
        seconds that it took; and the names that they left behind.
    """
    namespace: dict[str, Any] = {"__name__": "page"}
    done = []
    for block in PAIR.finditer(text):
        printed, started = io.StringIO(), time.process_time()
        # padded, so that a traceback has the line numbers of the page
        code = "\n" * text[: block.start("code")].count("\n") + block["code"]
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), namespace)
        done.append((block["shown"] or "", printed.getvalue(), time.process_time() - started))
    return done, namespace


def renew(text: str, printed: list[str]) -> str:
    """Put new output into a page.

    Args:
        text: The page, in Markdown.
        printed: What each block printed; empty for a block without output.

    Returns:
        The page with a ``text`` block below each block that printed something, and none below the others.
    """
    outputs = iter(printed)

    def replace(block: re.Match[str]) -> str:
        output = next(outputs)
        return f"```python\n{block['code']}```\n" + (f"\n```text\n{output}```\n" if output else "")

    return PAIR.sub(replace, text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    results, _ = run(page.read_text(), page.name)
    page.write_text(renew(page.read_text(), [output for _, output, _ in results]))
    print("CPU seconds by block:", " ".join(f"{seconds:.1f}" for *_, seconds in results))
    print(f"CPU seconds in all: {sum(seconds for *_, seconds in results):.1f}")
