"""stream_arviz: the file equals to_arviz of each batch, memory is that of one batch, no half file under its name."""

from __future__ import annotations

import weakref

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
import xarray

from pyro_contrastive import guides, models
from pyro_contrastive.diagnostics import stream_arviz, to_arviz
from pyro_contrastive.diagnostics._collect import Collector

pytest.importorskip("h5py")  # h5netcdf writes through it

FORMATS = [".nc", pytest.param(".zarr", id=".zarr")]
LENGTHS = (5, 5, 3)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    guide = guides.VonMisesFisher(torch.nn.Linear(4, 8), dim=3)
    return models.MCInfoNCE(guide), guide


def batches(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        yield torch.randn(length, 4, generator=generator), torch.randn(length, 4, generator=generator)


def opened(path):
    if path.suffix == ".zarr":
        return xarray.open_datatree(path, engine="zarr", consolidated=False).load()
    return az.from_netcdf(path)


def groups_of(data) -> set[str]:
    names = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names if name.strip("/")}


def require(suffix):
    if suffix == ".zarr":
        pytest.importorskip("zarr")


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_file_holds_what_to_arviz_gives_batch_by_batch(pair, suffix, tmp_path):
    require(suffix)
    path = tmp_path / "new" / f"posterior{suffix}"
    names = [f"photo {k}" for k in range(13)]
    assert (
        stream_arviz(
            *pair,
            batches(),
            path,
            num_samples=4,
            seed=2,
            coords={"item": names},
            attrs={"note": "hello"},
            store_views=True,
        )
        == path
    )
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    data = opened(path)
    first = to_arviz(*pair, next(batches()), num_samples=4, seed=2)
    assert groups_of(data) == groups_of(first)
    for group in groups_of(first):
        assert set(data[group].data_vars) - {"batch", "index"} == set(first[group].data_vars)
        for name, variable in first[group].data_vars.items():
            stored = data[group][name]
            assert stored.dims == variable.dims and stored.dtype.kind == variable.dtype.kind
            head = stored.isel(item=slice(0, 5)) if "item" in stored.dims else stored
            np.testing.assert_array_equal(head, variable)  # one seed, the same draws
    assert list(data["posterior"]["item"].values) == names
    views = [torch.cat(view).numpy() for view in zip(*batches(), strict=True)]
    np.testing.assert_array_equal(data["constant_data"]["x2"], views[1])
    np.testing.assert_array_equal(data["constant_data"]["batch"], np.repeat([0, 1, 2], LENGTHS))
    np.testing.assert_array_equal(data["constant_data"]["index"], np.arange(13))
    np.testing.assert_array_equal(data["observed_data"]["partner"], np.concatenate([np.arange(n) for n in LENGTHS]))
    # the densities belong to the draws, in every batch
    q = pair[1].eval().posterior(torch.as_tensor(views[0]))
    z = torch.as_tensor(data["posterior"]["z1"].values[0])
    np.testing.assert_allclose(
        data["posterior"]["log_density1"].values[0], q.log_prob(z).detach(), rtol=1e-4, atol=1e-4
    )
    assert data.attrs["num_batches"] == 3 and data.attrs["num_items"] == 13 and data.attrs["note"] == "hello"
    assert data["posterior"].attrs["seed"] == 2 and "batch" in data.attrs["batch_relative"]
    if suffix == ".nc":
        assert len(az.summary(data, var_names=["angle1"])) == 13


