"""Probe, alignment, uniformity and uncertainty against references; the evaluation in one call against its parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, special
from torch import nn

from pyro_contrastive import diagnostics, guides
from pyro_contrastive.data import crop_and_rotate, degrade, load_images
from pyro_contrastive.distributions import HypersphericalUniform, PowerSpherical, ProjectedNormal, VonMisesFisher


def blobs(n=90, classes=3, dim=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return rng.normal(size=(n, dim)) + 1.5 * np.eye(classes, dim)[labels] + 3.0, labels


def unit(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(values, dim=-1)


def test_probe_against_an_optimiser():
    (x, y), (z, t) = blobs(), blobs(60, seed=1)
    found = diagnostics.linear_probe(x, y, z, t, penalty=2.0)
    mean, spread = x.mean(0), x.std(0)
    x, z = (x - mean) / spread, (z - mean) / spread

    def loss(flat):
        weights = flat.reshape(3, 5)
        logits = x @ weights[:, 1:].T + weights[:, 0]
        nll = (special.logsumexp(logits, axis=1) - logits[np.arange(90), y]).sum()
        return nll + 0.5 * 2.0 * (weights[:, 1:] ** 2).sum()

    weights = optimize.minimize(loss, np.zeros(15), tol=1e-9).x.reshape(3, 5)
    logits = special.log_softmax(z @ weights[:, 1:].T + weights[:, 0], axis=1)
    assert found.cross_entropy == pytest.approx(-logits[np.arange(60), t].mean(), abs=1e-3)
    assert np.array_equal(found.correct, logits.argmax(1) == t) and 0.6 < found.accuracy < 1
    assert found.information == pytest.approx(math.log(3) - found.cross_entropy)


def test_features_without_labels_in_them_have_no_information():
    rng = np.random.default_rng(0)
    found = diagnostics.linear_probe(
        rng.normal(size=(3_000, 4)), rng.integers(0, 5, 3_000), rng.normal(size=(3_000, 4)), rng.integers(0, 5, 3_000)
    )
    assert abs(found.information) < 0.02 and abs(found.accuracy - 0.2) < 0.04  # 5 standard errors: 6e-7


def test_alignment_and_uniformity_against_loops():
    x, y = unit(40, 5), unit(40, 5, seed=1)
    distances = [float((a - b).square().sum()) for a, b in zip(x, y, strict=True)]
    assert diagnostics.alignment_loss(x, y) == pytest.approx(np.mean(distances))
    pairs = [math.exp(-2 * float((x[i] - x[j]).square().sum())) for i in range(40) for j in range(40) if i != j]
    assert diagnostics.uniformity_loss(x) == pytest.approx(math.log(np.mean(pairs)))
    many = unit(2_500, 5)  # more rows than are held at once
    gaps = torch.cdist(many, many).square()
    whole = torch.exp(-2 * gaps).sum() - torch.exp(-2 * gaps.diagonal()).sum()
    assert diagnostics.uniformity_loss(many) == pytest.approx(math.log(whole / (2_500 * 2_499)))


@pytest.mark.parametrize(
    "law",
    [
        VonMisesFisher(unit(3, 6), torch.tensor([0.0, 4.0, 60.0], dtype=torch.float64)),
        PowerSpherical(unit(3, 6), torch.tensor([0.0, 4.0, 60.0], dtype=torch.float64)),
        ProjectedNormal(unit(3, 6), torch.tensor([[9.0], [0.5], [0.01]], dtype=torch.float64)),
        HypersphericalUniform(6).expand((3,)),
    ],
    ids=lambda law: type(law).__name__,
)
def test_uncertainty_against_draws(law):
    torch.manual_seed(0)
    found, draws = diagnostics.uncertainty(law), law.sample((20_000,)).double()
    # the length of a mean of 20,000 draws is off by at most about sqrt(d / 20,000) = .017
    np.testing.assert_allclose(found, 1 - draws.mean(0).norm(dim=-1).numpy(), atol=0.03)


def test_uncertainty_of_a_law_that_does_not_know_its_mean():
    class Bare(torch.distributions.Distribution):
        arg_constraints = {}

        def sample(self, shape):
            return law.sample(shape)

    law = VonMisesFisher(unit(3, 6), torch.tensor([2.0, 4.0, 60.0], dtype=torch.float64))
    bare = Bare(torch.Size([3]), torch.Size([6]))
    np.testing.assert_allclose(diagnostics.uncertainty(bare), diagnostics.uncertainty(law), atol=0.15)  # 256 draws


class Pixels(nn.Module):
    """Features that hold what the images show."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))

    def forward(self, x):
        return self.layers(x)


