"""A representation of images judged in one call: what its features know, and what its widths know about themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.distributions import Delta
from torch import Tensor, nn

from pyro_contrastive.data import CORRUPTIONS, NUM_SEVERITIES, ViewLoader, degrade
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, derived_seed
from pyro_contrastive.diagnostics._intervals import Estimate
from pyro_contrastive.diagnostics._run import evaluation
from pyro_contrastive.diagnostics.calibration import direction_and_concentration
from pyro_contrastive.diagnostics.collapse import Spectrum, embedding_spectrum
from pyro_contrastive.diagnostics.prediction import ResultantLengthCheck, resultant_length_check
from pyro_contrastive.diagnostics.probe import LinearProbe, alignment_loss, linear_probe, uncertainty, uniformity_loss
from pyro_contrastive.diagnostics.representation import accuracy_by_quartile, knn_correct, neighbour_distance
from pyro_contrastive.diagnostics.selective import ood_auroc
from pyro_contrastive.ops import bessel_ratio

__all__ = ["CorruptionScores", "RepresentationScores", "evaluate_representation"]

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class CorruptionScores:
    """What corruptions do to answers and widths. Rows are kinds, columns severities 1 to 5.

    Attributes:
        kinds: Names of the K kinds.
        accuracy: Of the nearest neighbours, shape (K, 5).
        uncertainty: Mean, shape (K, 5); NaN without widths.
        auroc: Probability that a corrupted image is less sure than a clean one, shape (K, 5); NaN without widths.
        wrong_auroc: Probability that a wrong answer is less sure than a right one, all corrupted images together;
            None without widths, or fewer than two wrong or right answers.
        num_items: Images per kind and severity.
    """

    kinds: tuple[str, ...]
    accuracy: FloatArray
    uncertainty: FloatArray
    auroc: FloatArray
    wrong_auroc: Estimate | None
    num_items: int


@dataclass(frozen=True, eq=False)
class RepresentationScores:
    """What :func:`evaluate_representation` found. Features carry the answers, posteriors the widths.

    Attributes:
        knn_accuracy: Of the k nearest training images by the cosine of their features, in [0, 1].
        probe: The linear probe of the features; ``probe.information`` bounds the mutual information with the labels.
        feature_rank: Effective rank of the features of the test images; NaN where they are no more than the features.
        spectrum: Spread, singular values and effective rank of the latents' directions.
        uniformity: `uniformity_loss` of the same.
        alignment: `alignment_loss` of two augmented views, or None without an augmentation.
        lengths: Predicted against realised mean resultant length on pairs of views, or None without an augmentation or
            widths. If one view has a posterior of length R1 and the other R2, the cosine of their directions should be
            R1 R2 A(kappa_pair) on average, for uniform latents and laws symmetric about their direction; for a guide
            that predicts the other view's point, it is R1.
        knn_correct: Whether each test image was answered right, shape (N,).
        uncertainty: One minus the mean resultant length, shape (N,), or None for points.
        quartiles: Accuracy of the surest to the least sure quarter, shape (4,), or None for points.
        wrong_auroc: Probability that a wrong answer is less sure than a right one; None for points, or fewer than two
            wrong or right answers.
        corrupted: Likewise for corrupted images, or None where none was asked for.
        ood: Probability that a strange image is less sure than a test image, by set; empty for points.
        ood_distance: Probability that a strange image is farther from the training images than a test image, by
            `neighbour_distance` of the features.
    """

    knn_accuracy: float
    probe: LinearProbe
    feature_rank: float
    spectrum: Spectrum
    uniformity: float
    alignment: float | None
    lengths: ResultantLengthCheck | None
    knn_correct: NDArray[np.bool_]
    uncertainty: FloatArray | None
    quartiles: FloatArray | None
    wrong_auroc: Estimate | None
    corrupted: CorruptionScores | None
    ood: Mapping[str, Estimate] = field(default_factory=dict)
    ood_distance: Mapping[str, Estimate] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """All scores as numbers with flat names, for a file; what there is not is left out.

        Returns:
            Numbers by name.
        """
        found: dict[str, float | None] = {
            "knn": self.knn_accuracy,
            "linear": self.probe.accuracy,
            "information": self.probe.information,
            "label_entropy": self.probe.label_entropy,
            "feature_rank": self.feature_rank,
            "latent_rank": self.spectrum.effective_rank,
            "latent_dim": self.spectrum.dim,
            "spread": self.spectrum.spread,
            "uniformity": self.uniformity,
            "alignment": self.alignment,
        }
        if self.uncertainty is not None and self.quartiles is not None:
            found["uncertainty"] = float(self.uncertainty.mean())
            found |= {f"quartile_{i}": value for i, value in enumerate(self.quartiles, start=1)}
        found |= _estimate("wrong_auroc", self.wrong_auroc)
        if self.lengths is not None:
            for name in ("predicted", "realised"):
                values = getattr(self.lengths, name)
                found |= {f"length_{name}_{i}": value for i, value in enumerate(values, start=1)}
        if self.corrupted is not None:
            for name in ("accuracy", "uncertainty", "auroc"):
                for kind, row in zip(self.corrupted.kinds, getattr(self.corrupted, name), strict=True):
                    found |= {f"{kind}_{name}_{i}": value for i, value in enumerate(row, start=1)}
            found |= _estimate("corrupted_wrong_auroc", self.corrupted.wrong_auroc)
        for name, value in self.ood.items():
            found |= _estimate(f"ood_{name}", value)
        for name, value in self.ood_distance.items():
            found |= _estimate(f"distance_{name}", value)
        return {name: float(value) for name, value in found.items() if value is not None and not math.isnan(value)}

    def summary(self) -> str:
        """The scores as a few lines of text.

        Returns:
            Text without a newline at its end.
        """
        lines = [
            f"nearest neighbours {self.knn_accuracy:.3f}, linear probe {self.probe.accuracy:.3f}",
            f"information about labels: {self.probe.information:.2f} of {self.probe.label_entropy:.2f} nats, or more",
            f"effective rank: features {self.feature_rank:.1f}, latents {self.spectrum.effective_rank:.1f} of "
            f"{self.spectrum.dim}",
            f"uniformity {self.uniformity:.2f}"
            + ("" if self.alignment is None else f", alignment of views {self.alignment:.2f}"),
        ]
        corrupted = self.corrupted
        if corrupted is not None:
            lines.append(f"accuracy by severity of corruption, 1 to 5: {_row(corrupted.accuracy.mean(axis=0))}")
        for name, away in self.ood_distance.items():
            lines.append(f"AUROC of the distance to the training images for strangers ({name}): {away.value:.3f} "
                         f"({away.lower:.3f} to {away.upper:.3f})")  # fmt: skip
        if self.uncertainty is None or self.quartiles is None:
            return "\n".join([*lines, "points: there is no width to judge"])
        lines.append(f"mean uncertainty {self.uncertainty.mean():.3f}; accuracy by quartile, surest first: "
                     f"{_row(self.quartiles)}")  # fmt: skip
        for about, value in (
            ("wrong answers", self.wrong_auroc),
            ("wrong answers, corrupted", corrupted.wrong_auroc if corrupted else None),
            *((f"strangers ({name})", value) for name, value in self.ood.items()),
        ):
            if value is not None:
                lines.append(f"AUROC of the uncertainty for {about}: {value.value:.3f} "
                             f"({value.lower:.3f} to {value.upper:.3f})")  # fmt: skip
        if corrupted is not None:
            lines.append(f"AUROC for corrupted images by severity: {_row(corrupted.auroc.mean(axis=0))}")
        if self.lengths is not None:
            lines.append(f"resultant length by quartile: predicted {_row(self.lengths.predicted)}, realised "
                         f"{_row(self.lengths.realised)}")  # fmt: skip
        return "\n".join(lines)


def evaluate_representation(
    guide: Any,
    train: Images,
    test: Images,
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor | tuple[Tensor, ...]] | None = None,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    num_corrupted: int = 2_000,
    ood: Mapping[str, Tensor] | None = None,
    pair_concentration: float = math.inf,
    k: int = 5,
    batch_size: int = 512,
    seed: int = 0,
) -> RepresentationScores:
    """Judge a representation of labelled images: features, latents, widths.

    Labels are used here only. Answers (neighbours, linear probe) come from the *features*, as is usual; the widths are
    those of the guide's posteriors, as one minus the mean resultant length, which compares between families. The
    caller's modules and random state are left as they were.

    Args:
        guide: A fitted guide with ``posterior(x)``, or any function from images to embeddings ``(N, D)``, which then
            are the features and, scaled to length one, the latents; it has no widths.
        train: Images and labels that neighbours and probe learn from: ``(M, C, H, W)``, uint8 or floats in ``[0, 1]``,
            and integers ``(M,)``. The guide gets floats.
        test: Images and labels to judge, of the same kind.
        features: Module or function from images to features ``(N, D)``, for instance the encoder without its
            projection. Default: ``guide.encoder``.
        augment: The augmentation of training, as `ViewLoader` takes it, for `alignment` and `lengths`.
        corruptions: Kinds of `data.degrade`; none to leave them out.
        num_corrupted: Test images per kind and severity, from the first on.
        ood: Images that show something else, by name, each at least two.
        pair_concentration: Concentration between the latents of two views that the model states, > 0; infinite if they
            share one.
        k: Neighbours.
        batch_size: Images per pass.
        seed: Seed of views and corruptions.

    Returns:
        The scores.

    Raises:
        TypeError: If `guide` is neither.
        ValueError: If images and labels do not fit, or an option is out of its range.

    Example:
        >>> images, labels = torch.rand(60, 1, 8, 8), torch.arange(60) % 3
        >>> scores = evaluate_representation(lambda x: x.flatten(1)[:, :9], (images, labels), (images, labels), k=1)
        >>> scores.knn_accuracy, scores.uncertainty is None
        (1.0, True)
    """
    if not (hasattr(guide, "posterior") or callable(guide)):
        raise TypeError(f"`guide` must have `posterior(x)` or be a function of images, got {type(guide).__name__}")
    for name, (images, labels) in (("train", train), ("test", test)):
        if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images):
            raise ValueError(
                f"`{name}` must be images (N, C, H, W) with labels (N,), N >= 1, got {tuple(images.shape)} and "
                f"{tuple(labels.shape)}"
            )
    for option, value in (("num_corrupted", num_corrupted), ("batch_size", batch_size)):
        if value < 2:
            raise ValueError(f"`{option}` must be >= 2, got {value!r}")
    if not pair_concentration > 0:
        raise ValueError(f"`pair_concentration` must be > 0, got {pair_concentration!r}")
    programs = [part for part in (guide, features) if callable(part)]
    with evaluation(*programs, seed=derived_seed(seed, "representation")) as device:
        encode = _Encoder(guide, features, batch_size, device)
        bank, clean = encode(train[0]), encode(test[0])
        right = knn_correct(bank.features, train[1], clean.features, test[1], k=k)
        views = encode.pairs(test[0], augment, seed) if augment is not None else None
        corrupted = None
        if corruptions:
            corrupted = _corrupted(encode, bank, train[1], test, clean, tuple(corruptions), num_corrupted, k, seed)
        strange = {name: encode(images) for name, images in (ood or {}).items()}
    by_width, by_distance = _strangers(bank, clean, strange, k)
    lengths = None
    if views is not None and clean.width is not None:
        lengths = _lengths(*views, predicts=hasattr(guide, "branch"), pair_concentration=pair_concentration)
    return RepresentationScores(
        knn_accuracy=float(right.mean()),
        probe=linear_probe(bank.features, train[1], clean.features, test[1]),
        feature_rank=_feature_rank(clean.features),
        spectrum=embedding_spectrum(clean.points),
        uniformity=uniformity_loss(clean.points),
        alignment=None if views is None else alignment_loss(views[0].points, views[1].points),
        lengths=lengths,
        knn_correct=right,
        uncertainty=clean.width,
        quartiles=None if clean.width is None or len(right) < 4 else accuracy_by_quartile(-clean.width, right),
        wrong_auroc=_wrong_auroc(clean.width, right),
        corrupted=corrupted,
        ood=by_width,
        ood_distance=by_distance,
    )


class _Encoded(NamedTuple):
    """What a set of images is mapped to; `points` are the latents' directions, or where a Siamese guide puts them."""

    features: FloatArray
    points: FloatArray
    directions: FloatArray
    width: FloatArray | None  # one minus the resultant length


