"""How a run is built from the names of a method, a guide and a kind of data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pyro_contrastive import nets
from pyro_contrastive.choices import CLOSED_FORMS, DATA, EVIDENCES, GUIDES, METHODS
from pyro_contrastive.data import FolderImages, SphereWorld, ViewLoader, corrupt, load_digits, shift_and_dropout
from pyro_contrastive.encoding import check_encoding
from pyro_contrastive.ops.random import derived_seed, seeded
from pyro_contrastive.validation import Validation, held_out_loss

__all__ = ["Run", "RunConfig"]


def _one_of(name: str, value: str, valid: Iterable[str]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; choose one of: {', '.join(valid)}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that identifies a run; kept as ``config.json`` in its folder.

    Args:
        method: A key of ``METHODS``.
        data: A key of ``DATA``.
        guide: A key of ``GUIDES``. None: what suits the method.
        evidence: A key of ``EVIDENCES``; only MCInfoNCE has a choice. None: what suits the data and ``concentration``.
        concentration: Of the latents of a pair: assumed by MCInfoNCE, the start value in RPM, the inverse temperature
            of SimCLR. None: what suits the evidence (infinite for ``exact``, else 20) or the method.
        dim: Dimension of the sphere's ambient space, ``>= 2``. None, here and below: what suits the data.
        steps: Optimiser steps.
        lr: Learning rate of Adam.
        batch_size: Pairs per batch.
        seed: Seed of initial weights, views and training.
        precision: Of the encoder, as in ``fit``.
        ema: Decay of averaged weights, in ``(0, 1)``, which are then what is judged. None: no average.
        patience: Validations on pairs that are not fitted (of the digits every fifth image is kept back) that may pass
            without a better loss, ``>= 1``; the best weights are judged. None: no validation.

    Raises:
        ValueError: If a name is unknown (the message lists the valid ones) or a number out of range.

    Example:
        >>> RunConfig(method="mcinfonce", data="digits").concentration
        inf
    """

    method: str = "mcinfonce"
    data: str = "digits"
    guide: str | None = None
    evidence: str | None = None
    concentration: float | None = None
    dim: int | None = None
    steps: int | None = None
    lr: float | None = None
    batch_size: int = 256
    seed: int = 0
    precision: str = "float32"
    ema: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("data", self.data, DATA)
        method, defaults = METHODS[self.method], DATA[self.data]
        if method.labels and not defaults.labels:
            have = ", ".join(name for name, about in DATA.items() if about.labels)
            raise ValueError(f"{self.method} needs class labels, and {self.data} has none; use one of: {have}")
        guide = method.guides[0] if self.guide is None else self.guide
        _one_of("guide", guide, GUIDES)
        if guide not in method.guides:
            raise ValueError(
                f"{self.method} needs {method.needs}, got guide {guide!r}; use one of: {', '.join(method.guides)}"
            )
        evidence, concentration = self.evidence, self.concentration
        if self.method != "mcinfonce":
            if evidence is not None:
                raise ValueError(
                    f"`evidence` is a choice of mcinfonce only, got {evidence!r} for {self.method}; leave it out"
                )
            if concentration is not None and method.concentration is None:
                raise ValueError(f"`concentration` is no choice of {self.method}, got {concentration!r}; leave it out")
            concentration = method.concentration if concentration is None else concentration
        else:
            if evidence is None:
                evidence = {"vmf": "exact", "delta": "elbo"}.get(guide, "k_sample")
            _one_of("evidence", evidence, EVIDENCES)
            if evidence in CLOSED_FORMS and guide != "vmf":
                raise ValueError(
                    f"evidence {evidence!r} is a closed form of guide 'vmf', got guide {guide!r}; use k_sample or elbo"
                )
            if concentration is None:
                concentration = defaults.concentration if evidence == "exact" else 20.0
        filled = {
            "guide": guide,
            "evidence": evidence,
            "concentration": concentration,
            "dim": defaults.dim if self.dim is None else self.dim,
            "steps": defaults.steps if self.steps is None else self.steps,
            "lr": defaults.lr if self.lr is None else self.lr,
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        for name, least in (("dim", 2), ("steps", 1), ("batch_size", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)!r}")
        check_encoding(None, self.precision)
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"`ema` must lie in (0, 1), the decay of the average, got {self.ema!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"`patience` must be >= 1 validation, got {self.patience!r}")
        for name in ("lr", "concentration"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be > 0, got {getattr(self, name)!r}")

    def as_dict(self) -> dict[str, Any]:
        """Give the settings as JSON values; an infinite number becomes the string ``"inf"``.

        What concerns the training only is left out at its default.
        """
        optional = {"precision": "float32", "ema": None, "patience": None}
        settings = {k: v for k, v in asdict(self).items() if k not in optional or v != optional[k]}
        return {k: "inf" if v == math.inf else v for k, v in settings.items()}

    def save(self, folder: str | Path) -> None:
        """Write ``config.json``.

        Args:
            folder: Folder of the run, made when missing.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RunConfig:
        """Read ``config.json``.

        Args:
            folder: Folder of the run.

        Returns:
            The configuration.

        Raises:
            FileNotFoundError: If the folder holds none.
            ValueError: If the file is not a configuration.
        """
        path = Path(folder) / "config.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            values: dict[str, Any] = {k: math.inf if v == "inf" else v for k, v in found.items()}
            return cls(**values)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder} holds no run (no config.json); make one with `pyro-contrastive fit --out {folder}`"
            ) from None
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not the configuration of a run: {error}") from error


class Run:
    """A model/guide pair with its data, built from a configuration; the same one gives the same weights.

    Args:
        config: What to build.

    Raises:
        ValueError: If the parts do not go together, e.g. a closed-form evidence with a guide that has none.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        assert config.dim is not None and config.guide is not None
        method = METHODS[config.method]
        with seeded(config.seed):
            digits = config.data == "digits"
            encoder = nets.mlp([64 if digits else self.world().observed_dim, 128, 128], batch_norm=digits)
            self.guide = GUIDES[config.guide][0](encoder, config.dim, **method.options)
            self.model = method.build(self.guide, config)

    @property
    def num_views(self) -> int:
        """Entries of a batch that model and guide take: two views, and the labels where the method wants them."""
        return 2 + METHODS[self.config.method].labels

    def world(self) -> SphereWorld:
        """Build the world of a ``sphere`` run: its pairs are related as MCInfoNCE assumes (kappa 20 for the others)."""
        config = self.config
        assert config.dim is not None
        pair_concentration = 20.0
        if config.method == "mcinfonce":
            assert config.concentration is not None
            pair_concentration = config.concentration
        return SphereWorld(config.dim, pair_concentration=pair_concentration)

    def batches(self, device: torch.device) -> Iterable[tuple[torch.Tensor, ...]]:
        """Give the training views.

        Args:
            device: Where they are made.

        Returns:
            A loader whose batches start with ``(x1, x2)``, or ``(x1, x2, labels)``.
        """
        if self.config.data == "sphere":
            return self.world().to(device).batches(self.config.batch_size, seed=self.config.seed)
        images, labels = load_digits("train")
        if self.config.patience is not None:
            kept = torch.arange(len(images)) % 5 != 0
            images, labels = images[kept], labels[kept]
        return self._loader(images, labels, self.config.batch_size, self.config.seed).to(device)

    def _loader(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int) -> ViewLoader:
        given = labels if METHODS[self.config.method].labels else None
        return ViewLoader(images, shift_and_dropout, labels=given, batch_size=batch_size, seed=seed)

    def images(self, folder: str | Path, **options: Any) -> FolderImages:
        """Give the images below a folder as this run's encoder takes them.

        Args:
            folder: Searched with all folders below it.
            **options: Of :class:`~pyro_contrastive.data.FolderImages`.

        Returns:
            Batches ``(ids, images)``.

        Raises:
            ValueError: For a run on data that are no images.
        """
        if self.config.data != "digits":
            raise ValueError(
                f"a run on {self.config.data!r} takes no images; fit one on digits, or use embedding.embed"
            )
        return FolderImages(folder, size=8, channels=1, transform=lambda pixels: pixels / 255.0, **options)

    def validation(self, device: torch.device) -> Validation | None:
        """Give the validation on pairs that :meth:`batches` does not hold, if there is to be one.

        Args:
            device: Where they are made.
        """
        config = self.config
        if config.patience is None:
            return None
        assert config.steps is not None
        seed = derived_seed(config.seed, 1)
        if config.data == "sphere":
            batches = list(islice(iter(self.world().to(device).batches(config.batch_size, seed=seed)), 8))
        else:
            images, labels = (part[::5] for part in load_digits("train"))
            loader = self._loader(images, labels, min(config.batch_size, len(images)), seed).to(device)
            batches = [batch for _ in range(8) for batch in loader]
        every = max(1, config.steps // 50)
        metrics = held_out_loss(batches, num_views=self.num_views)
        return Validation(metrics, every, monitor="loss", patience=config.patience, use_ema=config.ema is not None)

    def report(self, out: str | Path, *, level: float = 0.01) -> Any:
        """Evaluate on fresh or held-out data, judge, and write pictures and ``posterior.nc``.

        Args:
            out: Folder of the run; its ``history.json`` is judged as well, where there is one.
            level: Chance of any false alarm of the tests; divide it by the number of runs on a page.

        Returns:
            A section for :func:`pyro_contrastive.diagnostics.write_html`.
        """
        from pyro_contrastive import diagnostics

        path = Path(out) / "history.json"
        history = json.loads(path.read_text()) if path.exists() else None
        options: dict[str, Any] = {
            "seed": self.config.seed,
            "history": history,
            "batch_size": self.config.batch_size,
            "level": level,
        }
        if self.config.data == "sphere":
            return diagnostics.sphere_report(self.model, self.guide, self.world(), out, **options)
        test, train = load_digits("test"), load_digits("train")
        options["supervised"] = METHODS[self.config.method].labels
        return diagnostics.image_report(self.model, self.guide, *test, *train, corrupt, out, **options)