def make(family, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return family(Pixels(), 5, features=16, **options)


def digits(num=120):
    (train, y), (test, t) = load_images("digits"), load_images("digits", "test")
    return (train[:300], y[:300]), (test[:num], t[:num])


@pytest.mark.parametrize("family", [guides.VonMisesFisher, guides.ProjectedNormal, guides.Siamese, guides.Delta])
def test_the_parts_of_an_evaluation(family):
    guide, (train, test) = make(family), digits()
    strangers = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    guide.train()
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in guide.state_dict().items()}
    scores = diagnostics.evaluate_representation(
        guide, train, test, augment=crop_and_rotate, corruptions=("noise", "blur"), num_corrupted=50, batch_size=64,
        ood={"noise": strangers}, pair_concentration=20.0,
    )  # fmt: skip
    assert guide.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[key]) for key, value in guide.state_dict().items())

    guide.eval()
    (x, y), (z, t) = train, test
    x, z = x.float() / 255, z.float() / 255
    with torch.no_grad():
        bank, features, law = guide.encoder(x), guide.encoder(z), guide.posterior(z)
        points = guide.branch(z).point if family is guides.Siamese else getattr(law, "mean_direction", None)
        points = law.mean if points is None else points
    correct = diagnostics.knn_correct(bank, y, features, t)
    assert np.array_equal(scores.knn_correct, correct) and scores.knn_accuracy == correct.mean()
    assert scores.probe.accuracy == pytest.approx(diagnostics.linear_probe(bank, y, features, t).accuracy, abs=0.01)
    assert scores.spectrum.effective_rank == pytest.approx(diagnostics.embedding_spectrum(points).effective_rank, 1e-4)
    assert scores.uniformity == pytest.approx(diagnostics.uniformity_loss(points), abs=1e-5)
    assert scores.alignment is not None and 0 < scores.alignment < 2 and 1 < scores.feature_rank < 16
    corrupted = scores.corrupted
    assert corrupted.kinds == ("noise", "blur") and corrupted.accuracy.shape == (2, 5) and corrupted.num_items == 50
    figures, text = scores.figures(), scores.summary()
    assert all(isinstance(v, float) and math.isfinite(v) for v in figures.values())
    assert f"nearest neighbours {scores.knn_accuracy:.3f}" in text

    with torch.no_grad():
        found = (torch.nn.functional.normalize(f, dim=-1) for f in (bank, features, guide.encoder(strangers)))
    known, *others = found
    near, far = (1 - (c @ known.T).topk(5).values[:, -1] for c in others)
    assert figures["distance_noise"] == pytest.approx((far[:, None] > near).double().mean().item(), abs=1e-3)
    assert "distance to the training images for strangers (noise)" in text
    if family is guides.Delta:
        assert scores.uncertainty is scores.quartiles is scores.wrong_auroc is scores.lengths is None
        assert not scores.ood and np.isnan(corrupted.auroc).all() and "no width" in text
        assert not any("auroc" in name or "quartile" in name for name in figures)
        return
    width = diagnostics.uncertainty(law)
    np.testing.assert_allclose(scores.uncertainty, width, atol=1e-6)
    np.testing.assert_allclose(scores.quartiles, diagnostics.accuracy_by_quartile(-scores.uncertainty, correct))
    assert scores.wrong_auroc.value == pytest.approx(
        np.mean(np.sign(scores.uncertainty[~correct][:, None] - scores.uncertainty[correct]) / 2 + 0.5)
    )
    assert set(scores.ood) == {"noise"} and figures["ood_noise"] == scores.ood["noise"].value
    assert np.isfinite(corrupted.auroc).all() and corrupted.wrong_auroc is not None
    lengths = scores.lengths
    assert lengths.counts.sum() == 120 and "resultant length" in text
    if family is guides.Siamese:  # a prediction of the other point: its own length
        assert abs(lengths.predicted.mean() - (1 - width).mean()) < 0.1
    else:  # the product of both lengths and A_5(20) = .9
        assert abs(lengths.predicted.mean() - 0.8977 * (1 - width).mean() ** 2) < 0.1


