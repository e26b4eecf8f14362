"""Worlds whose posterior is known, two-view wrappers, images that ship with a dependency, and CIFAR-10H."""

from __future__ import annotations

from .anisotropic_world import AnisotropicBatch, AnisotropicWorld, bimodal_precision, linear_precision
from .augment import JITTER_DRAWS, crop_and_rotate, crop_flip_jitter, crop_ladder, shift_and_flip
from .cifar10h import Cifar10H, Fold, SoftLabelPairs, five_folds, load_cifar10h, sample_partners
from .corruptions import CORRUPTIONS, NUM_SEVERITIES, degrade
from .digits import corrupt, load_digits, shift_and_dropout
from .images import IMAGE_SETS, load_images
from .moving_object import MovingObject, Video
from .nonuniform_world import AcceptanceWorld
from .pair_world import PairWorld
from .sphere_world import SphereBatch, SphereWorld
from .views import TwoViews, ViewLoader

__all__ = [
    "AcceptanceWorld",
    "AnisotropicBatch",
    "AnisotropicWorld",
    "CORRUPTIONS",
    "Cifar10H",
    "Fold",
    "IMAGE_SETS",
    "JITTER_DRAWS",
    "MovingObject",
    "NUM_SEVERITIES",
    "PairWorld",
    "SoftLabelPairs",
    "SphereBatch",
    "SphereWorld",
    "TwoViews",
    "Video",
    "ViewLoader",
    "bimodal_precision",
    "corrupt",
    "crop_and_rotate",
    "crop_flip_jitter",
    "crop_ladder",
    "degrade",
    "five_folds",
    "linear_precision",
    "load_cifar10h",
    "load_digits",
    "load_images",
    "sample_partners",
    "shift_and_dropout",
    "shift_and_flip",
]
