"""Losses between teacher and student, and on rewarded responses."""

from masters.models.losses.formulas import jensen_shannon

__all__ = ["jensen_shannon"]
