"""What is left when a fit is killed or breaks down: a run that goes on bit for bit, and the batch that broke it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_contrastive._fit_state import FitState
from pyro_contrastive._fit_step import Breakdown, GradientStep
from pyro_contrastive.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from pyro_contrastive.fit import fit, replay_bad_batch
from pyro_contrastive.modules import keep_parameters_local

# Runs in a process of its own, which forks one process per run: those may be killed.
PROGRAM = """
import os, signal, sys
import torch
from torch import nn
from pyro_contrastive import checkpoint, guides, models
from pyro_contrastive.data import ViewLoader
from pyro_contrastive.fit import fit
from pyro_contrastive.validation import Validation, held_out_loss

torch.set_num_threads(1)
folder = sys.argv[1]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Deadly(ViewLoader):
    left = 13

    def _views(self, index, generator):
        Deadly.left -= 1
        if Deadly.left == 0:
            die()
        return super()._views(index, generator)

def half(payload, file, write=torch.save, calls=[]):
    calls.append(1)
    if len(calls) < 3:
        return write(payload, file)
    write(payload, file)
    file.truncate(file.tell() // 2)
    file.flush()
    die()

def train(out, seed, loader=ViewLoader):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 8))
    guide = guides.VonMisesFisher(encoder, dim=3)
    model = models.MCInfoNCE(guide, concentration=5.0, evidence="k_sample", num_samples=2)
    images = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    def noisy(x, g):
        return x + 0.3 * torch.randn(x.shape, generator=g)
    validation = Validation(held_out_loss([(images[:8], images[8:16])]), every=3, monitor="loss", patience=4)
    result = fit(model, guide, loader(images, noisy, batch_size=8), steps=23, lr=0.1, schedule="constant", device="cpu",
                 out=out, checkpoint_seconds=0.0, log_every=4, ema=0.9, validation=validation, chunk_size=3,
                 progress=False)
    torch.save([result.message, result.step, result.history, result.validations, result.ema, model.state_dict()],
               out + ".result")

def forked(task):
    child = os.fork()
    if child == 0:
        task()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

def killed_in_a_write():
    checkpoint.torch.save = half
    train(folder + "/write", 0)

train(folder + "/whole", 0)  # not forked: what is imported and built on the way is there for the forks
print(forked(lambda: train(folder + "/epoch", 0, Deadly)), forked(killed_in_a_write))
for name in ("epoch", "write"):
    at = checkpoint.load_checkpoint(folder + "/" + name + "/checkpoint.pt")["position"]
    print(at["step"], at["batch"], len(os.listdir(folder + "/" + name)))
print(forked(lambda: train(folder + "/epoch", 5)), forked(lambda: train(folder + "/write", 6)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = done.stdout.split()
    assert codes[:2] == ["-9", "-9"]  # both were killed,
    assert codes[2:5] == ["8", "3", "1"]  # the first in batch 13 (one of them is the look ahead), inside an epoch,
    assert codes[5:8] == ["8", "3", "2"]  # the second in the write after: half a temporary file beside the one before
    assert codes[8:] == ["0", "0"], done.stderr
    whole, epoch, write = (torch.load(tmp_path / f"{name}.result") for name in ("whole", "epoch", "write"))
    assert "best validation" in whole[0] and 0 < whole[1] <= 23 and len(whole[3]["loss"]) >= 4
    assert epoch[0] == write[0] == whole[0]
    torch.testing.assert_close(epoch[1:], whole[1:], rtol=0, atol=0)
    torch.testing.assert_close(write[1:], whole[1:], rtol=0, atol=0)
    assert os.listdir(tmp_path / "write") == ["checkpoint.pt"]  # the half file is gone


def test_two_processes_that_write_one_file_are_told(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"x": 1})

    def slow(payload, file, write=torch.save):
        write(payload, file)
        for temporary in tmp_path.glob(".*.tmp"):  # as the other process does first of all
            temporary.unlink()

    monkeypatch.setattr(torch, "save", slow)
    with pytest.raises(CheckpointError, match="another process writes"):
        save_checkpoint(path, {"x": 2})
    assert load_checkpoint(path)["x"] == 1


pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN")


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


class Model(PyroModule):
    """Breaks down at numbers above 100, in the loss or in its gradient only."""

    def __init__(self, breaks="loss"):
        super().__init__()
        self.breaks = breaks
        self.scale = PyroParam(torch.tensor(1.0))

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            value = -self.scale * z.square().sum(-1)
            if self.breaks == "loss":
                value = value + torch.where(x[:, 0] > 100.0, math.nan, 0.0)
            elif self.breaks == "gradient" and (x > 100.0).any() and self.training:
                value = value + (0.0 * self.scale).sqrt()
            pyro.factor("x", value)


def batches(bad_at=None):
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(8, 6, generator=g) for _ in range(12)]
    if bad_at is not None:
        data[bad_at][2, 0] = 1e3
    return data


