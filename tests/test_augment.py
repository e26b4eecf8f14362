"""Per-image augmentations against torchvision's functions, one image at a time, and the laws of their draws."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import functional as tv

from pyro_contrastive.data import JITTER_DRAWS, crop_and_rotate, crop_flip_jitter, crop_ladder, shift_and_flip


def images(n, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ramps(n, side=32):
    """Images whose channels are the coordinates of their pixels: a view of them tells where it came from."""
    axis = (torch.arange(side) + 0.5) / side
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 0.5)]).expand(n, -1, -1, -1)


def test_crops_are_rectangles_inside_the_image_of_the_stated_size():
    n, side = 2_000, 32
    view, fraction = crop_flip_jitter(ramps(n), generator(), jitter=0.0, grey=0.0)
    inner = slice(8, 24)  # where no border is replicated
    rows, columns = view[:, 0, inner, inner], view[:, 1, inner, inner]
    step_y, step_x = rows.diff(dim=1), columns.diff(dim=2)
    # an affine map: constant steps along one axis, none along the other
    torch.testing.assert_close(step_y, step_y[:, :1, :1].expand_as(step_y), atol=1e-5, rtol=0)
    torch.testing.assert_close(step_x, step_x[:, :1, :1].expand_as(step_x), atol=1e-5, rtol=0)
    assert float(rows.diff(dim=2).abs().max()) < 1e-5 > float(columns.diff(dim=1).abs().max())
    height, width = step_y[:, 0, 0] * side, step_x[:, 0, 0] * side
    torch.testing.assert_close(fraction, (height * width.abs()).sqrt(), atol=1e-4, rtol=0)
    assert float(fraction.min()) > 0.2**0.5 - 1e-4 and float(fraction.max()) <= 1.0
    for centre, length in ((rows.mean((1, 2)), height), (columns.mean((1, 2)), width.abs())):
        assert float((centre - length / 2).min()) > -1e-4 and float((centre + length / 2).max()) < 1 + 1e-4
    # 2,000 fair coins: 5 standard deviations ring falsely with probability 6e-7
    assert abs(float((width < 0).float().mean()) - 0.5) < 5 * 0.5 / n**0.5


def test_area_is_uniform_where_no_side_is_cut():
    _, fraction = crop_flip_jitter(images(4_000, 4), generator(), scale=(0.2, 0.7))
    area = fraction.square().numpy()
    assert stats.kstest(area, stats.uniform(0.2, 0.5).cdf).pvalue > 1e-4  # the rate of false alarms


def test_the_whole_image_comes_back_mirrored_or_not():
    x = images(20)
    view, fraction = crop_flip_jitter(x, generator(3), scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0.0, grey=0.0)
    assert torch.equal(fraction, torch.ones(20))
    for image, seen in zip(x, view, strict=True):
        errors = [float((seen - y).abs().max()) for y in (image, tv.horizontal_flip(image))]
        assert min(errors) < 1e-5 < max(errors)


@pytest.mark.parametrize("grey", [0.0, 1.0])
def test_jitter_against_torchvision(grey):
    x, n = images(16, seed=1), 16
    view, _ = crop_flip_jitter(x, generator(5), scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0.6, grey=grey)
    draw = torch.rand((9, n), generator=generator(5))
    for i in range(n):
        one = tv.horizontal_flip(x[i]) if float(draw[2, i]) < 0.5 else x[i]
        factors = [1 + 0.6 * (2 * float(draw[k, i]) - 1) for k in (5, 6, 7)]
        one = tv.adjust_brightness(one, factors[0])
        one = tv.adjust_contrast(one, factors[1])
        one = tv.adjust_saturation(one, factors[2])
        one = tv.rgb_to_grayscale(one, 3) if grey else one
        torch.testing.assert_close(view[i], one, atol=2e-4, rtol=0)  # torchvision rounds its weights of the colours


def test_draws_can_be_given_and_shared():
    recipe = {"hue": 0.1, "probability": 0.8, "random_order": True}
    draw = torch.rand((15, 40), generator=generator(4))
    for one, other in zip(
        crop_flip_jitter(images(40), generator(4), **recipe),
        crop_flip_jitter(images(40), draw=draw, **recipe),
        strict=True,
    ):
        assert torch.equal(one, other)
    colours, crops = draw.clone(), draw.clone()
    colours[5:], crops[:5] = torch.rand((10, 40), generator=generator(5)), torch.rand((5, 40), generator=generator(5))
    fraction = crop_flip_jitter(images(40), draw=draw)[1]
    assert torch.equal(crop_flip_jitter(images(40, seed=1), draw=colours)[1], fraction)  # the crop is shared
    assert not torch.equal(crop_flip_jitter(images(40), draw=crops)[1], fraction)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("size", lambda view: -view[:, 0].std((1, 2))),  # of the ramps: what is seen of the rows
        ("y", lambda view: view[:, 0].mean((1, 2))),
        ("x", lambda view: view[:, 1].mean((1, 2))),
        ("flip", lambda view: (view[:, 1, :, -1] > view[:, 1, :, 0]).float().mean(1)),
        ("brightness", lambda view: view[:, 2].mean((1, 2))),
        ("grey", lambda view: (view[:, 0] - view[:, 2]).abs().mean((1, 2))),
    ],
)
def test_the_names_of_the_draws_say_what_they_do(name, read):
    low, high = torch.full((2, 15, 1), 0.5)
    low[9], high[9] = 0.0, 0.0  # jittered
    low[JITTER_DRAWS[name]], high[JITTER_DRAWS[name]] = 0.05, 0.95
    if name == "size":
        low, high = high, low
    seen = [read(crop_flip_jitter(ramps(1), draw=draw, jitter=0.4)[0]).item() for draw in (low, high)]
    assert seen[0] < seen[1]


def test_simclr_recipe_against_torchvision():
    x, n = images(60, 12, seed=2), 60
    x[:3] = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None]  # without colour
    x[3, 2] = x[3, 0]  # two channels are the largest
    view, _ = crop_flip_jitter(
        x, generator(8), scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0.4, hue=0.3, probability=0.5, random_order=True
    )
    draw = torch.rand((15, n), generator=generator(8))
    changes = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    orders = set()
    for i in range(n):
        one = tv.horizontal_flip(x[i]) if float(draw[2, i]) < 0.5 else x[i]
        amounts = [*(1 + 0.4 * (2 * float(draw[k, i]) - 1) for k in (5, 6, 7)), 0.3 * (2 * float(draw[10, i]) - 1)]
        order = draw[11:, i].argsort().tolist()
        if float(draw[9, i]) < 0.5:
            orders.add(tuple(order))
            for k in order:
                one = changes[k](one, amounts[k])
        one = tv.rgb_to_grayscale(one, 3) if float(draw[8, i]) < 0.2 else one
        torch.testing.assert_close(view[i], one, atol=1e-3, rtol=0)  # torchvision rounds its weights of the colours
    assert len(orders) > 8  # of 24, in about 30 draws


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.1, 0.5])
def test_hue_alone_is_torchvisions(turn):
    x = images(20, 8, seed=4)
    options = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "jitter": 0.0, "grey": 0.0}
    plain, _ = crop_flip_jitter(x, generator(6), **options)
    turned, _ = crop_flip_jitter(x, generator(6), hue=abs(turn), **options)
    draw = torch.rand((15, 20), generator=generator(6))[10]
    for i in range(20):
        expected = tv.adjust_hue(plain[i], abs(turn) * (2 * float(draw[i]) - 1))
        torch.testing.assert_close(turned[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_rotation_and_shift_against_torchvision(size):
    x, n = torch.rand(12, 2, *size, generator=generator(9)), 12
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    view, fraction = crop_and_rotate(x, generator(5), degrees=40.0, shift=0.0, **whole)
    draw = torch.rand((8, n), generator=generator(5))
    assert torch.equal(fraction, torch.ones(n))
    for i in range(n):
        angle = 40 * (2 * float(draw[5, i]) - 1)  # of the grid: the picture turns the other way
        expected = tv.rotate(x[i], angle, interpolation=tv.InterpolationMode.BILINEAR)
        torch.testing.assert_close(view[i], expected, atol=1e-4, rtol=0)
    moved, _ = crop_and_rotate(x, generator(5), degrees=0.0, shift=0.2, **whole)
    still, _ = crop_and_rotate(x, generator(5), degrees=0.0, shift=0.0, **whole)
    torch.testing.assert_close(still, x, atol=1e-5, rtol=0)
    assert float((moved - x).abs().amax((1, 2, 3)).min()) > 0.1


def test_flips_only_where_asked():
    x = torch.zeros(200, 1, 8, 8)
    x[:, :, :, :2] = 1.0
    options = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "degrees": 0.0, "shift": 0.0}
    view, _ = crop_and_rotate(x, generator(), flip=True, **options)
    mirrored = int((view[:, 0, 4, 7] > 0.5).sum())
    assert 60 < mirrored < 140  # 200 fair coins: outside with probability 1e-8
    view, _ = crop_and_rotate(x, generator(), **options)
    torch.testing.assert_close(view, x, atol=1e-5, rtol=0)


def test_shift_and_flip_against_a_loop():
    x = images(40, 8) + 0.1
    view = shift_and_flip(x, generator(), max_shift=2)
    flips = 0
    for image, moved in zip(x, view, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        windows = [padded[:, dy : dy + 8, dx : dx + 8] for dy in range(5) for dx in range(5)]
        plain = sum(torch.equal(moved, window) for window in windows)
        mirrored = sum(torch.equal(moved, window.flip(-1)) for window in windows)
        assert plain + mirrored == 1
        flips += mirrored
    assert 5 <= flips <= 35  # 40 fair coins: outside with probability 1e-6


def test_ladder_against_torchvision_and_the_same_in_every_subset():
    x = images(30)
    views, fraction = crop_ladder(x, seed=2)
    for image, view, c in zip(x, views, fraction.tolist(), strict=True):
        size = round(32 * c)
        expected = tv.resize(tv.center_crop(image, [size, size]), [32, 32], antialias=False)
        torch.testing.assert_close(view, expected, atol=1e-6, rtol=0)
    again, same = crop_ladder(x, seed=2)
    assert torch.equal(views, again) and torch.equal(fraction, same)
    _, many = crop_ladder(torch.zeros(4_000, 3, 8, 8), seed=0)
    assert stats.kstest(many.numpy(), stats.uniform(0.25, 0.75).cdf).pvalue > 1e-4  # the rate of false alarms


@pytest.mark.parametrize("augment", [crop_flip_jitter, crop_and_rotate, shift_and_flip, crop_ladder])
def test_bytes_and_floats_give_the_same_and_the_global_random_state_stays(augment):
    state = torch.get_rng_state()
    x = (images(5) * 255).byte()
    first, second = (augment(y) if augment is crop_ladder else augment(y, generator()) for y in (x, x.float() / 255))
    first, second = (y if isinstance(y, torch.Tensor) else y[0] for y in (first, second))
    assert first.dtype == torch.float32 and torch.equal(first, second)
    assert float(first.min()) >= 0.0 and float(first.max()) <= 1.0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: crop_flip_jitter(x, scale=(0.0, 1.0)), r"`scale` must be \(low, high\) with 0 < low"),
        (lambda x: crop_flip_jitter(x, ratio=(2.0, 1.0)), r"`ratio` .* got \(2.0, 1.0\)"),
        (lambda x: crop_flip_jitter(x, jitter=1.5), r"`jitter` must be in \[0, 1\], got 1.5"),
        (lambda x: crop_flip_jitter(x, grey=float("nan")), r"`grey` must be in \[0, 1\], got nan"),
        (lambda x: crop_flip_jitter(x, hue=0.6), r"`hue` must be in \[0, 0.5\], got 0.6"),
        (lambda x: crop_flip_jitter(x, probability=-0.1), r"`probability` must be in \[0, 1\], got -0.1"),
        (lambda x: crop_flip_jitter(x, draw=torch.rand(9, 2)), r"`draw` must be \(15, 2\), .* got \(9, 2\)"),
        (lambda x: crop_and_rotate(x, degrees=200.0), r"`degrees` must be in \[0, 180\], got 200.0"),
        (lambda x: crop_and_rotate(x, scale=(0.5, 2.0)), r"`scale` must be"),
        (lambda x: crop_and_rotate(x[0]), r"must be \(N, C, H, W\), got \(3, 8, 8\)"),
        (lambda x: crop_flip_jitter(x[:, :1]), r"colour images \(N, 3, H, W\), got \(2, 1, 8, 8\)"),
        (lambda x: shift_and_flip(x, max_shift=-1), ">= 0 pixels, got -1"),
        (lambda x: crop_ladder(x, smallest=0.0), r"`smallest` must be in \(0, 1\], got 0.0"),
        (lambda x: crop_ladder(x[..., :4]), r"must be square, got \(2, 3, 8, 4\)"),
    ],
)
def test_errors_say_the_rule_and_what_was_got(call, message):
    with pytest.raises(ValueError, match=message):
        call(images(2, 8))
