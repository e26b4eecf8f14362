"""What the command line can choose among: methods, guides, kinds of data, evidences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pyro_contrastive import guides, models

__all__ = ["CLOSED_FORMS", "DATA", "EVIDENCES", "GUIDES", "METHODS", "DataDefaults", "Method"]

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
    "siamese": (guides.Siamese, "a point, and a power spherical prediction of the other view's point"),
}
STOCHASTIC = ("vmf", "power_spherical", "projected_normal")


@dataclass(frozen=True)
class Method:
    """What a name on the command line stands for.

    Attributes:
        about: A line for ``list``.
        paper: arXiv number.
        build: Makes the model from the guide and the run's configuration.
        guides: Keys of ``GUIDES`` that go with it, the default first.
        needs: What these have in common, for the message.
        concentration: Of the kernel at the start; None: the method has no such number, or finds its own default.
        options: Of the guide.
        labels: The model takes class labels after the views.
    """

    about: str
    paper: str
    build: Callable[[Any, Any], nn.Module]
    guides: tuple[str, ...]
    needs: str
    concentration: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: bool = False


@dataclass(frozen=True)
class DataDefaults:
    """Settings known to work for one kind of data, and whether it has class labels."""

    about: str
    dim: int
    steps: int
    lr: float
    concentration: float
    labels: bool = False


DATA = {
    "digits": DataDefaults(
        "1,797 handwritten digits, 8 x 8; views: shift and pixel dropout of known strength",
        16,
        1_500,
        1e-3,
        math.inf,
        labels=True,
    ),
    "sphere": DataDefaults("SphereWorld: artificial views whose exact posterior is known", 10, 3_000, 2e-3, 20.0),
}


METHODS = {
    "mcinfonce": Method(
        "InfoNCE over posteriors, concentration of the pairs assumed",
        "2302.02865",
        lambda guide, config: models.MCInfoNCE(guide, concentration=config.concentration, evidence=config.evidence),
        (*STOCHASTIC, "delta"),
        "any posterior or a point",
    ),
    "rpm": Method(
        "recognition-parametrised model, concentration of the pairs learned",
        "2209.05661",
        lambda guide, config: models.RPM(guide, concentration=config.concentration),
        STOCHASTIC,
        "a posterior with a density",
        10.0,
    ),
    "simclr": Method(
        "NT-Xent on points, temperature 1 / concentration",
        "2002.05709",
        lambda guide, config: models.SimCLR(guide, concentration=config.concentration),
        ("delta",),
        "a point",
        5.0,
    ),
    "vsimclr": Method(
        "SimCLR over posteriors with a weighted divergence from the uniform law",
        "2506.10159",
        lambda guide, config: models.VSimCLR(guide, concentration=config.concentration),
        ("projected_normal", "vmf", "power_spherical"),
        "a posterior with a density",
        5.0,
    ),
    "supcon": Method(
        "SimCLR with all items of a class as positives",
        "2004.11362",
        lambda guide, config: models.SupCon(guide, concentration=config.concentration),
        ("delta",),
        "a point",
        5.0,
        labels=True,
    ),
    "vsupcon": Method(
        "SupCon over posteriors, as VSimCLR",
        "2506.10159",
        lambda guide, config: models.VSupCon(guide, concentration=config.concentration),
        ("projected_normal", "vmf", "power_spherical"),
        "a posterior with a density",
        5.0,
        labels=True,
    ),
    "aninfonce": Method(
        "InfoNCE with a learned precision per axis, starting at half the concentration",
        "2407.00143",
        lambda guide, config: models.AnInfoNCE(guide, precision=config.concentration / 2),
        ("delta", *STOCHASTIC),
        "any posterior or a point",
        10.0,
    ),
    "simsiam": Method(
        "predictions of the other view's point, one fixed concentration",
        "2011.10566",
        lambda guide, config: models.SimSiam(guide),
        ("siamese",),
        "points and predictions",
        options={"width": "fixed", "density": "von_mises_fisher"},
    ),
    "vi_simsiam": Method(
        "predictions of the other view's point with a concentration per view",
        "2203.11437",
        lambda guide, config: models.VISimSiam(guide),
        ("siamese",),
        "points and predictions",
    ),
}
