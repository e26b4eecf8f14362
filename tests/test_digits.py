"""The digits, their fixed split and the corruption of known strength."""

from __future__ import annotations

import pytest
import torch

from pyro_contrastive.data import corrupt, load_digits, shift_and_dropout


def test_split_is_fixed_disjoint_and_complete():
    train, train_labels = load_digits("train")
    test, test_labels = load_digits("test")
    assert train.shape == (1400, 1, 8, 8) and test.shape == (397, 1, 8, 8)
    assert train.dtype == torch.float32 and train_labels.dtype == torch.int64
    assert float(train.min()) == 0.0 and float(train.max()) == 1.0
    assert torch.bincount(torch.cat([train_labels, test_labels])).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    assert torch.equal(load_digits("train")[0], train)
    assert not torch.equal(load_digits("train", seed=1)[0], train)
    rows = torch.cat([train, test]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 1797  # no image twice: the halves are disjoint


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    load_digits("test")
    shift_and_dropout(torch.ones(4, 1, 8, 8), torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


def test_corruption_has_the_level_it_says():
    images = torch.ones(64, 1, 40, 40)
    level = torch.linspace(0, 1, 64)
    lost = 1 - corrupt(images, level, torch.Generator().manual_seed(0)).mean(dim=(1, 2, 3))
    # 1,600 pixels: s.d. <= 0.0125; 64 comparisons at 5 s.d. ring falsely with probability < 4e-5
    assert float((lost - level).abs().max()) < 0.0625
    assert float(lost[0]) == 0.0 and float(lost[-1]) == 1.0
    colour = corrupt(torch.ones(2, 3, 8, 8), 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(colour[:, 0], colour[:, 1]) and torch.equal(colour[:, 0], colour[:, 2])


def test_shift_against_a_loop():
    images = torch.rand(50, 2, 6, 7, generator=torch.Generator().manual_seed(1)) + 0.1
    view, level = shift_and_dropout(images, torch.Generator().manual_seed(0), max_shift=2, max_level=0.0)
    assert float(level.abs().max()) == 0.0
    seen = set()
    for image, moved in zip(images, view, strict=True):
        matches = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                expected = torch.zeros_like(image)
                for y in range(6):
                    for x in range(7):
                        if 0 <= y + dy < 6 and 0 <= x + dx < 7:
                            expected[:, y, x] = image[:, y + dy, x + dx]
                if torch.equal(expected, moved):
                    matches.append((dy, dx))
        assert len(matches) == 1
        seen.add(matches[0])
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == {-2, -1, 0, 1, 2}


def test_views_differ_and_repeat_with_the_seed():
    images = load_digits("test")[0][:32]
    generator = torch.Generator().manual_seed(3)
    first, level1 = shift_and_dropout(images, generator)
    second, level2 = shift_and_dropout(images, generator)
    assert not torch.equal(first, second) and not torch.equal(level1, level2)
    assert float(level1.min()) >= 0 and float(level1.max()) <= 0.8
    again, _ = shift_and_dropout(images, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: load_digits("valid"), "'train' or 'test', got 'valid'"),
        (lambda x: corrupt(x[0], 0.1), r"\(N, C, H, W\), got"),
        (lambda x: corrupt(x, 1.5), r"in \[0, 1\], got 1.5"),
        (lambda x: corrupt(x, torch.zeros(2)), r"shape \(\) or \(3,\), got \(2,\)"),
        (lambda x: shift_and_dropout(x, max_shift=-1), ">= 0 pixels, got -1"),
        (lambda x: shift_and_dropout(x, max_level=float("nan")), r"in \[0, 1\], got nan"),
    ],
)
def test_errors_say_the_rule_and_what_was_got(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 1, 8, 8))