def test_corrupted_images_are_those_of_the_ladder():
    guide, (train, test) = make(guides.VonMisesFisher), digits()
    scores = diagnostics.evaluate_representation(guide, train, test, corruptions=["contrast"], num_corrupted=40, seed=3)
    guide.eval()
    with torch.no_grad():  # contrast has no draws
        bank, images = guide.encoder(train[0].float() / 255), degrade(test[0][:40], "contrast", 4)
        right = diagnostics.knn_correct(bank, train[1], guide.encoder(images), test[1][:40])
        width = diagnostics.uncertainty(guide.posterior(images))
    assert scores.corrupted.accuracy[0, 3] == right.mean()
    assert scores.corrupted.uncertainty[0, 3] == pytest.approx(width.mean(), abs=1e-6)
    expected = diagnostics.ood_auroc(-scores.uncertainty, -width).value
    assert scores.corrupted.auroc[0, 3] == pytest.approx(expected, abs=1e-3)


def test_calibrated_widths_agree_in_length_with_pairs():
    """Posteriors of a known world: two views of one latent, cosines as the lengths say."""

    class Known(nn.Module):
        encoder = nn.Flatten()

        def posterior(self, x):
            x = x.flatten(1)
            return VonMisesFisher(nn.functional.normalize(x, dim=-1), x.norm(dim=-1))

    n, generator = 2_000, torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    latent = HypersphericalUniform(4).sample((n,))

    def view(images, rng):
        kappa = 4 + 30 * torch.rand(len(images), generator=rng)
        return VonMisesFisher(images.flatten(1), kappa).sample().mul(kappa[:, None]).reshape(-1, 1, 2, 2)

    data = latent.reshape(n, 1, 2, 2), torch.randint(0, 2, (n,), generator=generator)
    lengths = diagnostics.evaluate_representation(Known(), data, data, augment=view, corruptions=()).lengths
    # four intervals of 99.99 % each
    half = (lengths.upper - lengths.lower) / 2 * 3.89 / 1.96
    assert (np.abs(lengths.gap) < half).all() and lengths.predicted[0] > lengths.predicted[3] + 0.2


def test_a_function_is_an_embedding_without_width():
    (train, test) = digits()
    scores = diagnostics.evaluate_representation(lambda x: x.flatten(1), train, test, corruptions=())
    assert scores.uncertainty is None and scores.corrupted is None and scores.knn_accuracy > 0.8
    assert scores.spectrum.dim == 64 and scores.figures()["latent_dim"] == 64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"guide": 3}, TypeError, r"`posterior\(x\)` or be a function of images, got int"),
        ({"test": (torch.zeros(5, 1, 8, 8), torch.zeros(4))}, ValueError, r"`test` must be images .* \(4,\)"),
        ({"train": (torch.zeros(0, 1, 8, 8), torch.zeros(0))}, ValueError, "`train` must be images .* N >= 1"),
        ({"batch_size": 1}, ValueError, "`batch_size` must be >= 2, got 1"),
        ({"num_corrupted": 0}, ValueError, "`num_corrupted` must be >= 2, got 0"),
        ({"pair_concentration": 0.0}, ValueError, "`pair_concentration` must be > 0"),
        ({"corruptions": ("fog",)}, ValueError, "`kind` must be one of"),
        ({"k": 0}, ValueError, "`k` must be in 1..300"),
    ],
)
def test_wrong_arguments(change, error, message):
    train, test = digits(20)
    arguments = {"guide": lambda x: x.flatten(1)[:, :9], "train": train, "test": test, "corruptions": (), **change}
    with pytest.raises(error, match=message):
        diagnostics.evaluate_representation(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: diagnostics.linear_probe(np.zeros((3, 2)), [0, 1, 0], np.zeros((3, 3)), [0, 1, 0]),
            "features must be",
        ),
        (lambda: diagnostics.linear_probe(np.eye(2), [0, 1], np.eye(2), [0, 2]), "must occur in training, got 2"),
        (lambda: diagnostics.linear_probe(np.eye(2), [0, 1], np.eye(2), [0, 1], penalty=0), "`penalty` must be > 0"),
        (lambda: diagnostics.alignment_loss(np.eye(3), np.eye(2)), r"must both be \(N, d\)"),
        (lambda: diagnostics.uniformity_loss(np.eye(3)[:1]), "N >= 2"),
    ],
)
def test_wrong_arguments_of_the_parts(call, message):
    with pytest.raises(ValueError, match=message):
        call()