class _Encoder:
    """Passes of a guide, or of a function, over images, batch by batch."""

    def __init__(self, guide: Any, features: Any, batch_size: int, device: torch.device) -> None:
        self.guide, self.batch_size, self.device = guide, batch_size, device
        self.features = features or (guide.encoder if hasattr(guide, "posterior") else guide)

    def __call__(self, images: Tensor) -> _Encoded:
        return self._joined([self._encode(batch) for batch in images.split(self.batch_size)])

    def pairs(self, images: Tensor, augment: Any, seed: int) -> tuple[_Encoded, _Encoded]:
        """Two views of every image."""
        loader = ViewLoader(images, augment, batch_size=min(self.batch_size, len(images)), shuffle=False,
                            drop_last=False, seed=derived_seed(seed, "views")).to(self.device)  # fmt: skip
        first, second = zip(*([self._encode(x) for x in views] for views in loader), strict=True)
        return self._joined(first), self._joined(second)

    def _encode(self, x: Tensor) -> _Encoded:
        x = x.to(self.device)
        x = x.float() / 255.0 if x.dtype == torch.uint8 else x
        found = as_array(self.features(x))
        if not hasattr(self.guide, "posterior"):
            points = nn.functional.normalize(torch.from_numpy(found), dim=-1).numpy()
            return _Encoded(found, points, points, None)
        if hasattr(self.guide, "branch"):
            branch = self.guide.branch(x)
            posterior, points = branch.prediction, as_array(branch.point)
            directions = as_array(posterior.mean_direction)
        else:
            posterior = self.guide.posterior(x)
            if isinstance(posterior, Delta):
                points = as_array(posterior.mean)
                return _Encoded(found, points, points, None)
            direction = getattr(posterior, "mean_direction", None)
            points = directions = (
                direction_and_concentration(posterior)[0] if direction is None else as_array(direction)
            )
        return _Encoded(found, points, directions, uncertainty(posterior))

    @staticmethod
    def _joined(parts: Sequence[_Encoded]) -> _Encoded:
        columns: list[Any] = [None if part[0] is None else np.concatenate(part) for part in zip(*parts, strict=True)]
        return _Encoded(*columns)


