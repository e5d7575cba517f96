"""Warnings about what the user gave, at the user's own line."""

import sys
import warnings
from types import FrameType


def warn(message: str) -> None:
    """A UserWarning at the nearest line outside the kit, however deep in the kit it is noticed."""
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame and frame.f_globals.get("__name__", "").startswith("falcon_kit."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
