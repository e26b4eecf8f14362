"""Precisions against the truth, the opinion on them, their picture; signed precisions as parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions import transform_to

from pyro_contrastive import diagnostics
from pyro_contrastive.ops.constraints import signed_scale_parameter


def test_errors_are_relative_and_follow_the_axes():
    z = np.random.default_rng(0).normal(size=(200, 3))
    axes = diagnostics.mcc(-z[:, [2, 0, 1]], z)
    found = diagnostics.precision_recovery(torch.tensor([9.0, 1.0, 4.4]), [1.0, 4.0, 10.0], axes)
    np.testing.assert_allclose(found.matched, [1.0, 4.4, 9.0], rtol=1e-6)
    assert found.relative_error == pytest.approx((0 + 0.1 + 0.1) / 3, rel=1e-5)
    assert found.sorted_error == pytest.approx(found.relative_error)
    swapped = diagnostics.precision_recovery([1.0, 4.4, 9.0], [4.0, 1.0, 10.0])
    assert swapped.relative_error == pytest.approx((0.75 + 3.4 + 0.1) / 3) and swapped.sorted_error < 0.1


def test_more_learned_axes_than_true_ones_have_no_sorted_error():
    found = diagnostics.precision_recovery([5.0, 2.0, 7.0], [2.0, 7.0], axes=[1, 2])
    assert found.relative_error == 0 and math.isnan(found.sorted_error)


def test_negative_differences_have_a_relative_error():
    assert diagnostics.precision_recovery([-2.2, 5.0], [-2.0, 5.0]).relative_error == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0, 2.0]), r"m >= d >= 1, got \(1,\) and \(2,\)"),
        (([[1.0]], [1.0]), "m >= d >= 1"),
        (([1.0, 2.0], [1.0, 0.0]), "true ones not 0"),
        (([1.0, math.nan], [1.0, 2.0]), "must be finite"),
        (([1.0, 2.0], [1.0, 2.0], [0, 2]), "2 indices of the 2 learned axes"),
        (([1.0, 2.0], [1.0, 2.0], [0]), "2 indices of the 2 learned axes"),
    ],
)
def test_wrong_precisions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.precision_recovery(*arguments)


def test_axes_that_say_nothing_are_named():
    assert diagnostics.judge_precision(torch.tensor([12.0, 3.0])).status == "pass"
    check = diagnostics.judge_precision([12.0, 0.01, -3.0])
    assert check.status == "warn" and check.value == "axis 1: 0.01, axis 2: -3" and check.remedy
    assert diagnostics.judge_precision([12.0, 0.074, 1.0]).status == "warn"  # the bound is .05 d / 2 = .075
    assert diagnostics.judge_precision([12.0, 0.076, 1.0]).status == "pass"
    with pytest.raises(ValueError, match="with d >= 2"):
        diagnostics.judge_precision([1.0])


def test_the_picture_shows_the_pairs():
    found = diagnostics.precision_recovery([9.0, 4.4], [10.0, 4.0])
    ax = diagnostics.plot_precision({"one": found, "signed": diagnostics.precision_recovery([-1.0], [-2.0])})
    diagonal, points, _ = ax.lines
    np.testing.assert_array_equal(points.get_xydata(), [[10.0, 9.0], [4.0, 4.4]])
    assert ax.get_xlim() == tuple(diagonal.get_xdata()) and ax.get_xlim()[0] < -2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "recovered",
        "one (10% off)",
        "signed (50% off)",
    ]
    assert diagnostics.plot_precision(found, ax=ax) is ax


def test_signed_scales_are_asinh_and_cross_zero():
    transform = transform_to(signed_scale_parameter)
    values = torch.tensor([-50.0, -1.0, 0.0, 1e-3, 7.0], dtype=torch.float64)
    raw = transform.inv(values)
    torch.testing.assert_close(raw, torch.asinh(values) / 4)
    torch.testing.assert_close(transform(raw), values)
    slope = torch.autograd.functional.jacobian(transform, raw).diagonal()
    torch.testing.assert_close(transform.log_abs_det_jacobian(raw, values), slope.log())
    assert not signed_scale_parameter.check(torch.tensor([math.nan])).any()
    module = PyroModule()
    module.scale = PyroParam(torch.tensor(2.0), constraint=signed_scale_parameter)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        (module.scale + 3.0).square().backward()
        optimiser.step()
    assert module.scale.item() == pytest.approx(-3.0, abs=0.2)
