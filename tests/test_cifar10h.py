"""CIFAR-10H without its files: reading and its errors, the folds, and the law of the pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_contrastive.data import SoftLabelPairs, five_folds, load_cifar10h, sample_partners


def arrays(n=20, m=30, **changes):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 10
    counts = rng.integers(0, 3, (n, 10))
    counts[np.arange(n), labels] += 40
    found = {
        "x_test": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        "y_test": labels,
        "human_counts": counts,
        "x_train": rng.integers(0, 256, (m, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(m) % 10,
    }
    return {name: value for name, value in {**found, **changes}.items() if value is not None}


def write(tmp_path, **changes):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays(**changes))
    return path


def test_npz_is_read_as_it_is(tmp_path):
    raw, data = arrays(), load_cifar10h(write(tmp_path), train=True)
    assert data.images.dtype == torch.uint8 and data.images.shape == (20, 3, 32, 32)
    assert data.images[3, 1, 5, 7] == raw["x_test"][3, 5, 7, 1]
    assert data.train_images.shape == (30, 3, 32, 32) and torch.equal(data.train_labels, torch.arange(30) % 10)
    shares = raw["human_counts"] / raw["human_counts"].sum(1, keepdims=True)
    np.testing.assert_allclose(data.soft_labels, shares, rtol=1e-6)
    np.testing.assert_allclose(data.entropy, stats.entropy(shares, axis=1), rtol=1e-5)
    assert torch.equal(data.majority, data.labels)
    assert load_cifar10h(write(tmp_path)).train_images is None


@pytest.mark.parametrize("form", ["counts.npy", "probs.npy", "counts.npz"])
def test_answers_from_a_file_of_their_own(tmp_path, form):
    path, counts = write(tmp_path), arrays()["human_counts"]
    values = counts / counts.sum(1, keepdims=True) if form == "probs.npy" else counts
    if form.endswith("npy"):
        np.save(tmp_path / form, values)
    else:
        np.savez(tmp_path / form, counts=values)
    found = load_cifar10h(path, counts=tmp_path / form).soft_labels
    torch.testing.assert_close(found, load_cifar10h(path).soft_labels)
    np.save(tmp_path / "other.npy", np.roll(arrays()["human_counts"], 10, 0) + 1)
    other = load_cifar10h(path, counts=tmp_path / "other.npy").soft_labels
    assert not torch.allclose(other, found)  # the answers in the npz file did not win


def test_torchvision_folder(tmp_path, monkeypatch):
    raw = arrays()
    np.save(tmp_path / "counts.npy", raw["human_counts"])
    with pytest.raises(ValueError, match="`counts` must name the file of answers when `path` is a folder"):
        load_cifar10h(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no intact CIFAR-10: .*download=True"):
        load_cifar10h(tmp_path, counts=tmp_path / "counts.npy")

    class Files:
        def __init__(self, root, train, download):
            part = "train" if train else "test"
            self.data, self.targets = raw[f"x_{part}"], raw[f"y_{part}"].tolist()

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Files)
    data, expected = (load_cifar10h(p, counts=tmp_path / "counts.npy", train=True) for p in (tmp_path, write(tmp_path)))
    for name in ("images", "labels", "soft_labels", "train_images", "train_labels"):
        assert torch.equal(getattr(data, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"human_counts": None}, r"lacks human_counts; it must hold x_test .*cifar10h-counts.npy"),
        ({"y_train": None}, "lacks y_train"),
        ({"x_test": np.zeros((20, 3, 32, 32), np.uint8)}, r"uint8 \[N, 32, 32, 3\], got uint8 \[20, 3, 32, 32\]"),
        ({"x_test": np.zeros((20, 32, 32, 3))}, "got float64"),
        ({"y_test": np.arange(19)}, r"`y_test` must be 20 integers in 0..9, got int64 \[19\]"),
        ({"y_test": np.full(20, 10)}, "`y_test` must be 20 integers in 0..9"),
        ({"human_counts": np.ones((20, 9))}, r"numbers \[20, 10\], got float64 \[20, 9\]"),
        ({"human_counts": np.zeros((20, 10))}, "at least one per image"),
        ({"human_counts": np.full((20, 10), np.nan)}, "must be finite"),
        ({"human_counts": np.roll(np.eye(10).repeat(2, 0), 3, 0)}, "must equal the label for most images, got"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_cifar10h(write(tmp_path, **changes), train=True)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz does not exist; .*cs.toronto.edu"):
        load_cifar10h(tmp_path / "nowhere.npz")
    with pytest.raises(FileNotFoundError, match=r"no.npy does not exist; CIFAR-10H: .*github.com"):
        load_cifar10h(write(tmp_path), counts=tmp_path / "no.npy")
    (tmp_path / "bad.npz").write_bytes(write(tmp_path).read_bytes()[:1_000])
    with pytest.raises(ValueError, match="bad.npz is not a readable npz or npy file"):
        load_cifar10h(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", something=np.ones(3))
    with pytest.raises(ValueError, match=r"must hold the array `counts` \[N, 10\], got \['something'\]"):
        load_cifar10h(write(tmp_path), counts=tmp_path / "other.npz")


def test_folds_cut_every_item_once_and_rotate():
    folds = [five_folds(f) for f in range(5)]
    assert torch.equal(torch.cat([f.test for f in folds]).sort().values, torch.arange(10_000))
    for f, fold in enumerate(folds):
        assert [len(part) for part in (fold.train, fold.validation, fold.test)] == [6_000, 2_000, 2_000]
        assert len(torch.cat([fold.train, fold.validation, fold.test]).unique()) == 10_000
        assert torch.equal(fold.validation, folds[(f + 4) % 5].test)  # set f + 3
        assert set(fold.train.tolist()) == {i for g in (1, 2, 3) for i in folds[(f + g) % 5].test.tolist()}
    assert not torch.equal(five_folds(0, seed=1).test, folds[0].test)
    for wrong, message in (({"fold": 5}, "0..4, got 5"), ({"fold": 0, "num_items": 12}, "multiple of 5, got 12")):
        with pytest.raises(ValueError, match=message):
            five_folds(**wrong)


def partner_law(p, i):
    """Law of the partner of item i by enumeration of the class and of all sets of flagged items."""
    n, law = len(p), np.zeros(len(p))
    others = [j for j in range(n) if j != i]
    for c in range(p.shape[1]):
        if p[i, c] == 0:
            continue
        for flags in np.ndindex(*(2,) * (n - 1)):
            weight = p[i, c] * np.prod([p[j, c] if on else 1 - p[j, c] for j, on in zip(others, flags, strict=True)])
            flagged = [j for j, on in zip(others, flags, strict=True) if on]
            if flagged:
                law[flagged] += weight / len(flagged)
            else:
                law[others] += weight * p[others, c] / p[others, c].sum()
    return law


def test_partners_follow_the_stated_law():
    p = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.6, 0.4], [0.1, 0.1, 0.8]])
    draws = 20_000
    for i in range(len(p)):
        reference = torch.full((draws,), i)
        found = sample_partners(torch.tensor(p), reference, torch.Generator().manual_seed(i))
        counts, law = np.bincount(found, minlength=len(p)), partner_law(p, i)
        assert counts[law == 0].sum() == 0 and counts[i] == 0
        # five tests at 1e-5: one rings falsely with probability 5e-5
        assert stats.chisquare(counts[law > 0], draws * law[law > 0]).pvalue > 1e-5


def index_pairs(**options):
    """A loader whose images are their indices, so that batches show who was paired."""
    labels = torch.eye(10)[torch.arange(600) % 10] * 0.9 + 0.01
    return labels, SoftLabelPairs(torch.arange(600.0), labels, lambda x, generator: x, batch_size=300, **options)


def test_pairs_reach_beyond_item_256_and_never_pair_an_item_with_itself():
    _, loader = index_pairs(seed=3)
    pairs = torch.cat([torch.stack(batch) for _ in range(5) for batch in loader], dim=1).long()
    assert not bool((pairs[0] == pairs[1]).any())
    assert len(pairs[0].unique()) == 600  # every item is a reference
    # 3,000 partners, 344 of 600 items above 255: 5 s.d. ring falsely with probability 6e-7
    assert abs(float((pairs[1] > 255).float().mean()) - 344 / 600) < 5 * 0.5 / 3_000**0.5
    same = float((pairs[0] % 10 == pairs[1] % 10).float().mean())
    assert same == pytest.approx(0.91**2 + 9 * 0.01**2, abs=5 * 0.5 / 3_000**0.5)


def test_dissimilar_negatives_are_kept_with_the_stated_probability():
    labels, loader = index_pairs(negatives="dissimilar", shuffle=False)
    kept, expected = torch.zeros(300, 300), torch.zeros(300, 300)
    for epoch in range(40):
        loader.seek(epoch)
        x1, x2, keep = next(iter(loader))
        assert keep.dtype == torch.bool and bool(keep.diagonal().all())
        kept += keep
        expected += (1 - labels[x1.long()] @ labels[x2.long()].T).fill_diagonal_(1.0)
    error = (kept - expected).sum()
    assert abs(float(error)) < 5 * (40 * 300 * 300 * 0.25) ** 0.5  # 5 s.d. at most: 6e-7
    rows = (kept - expected)[:, torch.arange(300) % 10 == 0].sum(1)  # uneven classes would show here
    assert float(rows.abs().max()) < 6 * (40 * 30 * 0.25) ** 0.5  # 300 rows at 6 s.d.: 6e-7


def test_loader_repeats_and_seeks():
    _, loader = index_pairs(seed=1)
    first = [torch.stack(batch) for batch in loader]
    loader.seek(0, 1)
    assert torch.equal(torch.stack(next(iter(loader))), first[1])
    state = torch.get_rng_state()
    next(iter(loader.to("cpu")))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.ones(4, 1)[:3], {}, r"must be \(4, classes\), got \(3, 1\)"),
        (torch.ones(4, 2), {}, "rows that sum to one"),
        (torch.eye(2)[[0, 0, 0, 1]], {}, "in two images or in none, got one image for class 1"),
        (torch.eye(2).repeat(2, 1), {"negatives": "all"}, "'batch' or 'dissimilar', got 'all'"),
        (torch.eye(2).repeat(2, 1), {"batch_size": 9}, r"`batch_size` must be in 1..4"),
    ],
)
def test_loader_errors_say_the_rule_and_what_was_got(labels, options, message):
    with pytest.raises(ValueError, match=message):
        SoftLabelPairs(torch.zeros(4, 3, 8, 8), labels, lambda x, g: x, **{"batch_size": 2, **options})
