"""Embeddings on the disk: right, whole after a kill, one data set from several processes, in bounded memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pyro_contrastive import distributed, embedding, guides
from pyro_contrastive.cli import main
from pyro_contrastive.data import FolderImages
from pyro_contrastive.embedding import embed, merge_embedding, open_embedding

ROOT = Path(__file__).parents[1]
NAMES = [f"{'long/' * (k // 10)}image{k}" for k in range(50)]


def build(family=guides.VonMisesFisher, seed=0):
    torch.manual_seed(seed)
    return family(nn.Linear(4, 8), 3)


def inputs() -> torch.Tensor:
    return torch.randn(50, 4, generator=torch.Generator().manual_seed(1))


def batches(pause: float = 0.0, names=NAMES):
    for k in range(0, 50, 6):
        time.sleep(pause)
        yield names[k : k + 6], inputs()[k : k + 6]


def same(made: embedding.Embedding, expected: embedding.Embedding) -> None:
    got, wanted = made.load(), expected.load()
    assert list(got) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(got[name], values)


@pytest.mark.parametrize("kind", ["zarr", "parquet"])
def test_the_folder_and_the_merged_file_hold_the_posteriors(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    guide = build().train()
    made = embed(guide, batches(), tmp_path / "e", format=kind, part_items=20, progress=False)
    assert guide.training and guide.batch_norm.num_batches_tracked == 0
    assert (len(made), made.complete, len(made.parts)) == (50, True, 3)
    posterior = guide.eval().posterior(inputs())
    found = made.load()
    assert found["id"].tolist() == NAMES
    np.testing.assert_allclose(found["mean_direction"], posterior.mean_direction.detach(), atol=1e-6)
    np.testing.assert_allclose(found["concentration"], posterior.concentration.detach(), rtol=1e-5)
    merged = embedding.read_part(merge_embedding(made.path, tmp_path / f"all.{kind}"))
    for name, values in found.items():
        np.testing.assert_array_equal(merged[name], values)
    if kind == "parquet":
        import pyarrow.dataset

        assert pyarrow.dataset.dataset(made.path, format="parquet").count_rows() == 50
    with pytest.raises(ValueError, match="is there already"):
        merge_embedding(made.path, tmp_path / f"all.{kind}")


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (guides.Delta, {"id", "mean_direction"}),
        (guides.ProjectedNormal, {"id", "loc", "scale_diag"}),
        (guides.Normal, {"id", "loc", "scale"}),
        (guides.Categorical, {"id", "logits"}),
    ],
)
def test_every_family_has_its_parameters(tmp_path, family, names):
    made = embed(build(family), [(torch.arange(5), inputs()[:5])], tmp_path / "e", progress=False)
    found = made.load()
    assert found.keys() == names
    assert found["id"].tolist() == [0, 1, 2, 3, 4]
    assert {len(values) for values in found.values()} == {5}


CHILD = """
import sys
from tests.test_embedding import batches, build, embed
embed(build(), batches(0.15), sys.argv[1], part_items=6, progress=False)
"""


def test_after_a_kill_it_goes_on_and_gives_the_same(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "e")], cwd=ROOT)
    journal = tmp_path / "e" / "_rank-00000.json"
    give_up = time.monotonic() + 120
    while not (journal.exists() and len(json.loads(journal.read_text())["parts"]) >= 2):
        assert child.poll() is None and time.monotonic() < give_up
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    begun = open_embedding(tmp_path / "e")
    assert not begun.complete and 12 <= begun.items < 50
    with pytest.raises(ValueError, match=f"is not complete \\({begun.items} items so far\\)"):
        merge_embedding(begun.path, tmp_path / "all.zarr")
    number = len(begun.parts)  # as if it had been killed while writing, and between writing and noting it down
    (begun.path / f".part-00000-{number:06d}.zarr.1.tmp").mkdir(exist_ok=True)
    half = begun.path / f"part-00000-{number:06d}.zarr"
    half.mkdir(exist_ok=True)
    (half / "rubbish").write_text("half")
    kept = begun.parts[0].stat().st_ctime_ns
    made = embed(build(), batches(), tmp_path / "e", part_items=6, progress=False)
    assert made.complete and made.parts[0].stat().st_ctime_ns == kept
    assert not list(made.path.glob(".*"))
    same(made, embed(build(), batches(), tmp_path / "whole", part_items=6, progress=False))
    same(embed(build(), iter(()), tmp_path / "e", part_items=6, progress=False), made)  # nothing left to do


def stop_after(count: int):
    for number, batch in enumerate(batches()):
        if number == count:
            raise KeyboardInterrupt
        yield batch


def test_what_does_not_go_with_the_beginning_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed(build(), stop_after(4), tmp_path / "e", part_items=6, progress=False, config={"size": 8})
    options = {"part_items": 6, "progress": False, "config": {"size": 8}}
    with pytest.raises(ValueError, match="begun with something else.*weights"):
        embed(build(seed=1), batches(), tmp_path / "e", **options)
    with pytest.raises(ValueError, match="begun with something else.*size.: 8"):
        embed(build(), batches(), tmp_path / "e", **{**options, "config": {"size": 9}})
    with pytest.raises(ValueError, match="item 23 is now long/long/long/long/image43, in .*: long/long/image23"):
        embed(build(), batches(names=NAMES[20:] + NAMES[:20]), tmp_path / "e", **options)
    with pytest.raises(ValueError, match="ended after 0 of the 4 batches"):
        embed(build(), iter(()), tmp_path / "e", **options)
    with pytest.raises(ValueError, match="holds embeddings already"):
        embed(build(), batches(), tmp_path / "e", resume=False, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds thesis.tex"):
        embed(build(), batches(), tmp_path / "mine", progress=False)
    for ids in (["a"], torch.randn(2), [["a", "b"]]):
        with pytest.raises(ValueError, match="one string or integer per input"):
            embed(build(), [(ids, inputs()[:2])], tmp_path / f"ids{len(ids)}", progress=False)
    with pytest.raises(FileNotFoundError, match="holds no embeddings"):
        open_embedding(tmp_path)
    with pytest.raises(TypeError, match="recognition module"):
        embed(nn.Linear(2, 2), batches(), tmp_path / "x")
    for bad in ({"format": "csv"}, {"part_items": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            embed(build(), batches(), tmp_path / "x", **bad)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-contrastive\[parquet\]'"):
        embed(build(), batches(), tmp_path / "e", format="parquet")


def test_several_processes_make_one_data_set(tmp_path, monkeypatch):
    for rank in range(2):
        monkeypatch.setattr(embedding, "process_rank", lambda rank=rank: (rank, 2))
        share = [(NAMES[k : k + 5], inputs()[k : k + 5]) for k in range(25 * rank, 25 * rank + 25, 5)]
        made = embed(build(), share, tmp_path / "e", part_items=10, progress=False)
        assert (len(made), made.complete) == (25 * (rank + 1), rank == 1)
    monkeypatch.undo()
    same(made, embed(build(), batches(), tmp_path / "one", progress=False))
    with pytest.raises(ValueError, match="ranks: 2 there, 1 now"):
        embed(build(), batches(), tmp_path / "e", progress=False)


def test_memory_does_not_grow_with_the_number_of_items(tmp_path):
    size, alive, most = 2_000, set(), 0

    def source(count):
        nonlocal most
        for k in range(count):
            x = torch.zeros(size, 4)
            alive.add(k)
            weakref.finalize(x, alive.discard, k)
            most = max(most, len(alive))
            yield np.arange(size) + k * size, x

    guide, peaks = build(), []
    embed(guide, source(2), tmp_path / "warm", part_items=size, progress=False)
    for count in (4, 24):
        tracemalloc.start()
        embed(guide, source(count), tmp_path / str(count), part_items=2 * size, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most <= 3
    assert peaks[1] < 1.3 * peaks[0]  # the arrays of six times as many items would be 6.0


# --- images below a folder --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    from PIL import Image

    for k in range(7):
        path = tmp_path / "images" / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12 + k, 9), (30 * k,) * 3).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_in_the_order_of_their_names(folder, channels):
    loader = FolderImages(folder, size=6, channels=channels, batch_size=3)
    found = list(loader)
    assert len(loader) == 3
    names = [name for ids, _ in found for name in ids]
    assert names == [f"class0/{k}.png" for k in (0, 2, 4, 6)] + [f"class1/{k}.png" for k in (1, 3, 5)]
    images = torch.cat([x for _, x in found])
    assert images.shape == (7, channels, 6, 6) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [30 * int(name[7]) for name in names]
    loader.seek(0, 2)
    assert [ids for ids, _ in loader] == [["class1/5.png"]]
    assert len(list(loader)) == 3


def test_each_process_reads_its_own_files(folder, monkeypatch):
    seen = []
    for rank in range(2):
        monkeypatch.setattr("pyro_contrastive.data.folder.process_rank", lambda rank=rank: (rank, 2))
        seen.append([name for ids, _ in FolderImages(folder, size=4) for name in ids])
    assert list(map(len, seen)) == [4, 3] and len(set(sum(seen, []))) == 7


def test_an_unreadable_image_is_an_error_with_its_path_or_is_listed(folder, tmp_path):
    (folder / "class0" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"class0/2.png is not a readable image.*unreadable='skip'"):
        list(FolderImages(folder, size=4))
    guide = guides.VonMisesFisher(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), 3)
    options = {"size": 4, "channels": 1, "batch_size": 1, "transform": lambda x: x / 255}
    loader = FolderImages(folder, unreadable="skip", **options)
    made = embed(guide, loader, tmp_path / "e", part_items=2, progress=False)
    assert (made.skipped, len(made), made.complete) == (("class0/2.png",), 6, True)
    with pytest.raises(FileNotFoundError, match="no image"):
        FolderImages(tmp_path / "e", size=4)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        FolderImages(tmp_path / "nowhere", size=4)
    for bad in ({"size": 0}, {"batch_size": 0}, {"channels": 2}, {"unreadable": "ignore"}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}`"):
            FolderImages(folder, **{"size": 4, **bad})


def test_the_command_embeds_a_folder_with_a_run(folder, tmp_path, capsys):
    run = [
        "fit",
        "--method",
        "mcinfonce",
        "--data",
        "digits",
        "--steps",
        "2",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(run) == 0
    command = ["embed", str(tmp_path / "run"), str(folder), "--out", str(tmp_path / "e"), "--batch-size", "2"]
    (folder / "class1" / "1.png").write_bytes(b"no image")
    assert main(command) == 2
    assert "class1/1.png is not a readable image" in capsys.readouterr().err
    assert main([*command, "--skip-unreadable", "--quiet"]) == 0
    made = open_embedding(tmp_path / "e")
    assert len(made) == 6 and made.load()["mean_direction"].shape == (6, 16)
    assert distributed.process_rank() == (0, 1)
