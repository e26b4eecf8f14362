"""The generative side of each method, one file per method."""

if __name__ == "models":
    raise ImportError("import pyro_contrastive.models, not the bare folder models")

from .aninfonce import AnInfoNCE
from .aninfonce_ensemble import AnInfoNCEEnsemble
from .discrete_rpm import DiscreteRPM
from .hedged_instance import HedgedInstance
from .mcinfonce import MCInfoNCE
from .rpm import RPM
from .simclr import SimCLR, SupCon
from .vcl import VSimCLR, VSupCon
from .vi_simsiam import SimSiam, VISimSiam

__all__ = [
    "AnInfoNCE",
    "AnInfoNCEEnsemble",
    "DiscreteRPM",
    "HedgedInstance",
    "MCInfoNCE",
    "RPM",
    "SimCLR",
    "SimSiam",
    "SupCon",
    "VISimSiam",
    "VSimCLR",
    "VSupCon",
]
