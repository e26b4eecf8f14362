"""Checkpoint files: round trip, atomic replacement, refusal with a reason."""

from __future__ import annotations

import os

import pytest
import torch

from pyro_contrastive.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def payload():
    return {"model": {"w": torch.arange(3.0)}, "config": {"lr": 1e-3, "seed": 0}, "history": {"loss": [1.0, 0.5]}}


def test_round_trip_and_no_leftovers(tmp_path):
    path = tmp_path / "deep" / "checkpoint.pt"
    save_checkpoint(path, payload())
    loaded = load_checkpoint(path, expected_config={"lr": 1e-3})
    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))
    assert loaded["history"] == {"loss": [1.0, 0.5]}
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, payload())
    before = path.read_bytes()

    def fail(obj, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, payload())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("keep", [0, 1, 100, -20])
def test_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, payload())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a readable checkpoint.*resume=False"):
        load_checkpoint(path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "checkpoint.pt"
    torch.save({"format": 1, "x": Evil()}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_other_objects_and_configurations_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="format 1, got 'list'"):
        load_checkpoint(path)
    save_checkpoint(path, payload())
    with pytest.raises(CheckpointError, match=r"lr: 0\.001 in the file, 0\.1 now"):
        load_checkpoint(path, expected_config={"lr": 0.1, "seed": 0})
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt")