def _corrupted(
    encode: _Encoder,
    bank: _Encoded,
    bank_labels: Tensor,
    test: Images,
    clean: _Encoded,
    kinds: tuple[str, ...],
    num: int,
    k: int,
    seed: int,
) -> CorruptionScores:
    images, labels = test[0][:num], test[1][:num]
    shape = len(kinds), NUM_SEVERITIES
    accuracy, mean, auroc = np.empty(shape), np.full(shape, np.nan), np.full(shape, np.nan)
    widths, answers = [], []
    for row, kind in enumerate(kinds):
        for column in range(NUM_SEVERITIES):
            law = encode(degrade(images, kind, column + 1, seed=derived_seed(seed, "corruption")))
            right = knn_correct(bank.features, bank_labels, law.features, labels, k=k)
            accuracy[row, column] = right.mean()
            if law.width is not None:
                mean[row, column] = law.width.mean()
                auroc[row, column] = ood_auroc(-_known(clean.width), -law.width).value
                widths.append(law.width)
                answers.append(right)
    wrong = _wrong_auroc(np.concatenate(widths), np.concatenate(answers)) if widths else None
    return CorruptionScores(kinds, accuracy, mean, auroc, wrong, len(images))


def _lengths(first: _Encoded, second: _Encoded, *, predicts: bool, pair_concentration: float) -> ResultantLengthCheck:
    length = 1.0 - _known(first.width)
    if not predicts:
        dim = torch.tensor(pair_concentration, dtype=torch.float64)
        pair = 1.0 if math.isinf(pair_concentration) else float(bessel_ratio(first.points.shape[1], dim))
        length = length * (1.0 - _known(second.width)) * pair
    law = SimpleNamespace(mean_direction=first.directions, mean=first.directions * length[:, None])
    return resultant_length_check(law, second.points, num_groups=4 if len(length) >= 8 else 1)


