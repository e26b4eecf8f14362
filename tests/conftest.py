"""What holds for every test: a fresh Pyro parameter store, a fixed seed, and no change of global state left behind."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from hypothesis import settings

# Derandomised: a failure of one run is the failure of every run. No deadline: the first call may compile or warm up.
settings.register_profile("repository", deadline=None, derandomize=True, database=None)
settings.load_profile("repository")


EXAMPLES = Path(__file__).parents[1] / "examples"


def pytest_configure(config: pytest.Config) -> None:
    """One torch thread per process, so that parallel workers do not compete; a backend that nothing here asks for."""
    torch.set_num_threads(1)
    matplotlib.use("svg")  # set, since reading an unset one chooses it; not Agg, so that a change to Agg is seen


def pytest_report_header(config: pytest.Config) -> str:
    """The versions that decide what is being tested."""
    names = ("torch", "pyro-ppl", "arviz", "numpy")
    return "versions: " + ", ".join(f"{name} {version(name)}" for name in names)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show figures that tests put down with `record_property`: measured, but not asserted."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"measured: {name} = {value}")


def global_state() -> dict[str, Any]:
    """Everything process-wide that a library must leave as it found it."""
    state: dict[str, Any] = {f"pyro setting {name}": value for name, value in pyro.settings.get().items()}
    state["torch default dtype"] = torch.get_default_dtype()
    state["torch default device"] = str(torch.get_default_device())
    state["torch threads"] = torch.get_num_threads()
    state["torch gradient mode"] = torch.is_grad_enabled()
    state["torch anomaly mode"] = torch.is_anomaly_enabled()
    state["torch deterministic algorithms"] = torch.are_deterministic_algorithms_enabled()
    # The argument checks of a class hold for all users of it, and one assignment (not a setting) turns them off.
    state["torch validates"] = torch.distributions.Distribution._validate_args
    state["numpy error mode"] = np.geterr()
    state |= {f"matplotlib {name}": value for name, value in matplotlib.rcParams.items()}
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what later tests depend on most, so that one offender does not fail its successors."""
    prefix = "pyro setting "
    pyro.settings.set(**{name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    torch.set_default_dtype(state["torch default dtype"])
    torch.set_num_threads(state["torch threads"])
    torch.set_grad_enabled(state["torch gradient mode"])
    torch.distributions.Distribution._validate_args = state["torch validates"]


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Start each test from one seed and an empty store; fail the test that leaves global state changed."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = global_state()
    yield
    after = global_state()
    changed = {name: (value, after[name]) for name, value in before.items() if after[name] != value}
    restore(before)
    pyro.clear_param_store()
    if changed:
        told = "; ".join(f"{name}: {old} -> {new}" for name, (old, new) in changed.items())
        pytest.fail(f"the test left global state changed ({told}); use a context or a local generator", pytrace=False)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import an example as its own directory sees it, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == EXAMPLES:
            del sys.modules[name]
