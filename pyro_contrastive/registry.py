"""Names of methods, guides and data, and how a run is built from them: what the command line knows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_contrastive import guides, models, nets
from pyro_contrastive.data import SphereWorld, ViewLoader, corrupt, load_digits, shift_and_dropout
from pyro_contrastive.ops.random import seeded

__all__ = ["DATA", "EVIDENCES", "GUIDES", "METHODS", "Run", "RunConfig"]

METHODS = {
    "mcinfonce": "InfoNCE over posteriors, concentration of the pairs assumed   https://arxiv.org/abs/2302.02865",
    "rpm": "recognition-parametrised model, concentration of the pairs learned   https://arxiv.org/abs/2209.05661",
}
EVIDENCES = {
    "exact": "no samples, no approximation; with concentration inf the views share one latent",
    "moment_matched": "no samples, approximate and faster, for a finite concentration of the pairs",
    "k_sample": "log of the mean over posterior samples; few samples favour too narrow posteriors",
    "elbo": "mean of the log over posterior samples",
}
CLOSED_FORMS = ("exact", "moment_matched")
GUIDES: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "vmf": (guides.VonMisesFisher, "von Mises-Fisher posterior: direction and concentration per view"),
    "power_spherical": (guides.PowerSpherical, "power spherical posterior: like vmf, lighter numerics"),
    "projected_normal": (guides.ProjectedNormal, "projected normal posterior, one scale per axis"),
    "delta": (guides.Delta, "a point: the deterministic encoder of SimCLR"),
}


@dataclass(frozen=True)
class DataDefaults:
    """Settings known to work for one kind of data."""

    about: str
    dim: int
    steps: int
    lr: float
    concentration: float


DATA = {
    "digits": DataDefaults(
        "1,797 handwritten digits, 8 x 8; views: shift and pixel dropout of known strength", 16, 1_500, 1e-3, math.inf
    ),
    "sphere": DataDefaults("SphereWorld: artificial views whose exact posterior is known", 10, 3_000, 2e-3, 20.0),
}


def _one_of(name: str, value: str, valid: Iterable[str]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; choose one of: {', '.join(valid)}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that identifies a run; kept as ``config.json`` in its folder.

    Args:
        method: A key of ``METHODS``.
        data: A key of ``DATA``.
        guide: A key of ``GUIDES``.
        evidence: A key of ``EVIDENCES``; only MCInfoNCE has a choice. None: what suits the data and ``concentration``.
        concentration: Of the latents of a pair: assumed by MCInfoNCE, the start value in RPM. None: what suits
            the evidence (infinite for ``exact``, else 20; 10 for RPM).
        dim: Dimension of the sphere's ambient space, ``>= 2``. None, here and below: what suits the data.
        steps: Optimiser steps.
        lr: Learning rate of Adam.
        batch_size: Pairs per batch.
        seed: Seed of initial weights, views and training.

    Raises:
        ValueError: If a name is unknown (the message lists the valid ones) or a number out of range.

    Example:
        >>> RunConfig(method="mcinfonce", data="digits").concentration
        inf
    """

    method: str = "mcinfonce"
    data: str = "digits"
    guide: str = "vmf"
    evidence: str | None = None
    concentration: float | None = None
    dim: int | None = None
    steps: int | None = None
    lr: float | None = None
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("data", self.data, DATA)
        _one_of("guide", self.guide, GUIDES)
        defaults = DATA[self.data]
        evidence, concentration = self.evidence, self.concentration
        if self.method == "rpm":
            if evidence is not None:
                raise ValueError(f"`evidence` is a choice of mcinfonce only, got {evidence!r} for rpm; leave it out")
            if self.guide == "delta":
                raise ValueError("rpm needs a posterior with a density, got guide 'delta'; use vmf or power_spherical")
            concentration = 10.0 if concentration is None else concentration
        else:
            if evidence is None:
                evidence = {"vmf": "exact", "delta": "elbo"}.get(self.guide, "k_sample")
            _one_of("evidence", evidence, EVIDENCES)
            if evidence in CLOSED_FORMS and self.guide != "vmf":
                raise ValueError(
                    f"evidence {evidence!r} is a closed form of guide 'vmf', got guide {self.guide!r}; "
                    "use k_sample or elbo"
                )
            if concentration is None:
                concentration = defaults.concentration if evidence == "exact" else 20.0
        filled = {
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
        for name in ("lr", "concentration"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be > 0, got {getattr(self, name)!r}")

    def as_dict(self) -> dict[str, Any]:
        """Give the settings as JSON values; an infinite number becomes the string ``"inf"``."""
        return {k: "inf" if v == math.inf else v for k, v in asdict(self).items()}

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
        assert config.dim is not None and config.concentration is not None
        with seeded(config.seed):
            digits = config.data == "digits"
            encoder = nets.mlp([64 if digits else self.world().observed_dim, 128, 128], batch_norm=digits)
            self.guide = GUIDES[config.guide][0](encoder, config.dim)
            if config.method == "rpm":
                self.model: nn.Module = models.RPM(self.guide, concentration=config.concentration)
            else:
                self.model = models.MCInfoNCE(self.guide, concentration=config.concentration, evidence=config.evidence)  # type: ignore[arg-type]

    def world(self) -> SphereWorld:
        """Build the world of a ``sphere`` run: its pairs are related as MCInfoNCE assumes (kappa 20 for RPM)."""
        config = self.config
        assert config.dim is not None and config.concentration is not None
        pair_concentration = config.concentration if config.method == "mcinfonce" else 20.0
        return SphereWorld(config.dim, pair_concentration=pair_concentration)

    def batches(self, device: torch.device) -> Iterable[tuple[torch.Tensor, ...]]:
        """Give the training views.

        Args:
            device: Where they are made.

        Returns:
            A loader whose batches start with ``(x1, x2)``.
        """
        if self.config.data == "sphere":
            return self.world().to(device).batches(self.config.batch_size, seed=self.config.seed)
        images, _ = load_digits("train")
        loader = ViewLoader(images, shift_and_dropout, batch_size=self.config.batch_size, seed=self.config.seed)
        return loader.to(device)

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
        return diagnostics.image_report(self.model, self.guide, *test, *train, corrupt, out, **options)
