"""The fixture that guards global state: it must catch an offender, and protect the tests after it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

OFFENDERS = """
import matplotlib, numpy, pyro, pytest, torch

OFFENCES = [
    lambda: pyro.enable_validation(False),
    lambda: pyro.settings.set(module_local_params=True),
    lambda: setattr(torch.distributions.Distribution, "_validate_args", False),
    lambda: torch.set_default_dtype(torch.float64),
    lambda: torch.set_num_threads(2),
    lambda: torch.set_grad_enabled(False),
    lambda: numpy.seterr(all="ignore"),
    lambda: matplotlib.rcParams.update({"font.size": 99}),
]

@pytest.mark.parametrize("number", range(len(OFFENCES)))
def test_offender(number):
    OFFENCES[number]()

def test_successor():
    assert pyro.settings.get("validate_distributions_pyro") and torch.get_default_dtype() == torch.float32
    pyro.param("left", torch.ones(()))
    torch.manual_seed(7)

def test_store_is_empty_and_draws_do_not_depend_on_the_test_before():
    assert not pyro.get_param_store().keys()
    assert torch.equal(torch.randn(3), torch.randn(3, generator=torch.Generator().manual_seed(0)))
"""


def test_offenders_fail_and_their_successors_do_not(pytester: pytest.Pytester):
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(OFFENDERS)
    result = pytester.runpytest_subprocess("-p", "no:xdist")
    result.assert_outcomes(passed=8 + 2, errors=8)
    result.stdout.fnmatch_lines(["*left global state changed (pyro setting module_local_params: False -> True)*"])
