"""The mask schedule under the name that scripts import it by; it is in `masters.config.mask_schedule`."""

from masters.config.mask_schedule import mask_ratio

__all__ = ["mask_ratio"]