def pair(**kwargs):
    torch.manual_seed(0)
    model, guide = Model(**kwargs), Guide()
    keep_parameters_local(model)
    keep_parameters_local(guide)
    return model, guide


def run(model, guide, data, **options):
    options = {"steps": 12, "lr": 0.01, "log_every": 4, "device": "cpu", "progress": False, **options}
    return fit(model, guide, data, num_views=1, **options)


def test_the_batch_that_broke_a_fit_breaks_it_again(tmp_path):
    data = batches(bad_at=6)
    with pytest.warns(RuntimeWarning, match=r"the loss was not finite in step 7.*step 7 is in .*bad_batch\.pt"):
        result = run(*pair(), data, out=tmp_path, validation=None, ema=0.9)
    assert result.status == "diverged" and result.step == 4
    path = tmp_path / "bad_batch.pt"
    payload = load_checkpoint(path)
    assert payload["step"] == 7 and payload["weights_step"] == 6 and torch.equal(payload["views"][0], data[6])
    state = torch.get_rng_state()
    assert math.isnan(replay_bad_batch(path, *pair()))
    assert torch.equal(torch.get_rng_state(), state)
    healthy = replay_bad_batch(path, *pair(breaks="never"))  # draws, masks and weights are those of step 7
    assert healthy == pytest.approx(run(*pair(breaks="never"), data, log_every=1).history["loss"][6], rel=1e-6)


def test_a_gradient_that_breaks_is_blamed_on_its_own_batch(tmp_path):
    data = batches(bad_at=6)
    with pytest.warns(RuntimeWarning, match="a parameter was not finite after step 7"):
        result = run(*pair(breaks="gradient"), data, out=tmp_path)
    assert result.step == 4
    payload = load_checkpoint(tmp_path / "bad_batch.pt")
    assert payload["step"] == 7 and payload["weights_step"] == 4 and torch.equal(payload["views"][0], data[6])


def test_where_looking_waits_for_the_device_it_is_done_one_step_later():
    model, guide = pair()
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        elbo = Trace_ELBO()(model, guide)
        elbo(batches()[0])
        parameters = list(elbo.parameters())
        optim = torch.optim.Adam(parameters)
        state = FitState({"model": model, "guide": guide}, {}, optim, torch.device("cpu"))
        step = GradientStep(elbo, 1, optim, parameters, state, late=True)
        data = batches(bad_at=1)
        for views in data[:2]:
            state.advance(step([views]))  # the second is bad, and nobody has looked
        with pytest.raises(Breakdown, match="the loss was not finite in step 2") as found:
            step([data[2]])
        assert found.value.attempt.views[0] is data[1] and not found.value.exact


def test_the_scale_of_the_loss_is_part_of_the_state():
    results = []
    for stop in (None, 3):
        model, guide = pair(breaks="never")
        data = batches()
        with pyro.settings.context(module_local_params=True):
            elbo = Trace_ELBO()(model, guide)
            elbo(data[0])
            parameters = list(elbo.parameters())

            def fresh(elbo=elbo, parameters=parameters, model=model, guide=guide):
                optim = torch.optim.Adam(parameters, lr=0.01)
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
                state = FitState({"model": model, "guide": guide}, {}, optim, torch.device("cpu"), scaler=scaler)
                return state, GradientStep(elbo, 1, optim, parameters, state, clip_norm=1.0)

            torch.manual_seed(3)
            state, step = fresh()
            for number, views in enumerate(data[:7]):
                if number == stop:
                    kept = state.copy()
                    state, step = fresh()
                    state.load(kept)
                state.advance(step([views]))
            results.append((state.scaler.get_scale(), [p.detach().clone() for p in parameters]))
    assert results[0][0] == 2.0**13  # doubled after every second step
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
