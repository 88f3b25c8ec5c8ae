"""Fixtures that several suites share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import ray_cluster as ray
from tests.s3 import S3, serve

# the same examples every time and no deadline: machines are slow and shared
settings.register_profile("masters", deadline=None, derandomize=True)
settings.load_profile("masters")

# vLLM looks at a model class in a process of 16 s of CPU once a cache folder: all homes share one
os.environ.setdefault("VLLM_CACHE_ROOT", str(Path(__file__).parents[1] / ".venv/vllm"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server, started when first asked for."""
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[ray.Cluster]:
    """A Ray cluster of one node, started when first asked for."""
    with tempfile.TemporaryDirectory(prefix="r-") as folder, ray.serve(Path(folder)) as cluster:
        yield cluster
