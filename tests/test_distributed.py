"""Several processes: what they compute together is what one computes from all rows; faults are errors, not hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyro_contrastive import distributed
from tests import ranks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes left behind, by rank; they are started once for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(rank), str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks.RANKS)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0, 0, 3], "\n".join(errors)  # the last one dies at its end, on purpose
    made = [torch.load(folder / f"{rank}.pt") for rank in range(ranks.RANKS)]
    for rank in range(ranks.RANKS - 1):
        made[rank]["alone"] = torch.load(folder / f"{rank} alone.pt")
    return made


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_processes_give_loss_gradients_and_statistics_of_one(found, name):
    expected = ranks.run_case(name)
    for rank in range(2):
        got = found[rank][name]
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("size", [2, 3])
def test_the_ring_is_the_grid(found, size):
    for key, value in ranks.run_ring().items():
        parts = [found[rank][f"ring {size}"][key] for rank in range(size)]
        if "common" in key:
            assert all(torch.equal(part, parts[0]) for part in parts)
            whole = parts[0]
        else:
            whole = torch.cat(parts, -1 if "value" in key else -2)
        torch.testing.assert_close(whole, value, rtol=1e-10, atol=1e-10)


def test_faults_are_errors_on_every_process(found):
    rules = {
        "sizes": r"equally many items on every process, got \[2, 3\] by rank",
        "sizes of classes": r"equally many items on every process, got \[2, 3\] by rank",
        "options": "one set of options",
        "a grid": "cannot be spread over the 2 processes",
        "matching": "cannot be spread over the 2 processes",
        "gradients": "sum of gradients in a joint batch needs one model",
    }
    for rank in range(2):
        assert found[rank]["faults"].keys() == rules.keys()
        for name, rule in rules.items():
            assert re.search(rule, found[rank]["faults"][name]), name


def test_a_process_that_dies_is_an_error_for_the_others(found):
    assert all(found[rank]["alone"] for rank in range(2))


def test_flags_and_weights_are_shared(found):
    assert all(made["any"] for made in found)
    assert all(torch.equal(made["broadcast"], found[0]["broadcast"]) for made in found)


# --- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "points"])
def test_a_fit_by_three_processes_is_that_of_one(found, name):
    expected = ranks.run_fit(name)
    for made in found:
        got = made[f"fit {name}"]
        assert (got["status"], got["step"]) == ("done", 12)
        for key in ("loss", "positive"):
            assert got["history"][key] == pytest.approx(expected["history"][key], abs=1e-4)
        for key, value in expected.items():
            if key.startswith("state"):
                torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_a_fit_goes_on_where_all_processes_stopped(found):
    for made in found:
        assert (made["fit part"]["status"], made["fit part"]["step"]) == ("interrupted", 1)
        assert made["fit resumed"]["step"] == 12
        for key, value in made["fit sampled"].items():
            if key.startswith("state"):
                assert torch.equal(made["fit resumed"][key], value), key
                assert torch.equal(found[0]["fit sampled"][key], value), key
    assert found[0]["fit files"] == ["checkpoint.pt"]
    assert found[0]["fit sampled"]["history"] == found[2]["fit resumed"]["history"]


def test_all_processes_stop_together(found):
    for made in found:
        assert made["fit signal"] == ("interrupted", 4)  # one was told in its fourth batch
        assert made["fit nan"] == ("diverged", 2)  # one had a batch that is not a number; the last row was step 2


# --- one process ------------------------------------------------------------------------------------------------------


def test_one_process_needs_nothing():
    x = torch.arange(6.0)
    assert distributed.process_rank() == (0, 1)
    assert distributed.gather(x) is x
    assert list(distributed.shard(3)) == [0, 1, 2] and torch.equal(distributed.shard(x), x)
    distributed.sum_gradients([x])
    distributed.broadcast([x])


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_have_one_length(monkeypatch, rank):
    monkeypatch.setattr(distributed, "process_rank", lambda group=None: (rank, 2))
    assert list(distributed.shard(5)) == [rank, rank + 2]
    assert torch.equal(distributed.shard(torch.arange(5)), torch.tensor([rank, rank + 2]))
    data = torch.utils.data.TensorDataset(torch.arange(5))
    assert [int(item) for (item,) in distributed.shard(data)] == [rank, rank + 2]
    batches = [(torch.arange(4), torch.arange(4, 8)), (torch.arange(2), torch.arange(2))]
    shares = distributed.BatchShare(batches)
    assert len(shares) == 2
    assert [len(a) for a, _ in shares] == [2, 1]
    assert torch.equal(next(iter(shares))[1], torch.arange(4, 8)[2 * rank : 2 * rank + 2])
    with pytest.raises(ValueError, match="3 items cannot be shared equally by 2 processes"):
        list(distributed.BatchShare([torch.ones(3)]))
    with pytest.raises(ValueError, match="at least one for each of 2"):
        distributed.shard(1)


def test_batch_norm_keeps_its_parameters_and_is_refused_where_unknown():
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
    norm, x = net[1], torch.randn(4, 2, 5)
    expected = net(x)
    before = norm.weight
    distributed.synchronise_batch_norm(net)
    assert net[1] is norm and norm.weight is before
    torch.testing.assert_close(net(x), expected)  # one process
    with pytest.raises(TypeError, match="is a LazyBatchNorm1d"):
        distributed.synchronise_batch_norm(nn.LazyBatchNorm1d())
    with pytest.raises(TypeError, match=r"torch.nn.Module, got int"):
        distributed.synchronise_batch_norm(3)
