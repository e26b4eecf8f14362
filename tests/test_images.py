"""Loading images: files as torchvision has them, npz, folders, and everything that can be wrong with them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from pyro_contrastive.data import CORRUPTIONS, degrade, load_digits, load_images


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder, part, n, seed):
    folder.mkdir(parents=True, exist_ok=True)
    x, y = pixels(n, 28, 28, seed=seed), np.arange(n, dtype=np.uint8) % 10
    (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + x.tobytes())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + y.tobytes())
    return x, y


def write_folder(folder, sizes, *, side=(40, 30), classes=("cat", "ape")):
    for kind, n in zip(classes, sizes, strict=True):
        (folder / kind).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(pixels(*side, 3, seed=i)).save(folder / kind / f"{i}.png")
    return folder


def test_digits_are_scikit_learns():
    images, labels = load_images("digits", "test")
    floats, expected = load_digits("test")
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and torch.equal(labels, expected)
    torch.testing.assert_close(images.float() / 255, floats, atol=0.501 / 255, rtol=0)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files_as_torchvision_unpacks_them(tmp_path, name, folder):
    for split, part, n in (("train", "train", 12), ("test", "t10k", 7)):
        x, y = write_idx(tmp_path / folder / "raw", part, n, seed=n)
        write_idx(tmp_path / folder / "raw", "t10k" if part == "train" else "train", 3, seed=1)
        images, labels = load_images(name, split, root=tmp_path)
        assert np.array_equal(images[:, 0].numpy(), x) and labels.tolist() == y.tolist()
    colour, _ = load_images(name, root=tmp_path, channels=3, size=32)
    assert colour.shape == (3, 3, 32, 32) and torch.equal(colour[:, 0], colour[:, 2])


@pytest.mark.parametrize("shape", [(6, 9, 9, 3), (6, 9, 9), (6, 9, 9, 1)])
def test_npz_files(tmp_path, shape):
    x, y = pixels(*shape), np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y)
    images, labels = load_images(tmp_path / "set.npz")
    channels = shape[3] if len(shape) == 4 else 1
    assert images.shape == (6, channels, 9, 9) and labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), x.reshape(6, 9, 9, channels))
    with pytest.raises(ValueError, match=r"set.npz lacks x_test, y_test"):
        load_images(tmp_path / "set.npz", "test")


def test_a_folder_is_resized_and_split_alike_within_each_class(tmp_path):
    folder = write_folder(tmp_path / "mine", (10, 5))
    train, train_labels = load_images(folder, "train", size=16)
    test, labels = load_images(str(folder), "test", size=16)
    assert train.shape == (12, 3, 16, 16) and train_labels.bincount().tolist() == [4, 8]  # ape, cat
    assert test.shape == (3, 3, 16, 16) and labels.bincount().tolist() == [1, 2]
    assert torch.equal(train, load_images(folder, "train", size=16)[0])
    everything = {bytes(image.numpy().tobytes()) for image in torch.cat([train, test])}
    expected = {
        tv.resize(tv.center_crop(torch.from_numpy(pixels(40, 30, 3, seed=i)).permute(2, 0, 1), [30, 30]), [16, 16])
        .numpy()
        .tobytes()
        for i in range(10)
    }
    assert everything == expected
    assert load_images(folder)[0].shape[1:] == (3, 32, 32)
    assert load_images(folder, channels=1)[0].shape[1:] == (1, 32, 32)


@pytest.mark.parametrize("other", ["test", "val"])
def test_a_folder_that_is_divided_already(tmp_path, other):
    write_folder(tmp_path / "train", (3, 2))
    write_folder(tmp_path / other, (1, 4))
    assert load_images(tmp_path, "train")[1].bincount().tolist() == [2, 3]
    assert load_images(tmp_path, "test")[1].bincount().tolist() == [4, 1]


def test_missing_sets_say_what_to_do(tmp_path):
    for name in ("mnist", "fashion_mnist", "cifar10", "svhn"):
        with pytest.raises(FileNotFoundError, match=rf"holds no intact {name}.*--download"):
            load_images(name, root=tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder, no npz file .*digits, mnist"):
        load_images("nowhere")


def test_bad_folders_and_files_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a subfolder per class .*\n?.*CLASS/IMAGE.png"):
        load_images(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="at least one image"):
        load_images(tmp_path)
    (tmp_path / "cat" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1.png is not a readable image: .*; repair or remove it"):
        load_images(tmp_path)
    Image.fromarray(pixels(64, 64, 3)).save(tmp_path / "cat" / "1.png")
    with pytest.raises(ValueError, match="nothing is left to test"):
        load_images(tmp_path, "test")
    whole = (tmp_path / "cat" / "1.png").read_bytes()
    (tmp_path / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1.png is not a readable image: .*truncated"):
        load_images(tmp_path)
    write_folder(tmp_path / "part" / "train", (1, 1))
    with pytest.raises(FileNotFoundError, match="has a folder train and no test"):
        load_images(tmp_path / "part", "test")
    (tmp_path / "set.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match="set.npz is not a readable npz"):
        load_images(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.zeros((2, 4, 4), np.float32), "y_train": np.zeros(2, int)}, r"must be uint8 .* got float32"),
        ({"x_train": np.zeros((2, 4, 4, 2), np.uint8), "y_train": np.zeros(2, int)}, r"got uint8 \[2, 4, 4, 2\]"),
        ({"x_train": np.zeros((0, 4, 4), np.uint8), "y_train": np.zeros(0, int)}, r"with N >= 1"),
        ({"x_train": np.zeros((2, 4, 4), np.uint8), "y_train": np.zeros(3, int)}, r"must be 2 integers, got int64 \[3"),
        ({"x_train": np.zeros((2, 4, 4), np.uint8), "y_train": np.zeros(2)}, r"integers, got float64"),
    ],
)
def test_bad_arrays_say_what_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "`split` must be 'train' or 'test', got 'valid'"),
        ({"size": 0}, "`size` must be >= 1 pixel, got 0"),
        ({"channels": 4}, r"`channels` must be 1 \(grey\), 3 \(colour\) or None"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        load_images("digits", **options)


# --- corruptions ------------------------------------------------------------------------------------------------------


def grid(n=6, channels=3, side=16):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("side", [8, 16])
def test_corruptions_worsen_with_severity_and_repeat(kind, side):
    x, state = grid(side=side), torch.get_rng_state()
    views = [degrade(x, kind, severity, seed=3) for severity in range(6)]
    assert torch.equal(views[0], x)
    errors = [float((view - x).square().mean()) for view in views]
    assert errors == sorted(set(errors)) and errors[0] == 0
    assert all(float(view.min()) >= 0 and float(view.max()) <= 1 for view in views)
    assert torch.equal(views[4], degrade(x, kind, 4, seed=3)) and torch.equal(state, torch.get_rng_state())
    if kind in ("noise", "occlusion"):
        assert not torch.equal(views[4], degrade(x, kind, 4, seed=4))
    assert degrade((x * 255).byte(), kind, 5).dtype == torch.float32


def test_corruptions_against_their_definitions():
    x = grid(400, 1)
    noise = degrade(torch.full_like(x, 0.5), "noise", 2) - 0.5
    assert abs(float(noise.std()) / 0.1 - 1) < 0.02  # 102,400 draws: 5 standard errors are .011
    black = (degrade(torch.ones_like(x), "occlusion", 4) == 0).float()
    assert black.sum((1, 2, 3)).unique().tolist() == [100.0]  # round(sqrt(.39 * 256)) = 10
    assert float(black.mean(0).max()) > 3 * float(black.mean(0).min())  # the middle is covered more often
    assert float(black[:, 0, 0].amax(1).sum()) > 0 and float(black[:, 0, -1].amax(1).sum()) > 0  # edges are reached
    torch.testing.assert_close(
        degrade(x, "contrast", 2), 0.5 * x + 0.5 * x.mean((1, 2, 3), keepdim=True), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(degrade(x, "blur", 3), tv.gaussian_blur(x, [7, 7], [0.72, 0.72]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: degrade(x, "fog", 1), "`kind` must be one of noise, blur, occlusion, contrast, got 'fog'"),
        (lambda x: degrade(x, "noise", 6), "`severity` must be an integer in 0..5, got 6"),
        (lambda x: degrade(x, "noise", 0.5), "`severity` must be an integer in 0..5, got 0.5"),
        (lambda x: degrade(x[0], "noise", 1), r"`images` must be \(N, C, H, W\)"),
    ],
)
def test_wrong_corruptions(call, message):
    with pytest.raises(ValueError, match=message):
        call(grid())
