"""The mask schedule under its public name; the code is in `masters.config.mask_schedule`."""

from masters.config.mask_schedule import mask_ratio

__all__ = ["mask_ratio"]
