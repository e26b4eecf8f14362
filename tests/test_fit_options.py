"""Averaged weights, validation and early stopping, deterministic mode, trackers."""

from __future__ import annotations

import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from pyro_contrastive import guides, models
from pyro_contrastive.checkpoint import CheckpointError, fitted_weights, load_checkpoint
from pyro_contrastive.data import ViewLoader
from pyro_contrastive.fit import fit
from pyro_contrastive.trackers import TensorBoardTracker, Tracker
from pyro_contrastive.validation import Validation, held_out_loss

IMAGES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def pair(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 8))
        guide = guides.VonMisesFisher(encoder, dim=3)
        return models.MCInfoNCE(guide, concentration=5.0, evidence="k_sample", num_samples=2), guide


def loader():
    return ViewLoader(IMAGES, lambda x, g: x + 0.3 * torch.randn(x.shape, generator=g), batch_size=8)


def run(pair_=None, **options):
    options = {"steps": 12, "lr": 0.01, "device": "cpu", "progress": False, "log_every": 4, **options}
    return fit(*(pair_ or pair()), loader(), **options)


def weights(result):
    return {name: value.clone() for name, value in result.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Snapshots:
    """Metrics that keep the weights they see, and whatever else should not matter to the run."""

    def __init__(self, values=()):
        self.values, self.seen, self.draws = list(values), [], []

    def __call__(self, model, guide):
        assert not model.training and not torch.is_grad_enabled()
        self.seen.append({name: value.clone() for name, value in model.state_dict().items()})
        self.draws.append((torch.rand(()).item(), random.random(), np.random.rand()))
        return {"score": self.values[len(self.seen) - 1] if self.values else 0.0}


def test_the_average_is_the_recursion_by_hand_buffers_included():
    every = Snapshots()
    result = run(ema=0.5, validation=Validation(every, every=1))
    mean = {name: value.clone() for name, value in pair()[0].state_dict().items()}
    for step, now in enumerate(every.seen, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in now.items():
            mean[name] = decay * mean[name] + (1 - decay) * value if value.is_floating_point() else value
    assert set(result.ema) == {"model"}  # which holds the guide
    torch.testing.assert_close(result.ema["model"], mean, rtol=1e-5, atol=1e-6)
    assert not same(result.ema["model"], weights(result))
    assert int(result.ema["model"]["guide.encoder.1.num_batches_tracked"]) == 24
    result.load_ema()
    assert same(weights(result), result.ema["model"])
    assert run().ema is None
    with pytest.raises(ValueError, match="kept no averaged weights"):
        run(steps=1).load_ema()


def test_validation_leaves_the_run_as_it_is_without_it():
    metrics = Snapshots()
    with_it = run(validation=Validation(metrics, every=5))
    assert same(weights(with_it), weights(run())) and with_it.validations == {"step": [5, 10, 12], "score": [0, 0, 0]}
    assert len(set(metrics.draws)) == 1  # the same numbers for every validation, and as many left for the run


def test_the_best_weights_are_put_back_and_patience_ends_the_run(tmp_path):
    metrics = Snapshots([3.0, 5.0, 4.0, float("nan"), 9.0])
    options = {"monitor": "score", "best": "max", "patience": 2, "every": 2}
    result = run(validation=Validation(metrics, **options), ema=0.9, out=tmp_path)
    assert result.status == "done" and result.step == 4
    assert "8 of 12 steps; the weights after step 4, the best validation" in result.message
    assert same(weights(result), metrics.seen[1])
    payload = load_checkpoint(tmp_path / "checkpoint.pt")
    assert payload["position"]["step"] == 8 and same(payload["modules"]["model"], metrics.seen[3])  # to go on from
    assert same(fitted_weights(payload)["model"], metrics.seen[1])
    assert same(fitted_weights(payload, ema=True)["model"], result.ema["model"])
    again = Snapshots()
    resumed = run(pair(seed=4), validation=Validation(again, **options), ema=0.9, out=tmp_path)
    assert again.seen == [] and resumed.step == 4 and same(weights(resumed), weights(result))
    assert same(resumed.ema["model"], result.ema["model"])
    without = run(validation=Validation(Snapshots([3.0, 5.0, 4.0, 2.0, 1.0, 0.0]), every=2))
    assert without.step == 12  # no monitor: written down, nothing decided


@pytest.mark.parametrize("average", [False, True])
def test_pieces_of_a_validated_run_add_up_to_the_whole(tmp_path, average):
    def go(**more):
        metrics = held_out_loss([(IMAGES[:8], IMAGES[8:16])])
        validation = Validation(metrics, every=3, monitor="loss", use_ema=average)
        return run(validation=validation, ema=0.8, lr=0.05, **more)

    whole, piece = go(), go(out=tmp_path, max_seconds=0.0)
    while piece.status == "interrupted":
        with_ema = load_checkpoint(tmp_path / "checkpoint.pt")
        assert fitted_weights(with_ema) is with_ema["modules"]  # not done: the last ones
        piece = go(out=tmp_path, max_seconds=0.0, pair_=pair(seed=3))
    assert piece.validations == whole.validations and piece.history == whole.history and piece.step == whole.step
    assert same(weights(piece), weights(whole)) and same(piece.ema["model"], whole.ema["model"])


def test_the_average_is_validated_when_asked():
    metrics = Snapshots()
    result = run(validation=Validation(metrics, every=4, use_ema=True), ema=0.5)
    assert same(metrics.seen[-1], result.ema["model"]) and not same(weights(result), result.ema["model"])
    assert same(weights(result), weights(run()))


def test_held_out_loss_is_the_loss_of_the_objective():
    model, guide = pair()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        value = held_out_loss([(IMAGES[:8], IMAGES[8:16], 0), (IMAGES[16:20], IMAGES[20:24])])(model.eval(), guide)
        torch.manual_seed(3)
        by_hand = [
            held_out_loss([x])(model, guide)["loss"]
            for x in ((IMAGES[:8], IMAGES[8:16]), (IMAGES[16:20], IMAGES[20:24]))
        ]
    assert value["loss"] == pytest.approx((8 * by_hand[0] + 4 * by_hand[1]) / 12)
    with pytest.raises(ValueError, match="at least one batch"):
        held_out_loss([])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ema": 1.0}, ValueError, r"`ema` must lie in \(0, 1\).*got 1.0"),
        ({"validation": len}, TypeError, "must be a validation.Validation"),
        ({"validation": Validation(lambda m, g: {}, use_ema=True)}, ValueError, "there is no average"),
        ({"validation": Validation(lambda m, g: {"a": 1}, monitor="b")}, ValueError, r"one of the metrics \['a'\]"),
        ({"validation": Validation(lambda m, g: 3.0)}, TypeError, "must return numbers by name, got float"),
        ({"tracker": print}, TypeError, "methods log, figure and flush"),
    ],
)
def test_fit_refuses(options, error, message):
    with pytest.raises(error, match=message):
        run(steps=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be an integer >= 1"),
        ({"best": "low"}, "`best` must be 'min' or 'max', got 'low'"),
        ({"patience": 0, "monitor": "x"}, "`patience` must be an integer >= 1"),
        ({"patience": 3}, "needs a `monitor`"),
    ],
)
def test_validation_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Validation(lambda model, guide: {}, **options)
    with pytest.raises(TypeError, match="must be a function"):
        Validation(3)


