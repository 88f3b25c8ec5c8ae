"""Fixtures that several suites share."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from masters.infra.local_prefect import PrefectApi
from masters.infra.ports import free_ports
from tests import fork_server
from tests import ray_cluster as ray
from tests.command_line import environment
from tests.s3_server import S3, serve

# the same examples every time and no deadline: machines are slow and shared
settings.register_profile("masters", deadline=None, derandomize=True)
settings.load_profile("masters")

pytest_plugins = ["tests.suite_options"]
# vLLM looks at a model class in a process of 16 s of CPU once a cache folder: all homes share one
os.environ.setdefault("VLLM_CACHE_ROOT", str(Path(__file__).parents[1] / ".venv/vllm"))


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        fork_server.open_session()


def pytest_unconfigure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        fork_server.close_session()


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


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables of runs that share a server: to start one of its own takes a run 15 s of CPU."""
    home, [port] = tmp_path_factory.mktemp("prefect"), free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "masters.infra.prefect_server", str(port), str(os.getpid())]
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(command, env=environment(home), stdout=log, stderr=log)
    try:
        PrefectApi(url).wait_until_ready()
        yield {"PREFECT_API_URL": url}
    finally:
        server.terminate()
        server.wait()
