"""Property tests draw the same examples every time and have no deadline: machines are slow and shared."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("masters", deadline=None, derandomize=True)
settings.load_profile("masters")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: threads would wait for each other, and longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
