"""The training loop: learns, resumes bit for bit, stops on NaN, leaves no trace in the caller's process."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_contrastive.checkpoint import CheckpointError, load_checkpoint
from pyro_contrastive.data import ViewLoader
from pyro_contrastive.fit import fit, pick_device
from pyro_contrastive.schedules import SCHEDULES, warmup_cosine

IMAGES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))

    def forward(self, x1, x2):
        with pyro.plate("pairs", len(x1)):
            for name, x in (("z1", x1), ("z2", x2)):
                pyro.sample(name, dist.Normal(self.encoder(x), 0.5).to_event(1))


class Model(PyroModule):
    """A linear-Gaussian pair with one negative part, so that signs of the parts matter."""

    def __init__(self, guide=None):
        super().__init__()
        self.guide = guide
        self.concentration = PyroParam(torch.tensor(2.0), constraint=constraints.positive)

    def forward(self, x1, x2):
        with pyro.plate("pairs", len(x1)):
            prior = dist.Normal(x1.new_zeros(2), 1.0).to_event(1)
            z1, z2 = pyro.sample("z1", prior), pyro.sample("z2", prior)
            logits = -self.concentration * (z1.unsqueeze(-2) - z2.unsqueeze(-3)).square().sum(-1)
            pyro.factor("positive", logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1))


def noisy(batch, generator):
    return batch + 0.3 * torch.randn(batch.shape, generator=generator)


def pair(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        guide = Guide()
        return Model(guide), guide


def loader(**kwargs):
    return ViewLoader(IMAGES, noisy, labels=torch.arange(40), batch_size=8, **kwargs)


def run(data=None, pair_=None, **kwargs):
    model, guide = pair_ or pair()
    options = {"steps": 23, "lr": 1e-2, "device": "cpu", "progress": False, "log_every": 4, **kwargs}
    return fit(model, guide, loader() if data is None else data, **options)


def weights(result):
    return {name: value.clone() for name, value in result.model.state_dict().items()}


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Interrupting:
    """Data that raise Ctrl-C in front of one batch."""

    def __init__(self, data, at):
        self.data, self.at, self.count = data, at, 0

    def __iter__(self):
        for batch in self.data:
            if self.count == self.at:
                self.count += 1
                raise KeyboardInterrupt
            self.count += 1
            yield batch


class InterruptingSeek(Interrupting):
    def seek(self, epoch, batch):
        self.data.seek(epoch, batch)


def test_loss_goes_down_and_the_parts_add_up():
    result = run(steps=200, log_every=20)
    history = result.history
    assert result.status == "done" and result.step == 200
    assert history["step"] == [20.0 * k for k in range(1, 11)]
    assert history["loss"][-1] < history["loss"][0] - 0.3
    assert set(history) == {"step", "loss", "lr", "positive", "latents"}
    for loss, positive, latents in zip(history["loss"], history["positive"], history["latents"], strict=True):
        assert loss == pytest.approx(-(positive + latents), abs=1e-4)
        assert -4 < positive < 0  # a log-softmax over 8, in nats per pair
    assert history["lr"][-1] < 1e-5 < history["lr"][0]
    assert not result.model.training and not result.guide.training


@pytest.mark.parametrize("vectorized", [False, True])
def test_the_recorded_factor_is_the_mean_over_particles(vectorized):
    class Constant(Model):
        def forward(self, x1, x2):
            super().forward(x1, x2)
            with pyro.plate("more", len(x1)):
                pyro.factor("constant", x1.new_full((len(x1),), -1.5) * self.concentration / self.concentration)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        guide = Guide()
        model = Constant(guide)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
    result = run(pair_=(model, guide), elbo=elbo, steps=4)
    assert result.history["constant"] == pytest.approx([-1.5], abs=1e-5)


def test_an_interrupted_and_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    whole = run()
    for at in (1, 9, 13):  # the dry call takes batch 0; 9 and 13 lie inside an epoch and off the log steps
        part = run(InterruptingSeek(loader(), at), out=tmp_path / str(at))
        assert part.status == "interrupted" and 0 < part.step < 23 or at == 1
        rest = run(out=tmp_path / str(at), pair_=pair(seed=5))
        assert rest.step == 23 and rest.history == whole.history
        assert identical(weights(rest), weights(whole))


def test_pieces_of_limited_time_add_up_to_the_whole_run(tmp_path):
    whole, pieces = run(steps=9), [run(steps=9, out=tmp_path, max_seconds=0.0)]
    while pieces[-1].status == "interrupted":
        assert pieces[-1].step == len(pieces)  # no time at all is one step
        pieces.append(run(steps=9, out=tmp_path, pair_=pair(seed=5), max_seconds=0.0))
    assert pieces[-1].status == "done" and pieces[-1].history == whole.history
    assert identical(weights(pieces[-1]), weights(whole))


def test_resume_is_exact_for_a_shuffling_dataloader_too(tmp_path):
    def make():
        return DataLoader(TensorDataset(IMAGES, IMAGES.flip(0)), batch_size=8, shuffle=True, drop_last=True)

    whole = run(make())
    part = run(Interrupting(make(), 14), out=tmp_path)
    assert 0 < part.step < 23
    rest = run(make(), out=tmp_path, pair_=pair(seed=5))
    assert identical(weights(rest), weights(whole))
    assert rest.history == whole.history


def test_resume_of_a_finished_run_does_nothing_and_another_configuration_is_refused(tmp_path):
    first = run(out=tmp_path)
    again = run(out=tmp_path, pair_=pair(seed=3))
    assert again.step == 23 and identical(weights(again), weights(first))
    with pytest.raises(CheckpointError, match="seed: 0 in the file, 1 now"):
        run(out=tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="steps: 23 in the file, 30 now"):
        run(out=tmp_path, steps=30)
    with pytest.raises(CheckpointError, match="method: None in the file, 'rpm' now"):
        run(out=tmp_path, config={"method": "rpm"})

    class Guide(PyroModule):  # the same name, another shape
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(6, 2)

        forward = globals()["Guide"].forward

    Guide.__qualname__ = "Guide"
    guide = Guide()
    with pytest.raises(CheckpointError, match="does not fit this pair"):
        run(out=tmp_path, pair_=(Model(guide), guide))
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        run(out=tmp_path)
    assert run(out=tmp_path, resume=False).step == 23


def test_a_constant_schedule_can_be_extended(tmp_path):
    run(out=tmp_path, schedule="constant", steps=12)
    longer = run(out=tmp_path, schedule="constant", steps=24, pair_=pair(seed=3))
    assert identical(weights(longer), weights(run(schedule="constant", steps=24)))


def test_the_checkpoint_opens_safely_and_holds_everything(tmp_path):
    result = run(out=tmp_path)
    payload = load_checkpoint(tmp_path / "checkpoint.pt")
    assert payload["position"]["step"] == 23 and payload["history"] == result.history
    assert identical(payload["modules"]["model"], weights(result))
    assert set(payload["modules"]) == {"model"}  # the model holds the guide
    assert payload["config"]["lr"] == [1e-2]


class Breaking(Model):
    """Its loss turns to NaN, or only its gradient to infinity, in one training step."""

    def __init__(self, guide, at, kind):
        super().__init__(guide)
        self.at, self.kind, self.calls = at, kind, 0

    def forward(self, x1, x2):
        super().forward(x1, x2)
        self.calls += self.training
        if self.training and self.calls == self.at:
            zero = self.concentration * 0.0
            with pyro.plate("more", len(x1)):
                pyro.factor("broken", (zero.sqrt() if self.kind == "gradient" else zero.log() * zero).expand(len(x1)))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize(
    ("kind", "said"), [("loss", "loss was not finite in step 10"), ("gradient", "not finite|in step")]
)
def test_nan_stops_the_run_and_the_last_good_state_is_put_back(tmp_path, kind, said):
    good = run(InterruptingSeek(loader(), 9), steps=23)  # the dry call takes one batch: 8 steps
    assert good.step == 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        guide = Guide()
        model = Breaking(guide, 10, kind)
    with pytest.warns(RuntimeWarning, match="smaller `lr`"):
        result = run(pair_=(model, guide), out=tmp_path)
    assert result.status == "diverged" and result.step == 8
    import re

    assert re.search(said, result.message) and "after step 8 was put back" in result.message
    assert identical(weights(result), weights(good))
    assert identical(load_checkpoint(tmp_path / "checkpoint.pt")["modules"]["model"], weights(good))


def test_a_bug_in_the_model_is_not_called_divergence():
    class Faulty(Model):
        def forward(self, x1, x2):
            if self.training:
                raise ValueError("my own bug")
            super().forward(x1, x2)

    guide = Guide()
    with pytest.raises(ValueError, match="my own bug"):
        run(pair_=(Faulty(guide), guide))


def test_the_callers_process_is_left_as_it_was():
    pyro.clear_param_store()
    torch.manual_seed(7)
    state, local = torch.get_rng_state(), pyro.settings.get("module_local_params")
    validation = torch.distributions.Distribution._validate_args
    run(steps=3)
    assert torch.equal(state, torch.get_rng_state())
    assert pyro.settings.get("module_local_params") == local
    assert torch.distributions.Distribution._validate_args == validation
    assert len(pyro.get_param_store()) == 0


def test_the_seed_decides_and_the_callers_random_state_does_not():
    torch.manual_seed(1)
    first = weights(run(steps=5))
    torch.manual_seed(2)
    assert identical(weights(run(steps=5)), first)
    assert not identical(weights(run(steps=5, seed=1)), first)


def test_plain_functions_train_through_the_store_and_resume(tmp_path):
    def model(x1, x2):
        mean = pyro.param("mean", torch.zeros(6))
        scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
        with pyro.plate("pairs", len(x1)):
            pyro.factor("x1", dist.Normal(mean, scale).to_event(1).log_prob(x1))

    def go(steps, **kwargs):
        pyro.clear_param_store()
        return fit(model, lambda x1, x2: None, [(IMAGES, IMAGES)], steps=steps, lr=0.1, schedule="constant",
                   device="cpu", progress=False, **kwargs)  # fmt: skip

    go(200, out=tmp_path)
    assert torch.allclose(pyro.param("mean"), IMAGES.mean(0), atol=1e-3)  # closed-form maximum likelihood
    scale = (IMAGES - IMAGES.mean(0)).square().mean().sqrt()
    assert float(pyro.param("scale").detach()) == pytest.approx(float(scale), abs=1e-3)
    assert pyro.settings.get("module_local_params") is False
    trained = pyro.param("mean").detach().clone()
    go(200, out=tmp_path)
    assert torch.equal(pyro.param("mean"), trained)
    pyro.clear_param_store()


def test_a_lazy_encoder_is_built_before_the_optimiser_and_its_statistics_start_at_zero():
    class Lazy(Guide):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    guide = Lazy()
    result = run(pair_=(Model(guide), guide), steps=3)
    assert guide.encoder[0].weight.shape == (8, 6)
    assert int(guide.encoder[1].num_batches_tracked) == 6  # three steps, two views
    assert result.status == "done"


def test_num_views_picks_what_the_pair_takes():
    with pytest.raises(ValueError, match="num_views=4 entries, got 3"):
        run(num_views=4)
    with pytest.raises(TypeError, match="positional argument"):
        run(num_views=None)


def test_one_shot_generators_lose_no_batch_and_say_when_they_end():
    seen = []

    def batches(n):
        for k in range(n):
            seen.append(k)
            yield IMAGES[:8] + k, IMAGES[8:16]

    assert run(batches(5), steps=5).step == 5
    assert seen == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="nothing more after 2 steps"):
        run(batches(2), steps=5)
    with pytest.raises(ValueError, match="gave no batch"):
        run(batches(0), steps=5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 1}, "exactly one of `epochs` and `steps`"),
        ({"steps": None}, "exactly one of `epochs` and `steps`"),
        ({"steps": 0}, ">= 1, got 0"),
        ({"steps": None, "epochs": 2, "data": iter([])}, "pass `steps` instead"),
        ({"lr": 0.0}, "`lr` must be > 0, got 0.0"),
        ({"clip_norm": -1.0}, "`clip_norm` must be > 0"),
        ({"max_seconds": -1.0}, "`max_seconds` must be >= 0 or None, got -1.0"),
        ({"log_every": 0}, "`log_every` must be >= 1"),
        ({"schedule": "linear"}, r"one of \['constant', 'cosine'\], got 'linear'"),
        ({"device": "gpu"}, "'auto', 'cpu', 'cuda'"),
    ],
)
def test_errors_say_the_rule_and_what_was_got(kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(**kwargs)


def test_own_optimiser_schedule_and_clipping():
    result = run(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5), schedule=lambda done: 1.0 - done, clip_norm=1e-9, steps=4
    )
    assert result.history["lr"] == pytest.approx([0.5 * 0.25])
    start, _ = pair()
    moved = (result.model.concentration_unconstrained - start.concentration_unconstrained).detach().abs()
    assert 0 <= float(moved) < 4e-9


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_epochs_count_passes():
    assert run(steps=None, epochs=2).step == 10


def test_a_function_beside_a_module_guide_trains_both_and_resumes(tmp_path):
    def model(x1, x2):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("pairs", len(x1)):
            z1 = pyro.sample("z1", dist.Normal(x1.new_zeros(2), scale).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(x1.new_zeros(2), scale).to_event(1))
            pyro.factor("close", -(z1 - z2).square().sum(-1))

    def go(steps, seed=0):
        pyro.clear_param_store()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            guide = Guide()
        before = {name: value.clone() for name, value in guide.state_dict().items()}
        options = {"schedule": "constant", "lr": 1e-2, "device": "cpu", "progress": False}
        fit(model, guide, loader(), steps=steps, out=tmp_path / "run", **options)
        assert all(name.startswith("encoder") for name in before)
        assert not torch.equal(before["encoder.0.weight"], guide.encoder[0].weight)
        return {**guide.state_dict(), "scale": pyro.param("scale").detach().clone()}

    go(6)
    resumed = go(12, seed=1)
    (tmp_path / "run" / "checkpoint.pt").unlink()
    assert identical(go(12), resumed)
    assert set(pyro.get_param_store().keys()) == {"scale"}  # the guide's parameters stay in the guide
    pyro.clear_param_store()


def test_warmup_cosine_rises_and_falls():
    factor = warmup_cosine(0.25)
    values = [factor(k / 100) for k in range(101)]
    assert max(values) == values[25] == 1.0 and values[:26] == sorted(values[:26])
    assert values[25:] == sorted(values[25:], reverse=True) and values[0] == 0.0 and abs(values[100]) < 1e-12
    assert factor(0.625) == pytest.approx(0.5)  # half of the fall
    assert [SCHEDULES["cosine"](k / 4) for k in range(4)] == [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    with pytest.raises(ValueError, match=r"`share` must be in \[0, 1\).*got 1"):
        warmup_cosine(1)
