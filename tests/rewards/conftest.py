"""Property tests draw the same examples every time and have no deadline: machines are slow and shared."""

from hypothesis import settings

settings.register_profile("masters", deadline=None, derandomize=True)
settings.load_profile("masters")