def shared(x):
    """A global latent above those of the items."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * w)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=z), obs=(x[:, 0] > 0).float())


def shared_guide(x):
    w = pyro.sample("w", dist.Normal(0.5, 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(w + x[:, 1], 1.0))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("vectorize", [True, False])
def test_global_latents_are_drawn_once(suffix, vectorize, tmp_path):
    require(suffix)
    path = tmp_path / f"posterior{suffix}"
    views = [(x,) for x, _ in batches()]
    stream_arviz(shared, shared_guide, views, path, num_samples=6, seed=0, vectorize=vectorize)
    data = opened(path)
    posterior, stats = data["posterior"], data["sample_stats"]
    assert posterior["w"].dims == posterior["double"].dims == ("chain", "draw") and posterior["z"].shape == (1, 6, 13)
    assert len(np.unique(posterior["w"])) == 6
    assert stats["log_p"].dims == ("chain", "draw", "batch") and list(stats["batch"].values) == [0, 1, 2]
    w, z, x = posterior["w"].values[0][:, None], posterior["z"].values[0], torch.cat([x for (x,) in views]).numpy()
    sign = 2 * (x[:, 0] > 0) - 1
    terms = scipy.stats.norm.logpdf(z, w, 1) - np.log1p(np.exp(-sign * z))
    log_q = scipy.stats.norm.logpdf(z, w + x[:, 1], 1)
    number = np.repeat([0, 1, 2], LENGTHS)
    for batch in range(3):  # the same w in all of them
        log_p = terms[:, number == batch].sum(-1) + scipy.stats.norm.logpdf(w[:, 0])
        np.testing.assert_allclose(stats["log_p"].values[0, :, batch], log_p, rtol=1e-4)
        expected = log_q[:, number == batch].sum(-1) + scipy.stats.norm.logpdf(w[:, 0], 0.5, 0.3)
        np.testing.assert_allclose(stats["log_q"].values[0, :, batch], expected, rtol=1e-4)
    spread = data["prior"]["z"].values[0] - data["prior"]["w"].values[0][:, None]
    assert scipy.stats.kstest(spread.ravel(), "norm").pvalue > 1e-3  # false alarm 1e-3, fixed seed
    np.testing.assert_array_equal(data["observed_data"]["y"], x[:, 0] > 0)


@pytest.mark.parametrize("suffix", FORMATS)
def test_memory_is_that_of_one_batch(pair, suffix, tmp_path, monkeypatch):
    """Counted, not timed: of all views and arrays of earlier batches, those of one batch at most are still alive."""
    require(suffix)
    views: list[weakref.ref] = []
    arrays: list[weakref.ref] = []
    counts = []

    def watched():
        for batch in batches((6,) * 8):
            views.extend(weakref.ref(view) for view in batch)
            yield batch
            del batch

    def collect(self, *args, **kwargs):
        counts.append([sum(reference() is not None for reference in references) for references in (views, arrays)])
        made = original(self, *args, **kwargs)
        held = [np.asarray(variable[1]) for variables in made.groups.values() for variable in variables.values()]
        arrays.extend(weakref.ref(array if array.base is None else array.base) for array in held)
        sizes.append(len(held))
        return made

    sizes: list[int] = []
    original = Collector.collect
    monkeypatch.setattr(Collector, "collect", collect)
    stream_arviz(*pair, watched(), tmp_path / f"posterior{suffix}", num_samples=5, seed=0)
    assert len(counts) == 8 and len(arrays) == sum(sizes) > 100
    assert max(alive for alive, _ in counts) <= 4  # the views of this batch and of the one before
    assert max(alive for _, alive in counts) <= sizes[0]


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_interrupt_leaves_the_old_file_and_nothing_else(pair, suffix, tmp_path):
    require(suffix)
    path = tmp_path / f"posterior{suffix}"

    def interrupted():
        yield from batches((4, 4))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_arviz(*pair, interrupted(), path, num_samples=3)
    assert list(tmp_path.iterdir()) == []
    stream_arviz(*pair, batches((4,)), path, num_samples=3)
    with pytest.raises(KeyboardInterrupt):
        stream_arviz(*pair, interrupted(), path, num_samples=3)
    assert list(tmp_path.iterdir()) == [path] and opened(path).attrs["num_items"] == 4
    stream_arviz(*pair, batches((4, 2)), path, num_samples=3)
    assert list(tmp_path.iterdir()) == [path] and opened(path).attrs["num_items"] == 6


def test_nothing_of_the_caller_changes(pair, tmp_path):
    pair[1].train()
    state = torch.get_rng_state()
    stream_arviz(*pair, batches(), tmp_path / "a.nc", num_samples=3, seed=5)
    assert torch.equal(state, torch.get_rng_state()) and pair[1].training and torch.is_grad_enabled()


def test_bad_input(pair, tmp_path):
    path = tmp_path / "posterior.nc"
    with pytest.raises(ValueError, match=r"`path` must end in .nc or .zarr, got 'posterior.csv'"):
        stream_arviz(*pair, batches(), tmp_path / "posterior.csv")
    with pytest.raises(ValueError, match="at least one batch, got none"):
        stream_arviz(*pair, [], path)
    with pytest.raises(TypeError, match="tuple of tensors"):
        stream_arviz(*pair, torch.randn(3, 4), path)
    with pytest.raises(ValueError, match="of one length >= 1"):
        stream_arviz(*pair, [(torch.randn(3, 4), torch.randn(2, 4))], path)
    with pytest.raises(ValueError, match=r"batch 1 \(items 5 to 9\): `coords` must label every item, got 6"):
        stream_arviz(*pair, batches(), path, num_samples=2, coords={"item": range(6)})
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        stream_arviz(*pair, batches(), tmp_path / "file" / "posterior.nc")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_batch_that_is_not_like_the_first_is_named(tmp_path):
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), x.shape[1]), 1.0).to_event(1))
            if x.shape[1] == 2 and x[0, 0] > 5:
                pyro.deterministic("extra", x[:, 0])

    good, narrow, more = torch.zeros(3, 2), torch.zeros(3, 4), torch.full((3, 2), 9.0)
    for wrong, named in ((narrow, "posterior/z"), (more, "posterior/extra")):
        with pytest.raises(ValueError, match=rf"batch 1 \(items 3 to 5\): every batch must give .* {named}"):
            stream_arviz(program, program, [(good,), (wrong,)], tmp_path / "a.nc", num_samples=2)
    nan = torch.full((3, 2), torch.nan)

    def shifted(x):
        with pyro.plate("data", len(x)), pyro.validation_enabled(False):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"batch 1 \(items 3 to 5\): .* site `z`, item 0"):
        stream_arviz(shifted, shifted, [(good,), (nan,)], tmp_path / "a.nc", num_samples=2)
    assert list(tmp_path.iterdir()) == []


def test_zarr_that_is_not_installed(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-contrastive\[zarr\]', or write .nc"):
        stream_arviz(*pair, batches(), tmp_path / "posterior.zarr")
    assert list(tmp_path.iterdir()) == []
