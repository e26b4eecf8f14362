"""Worlds whose posterior is known, two-view wrappers, and images that ship with a dependency."""

from __future__ import annotations

from .digits import corrupt, load_digits, shift_and_dropout
from .nonuniform_world import AcceptanceWorld
from .sphere_world import SphereBatch, SphereWorld
from .views import TwoViews, ViewLoader

__all__ = [
    "AcceptanceWorld",
    "SphereBatch",
    "SphereWorld",
    "TwoViews",
    "ViewLoader",
    "corrupt",
    "load_digits",
    "shift_and_dropout",
]