def _strangers(
    bank: _Encoded, clean: _Encoded, strange: Mapping[str, _Encoded], k: int
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """By set: are strangers less sure, and are they farther away?"""
    if not strange:
        return {}, {}
    sure, near = clean.width, -neighbour_distance(bank.features, clean.features, k=k)
    by_width = {name: ood_auroc(-sure, -_known(found.width)) for name, found in strange.items() if sure is not None}
    away = {name: -neighbour_distance(bank.features, found.features, k=k) for name, found in strange.items()}
    return by_width, {name: ood_auroc(near, distance) for name, distance in away.items()}


def _wrong_auroc(width: FloatArray | None, right: NDArray[np.bool_]) -> Estimate | None:
    if width is None or min(right.sum(), (~right).sum()) < 2:
        return None
    return ood_auroc(-width[right], -width[~right])


def _feature_rank(features: FloatArray) -> float:
    if len(features) <= features.shape[1]:
        return math.nan
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return embedding_spectrum((features / np.maximum(length, 1e-12))[length[:, 0] > 0]).effective_rank


def _known(width: FloatArray | None) -> FloatArray:
    assert width is not None  # asked for only where the guide has widths
    return width


def _estimate(name: str, value: Estimate | None) -> dict[str, float | None]:
    return {} if value is None else {name: value.value, f"{name}_lower": value.lower, f"{name}_upper": value.upper}


def _row(values: FloatArray) -> str:
    return " ".join(f"{value:.3f}" for value in values)
