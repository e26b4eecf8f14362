"""Two views of any data set, and the seeded batch loader."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_contrastive.data import TwoViews, ViewLoader, shift_and_dropout
from pyro_contrastive.ops.random import derived_seed


def noise(batch, generator):
    return batch + torch.rand(batch.shape, generator=generator)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(u, v) for x, y in zip(a, b, strict=True) for u, v in zip(x, y, strict=True)
    )


def test_two_views_of_a_torch_dataset_through_a_dataloader():
    data = TensorDataset(torch.arange(10.0).unsqueeze(1), torch.arange(10) % 3)
    pairs = TwoViews(data, lambda x: x + 100, lambda x: -x, return_index=True)
    x1, x2, label, index = next(iter(DataLoader(pairs, batch_size=4)))
    assert len(pairs) == 10
    assert torch.equal(x1, torch.arange(4.0).unsqueeze(1) + 100) and torch.equal(x2, -torch.arange(4.0).unsqueeze(1))
    assert torch.equal(label, torch.arange(4) % 3) and torch.equal(index, torch.arange(4))


def test_two_views_calls_a_random_transform_twice_and_takes_bare_items():
    pairs = TwoViews(torch.zeros(3, 2), lambda x: x + torch.rand(2), return_label=False)
    torch.manual_seed(0)
    first, second = pairs[1]
    assert not torch.equal(first, second)


def test_loader_covers_each_epoch_once_in_a_new_order():
    images = torch.arange(20.0).unsqueeze(1)
    labels = torch.arange(20) + 50
    loader = ViewLoader(images, lambda x, g: x, labels=labels, batch_size=6, drop_last=False, return_index=True)
    assert len(loader) == 4
    epochs = []
    for _ in range(2):
        batches = list(loader)
        index = torch.cat([batch[-1] for batch in batches])
        assert sorted(index.tolist()) == list(range(20))
        for x1, x2, label, i in batches:
            assert torch.equal(x1, images[i]) and torch.equal(x2, images[i]) and torch.equal(label, i + 50)
        epochs.append(index)
    assert not torch.equal(epochs[0], epochs[1])
    assert loader.epoch == 2


def test_loader_drops_the_incomplete_batch_and_can_keep_the_order():
    loader = ViewLoader(torch.arange(10.0), lambda x, g: x, batch_size=4, shuffle=False, num_views=3)
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    assert [len(batch) for batch in batches] == [3, 3]
    assert torch.equal(batches[1][2], torch.arange(4.0, 8.0))


def test_seek_gives_the_bit_same_batches_and_no_global_state_moves():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    loader = ViewLoader(images, shift_and_dropout, batch_size=8, seed=5)
    whole = [list(loader) for _ in range(3)]
    other = ViewLoader(images, shift_and_dropout, batch_size=8, seed=5)
    other.seek(2, 3)
    assert same(list(other), whole[2][3:])
    assert other.epoch == 3
    other.seek(0)
    assert same(list(other), whole[0])
    assert not same(whole[0], whole[1])
    assert not same(list(ViewLoader(images, shift_and_dropout, batch_size=8, seed=6)), whole[0])
    assert torch.equal(state, torch.get_rng_state())


def test_views_of_one_batch_are_independent_draws():
    x1, x2 = next(iter(ViewLoader(torch.zeros(8, 3), noise, batch_size=8)))
    assert not torch.equal(x1, x2)


def test_derived_seeds_do_not_collide():
    seeds = {derived_seed(s, e, b) for s in range(8) for e in range(8) for b in range(8)}
    assert len(seeds) == 512
    assert len({derived_seed(0), derived_seed(0, 0), derived_seed(0, 0, 0)}) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, r"in 1..5 .*got 0"),
        ({"batch_size": 6}, r"in 1..5 .*got 6"),
        ({"num_views": 0}, ">= 1, got 0"),
        ({"seed": -1}, ">= 0, got"),
        ({"labels": torch.zeros(4)}, "got 4 and 5"),
    ],
)
def test_loader_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ViewLoader(torch.zeros(5, 2), noise, **{"batch_size": 2, **kwargs})


def test_seek_and_wrapper_errors():
    loader = ViewLoader(torch.zeros(5, 2), noise, batch_size=2)
    with pytest.raises(ValueError, match=r"`batch` in 0..2, got 0 and 3"):
        loader.seek(0, 3)
    with pytest.raises(TypeError, match="__getitem__"):
        TwoViews(iter([1]), noise)
    with pytest.raises(TypeError, match="`transform` must be callable"):
        TwoViews([1], None)