def test_another_average_or_metric_is_another_run(tmp_path):
    run(ema=0.9, out=tmp_path, steps=2)
    with pytest.raises(CheckpointError, match="ema: 0.9 in the file, 0.5 now"):
        run(ema=0.5, out=tmp_path, steps=2)
    with pytest.raises(CheckpointError, match="monitor: None in the file, 'score' now"):
        run(ema=0.9, out=tmp_path, steps=2, validation=Validation(Snapshots(), monitor="score"))
    run(out=tmp_path / "plain", steps=2)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        fitted_weights(load_checkpoint(tmp_path / "plain" / "checkpoint.pt"), ema=True)


def test_deterministic_algorithms_hold_for_the_run_only():
    seen = []

    def metrics(model, guide):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return {}

    assert same(weights(run(validation=Validation(metrics), deterministic=True)), weights(run()))
    assert seen == [(True, False)] and not torch.are_deterministic_algorithms_enabled()

    def fails(model, guide):
        raise KeyError("mine")

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(KeyError, match="mine"):
            run(validation=Validation(fails), deterministic=True)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


class Recording:
    def __init__(self):
        self.rows, self.flushed = [], 0

    def log(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def figure(self, name, figure, step):
        raise AssertionError

    def flush(self):
        self.flushed += 1


def test_a_tracker_gets_history_and_validations_as_they_come():
    tracker = Recording()
    result = run(tracker=tracker, validation=Validation(Snapshots(), every=6))
    rows = [(step, set(row)) for step, row in tracker.rows]
    train = {"train/loss", "train/lr", "train/positive", "train/latents"}
    assert rows == [(4, train), (6, {"validation/score"}), (8, train), (12, train), (12, {"validation/score"})]
    assert [row["train/loss"] for _, row in tracker.rows if "train/loss" in row] == result.history["loss"]
    assert tracker.flushed == 1
    with pytest.raises(RuntimeError, match="mine"):
        run(tracker=(broken := Recording()), schedule=lambda done: (_ for _ in ()).throw(RuntimeError("mine")))
    assert broken.flushed == 1


class Writer:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def drawn():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1), dpi=50)
    figure.add_subplot().plot([0, 1])
    return figure


def test_tensorboards_writer_gets_scalars_and_pictures():
    tracker, figure = TensorBoardTracker(writer=Writer()), drawn()
    assert isinstance(tracker, Tracker)
    canvas = figure.canvas
    tracker.log({"a": 1.0, "b": 2.0}, 3)
    tracker.figure("caps", figure, 3)
    tracker.flush()
    (_, (name, pixels, step), options) = tracker.writer.calls.pop(2)
    assert tracker.writer.calls == [
        ("add_scalar", ("a", 1.0, 3), {}),
        ("add_scalar", ("b", 2.0, 3), {}),
        ("flush", (), {}),
    ]
    assert (name, pixels.shape, step, options) == ("caps", (50, 100, 3), 3, {"dataformats": "HWC"}) and pixels.std() > 0
    assert figure.canvas is canvas


def test_without_tensorboard_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-contrastive\[tensorboard\]'"):
        TensorBoardTracker(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with pytest.raises(ValueError, match="`folder` must say where"):
        TensorBoardTracker()


def test_the_real_tensorboard_reads_it_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path)
    result = run(tracker=tracker)
    tracker.figure("caps", drawn(), 12)
    tracker.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [
        (s, pytest.approx(v)) for s, v in zip(result.history["step"], result.history["loss"], strict=True)
    ]
    assert [event.step for event in events.Images("caps")] == [12]
