"""The default Prefect server: on loopback, ended with this process, with its history in ~/.prefect.

Prefect's own ephemeral server outlives a killed parent; this one does not. A server that PREFECT_API_URL or the Prefect
profile names is used instead.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from masters.common.errors import MastersError
from masters.infra.ports import free_ports

START_SECONDS = 120


@contextmanager
def prefect_api() -> Iterator[str]:
    """Yield the URL of a Prefect API and set PREFECT_API_URL to it; to be entered before Prefect is imported."""
    configured = os.environ.get("PREFECT_API_URL") or _profile_url()
    if configured:
        yield configured
        return
    log = Path(tempfile.mkdtemp(prefix="masters-prefect-")) / "server.log"
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    os.environ["PREFECT_API_URL"] = url
    server = _start(port, log)
    try:
        yield url
    finally:
        _send_logs()
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        del os.environ["PREFECT_API_URL"]
        log.unlink()
        log.parent.rmdir()


def wait_until_ready(url: str) -> None:
    """Wait until the server answers. Raises MastersError if it does not within `START_SECONDS`."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urlopen(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise MastersError(f"the Prefect server at {url} did not answer within {START_SECONDS} s")


def _profile_url() -> str | None:
    """Return the API URL of the user's Prefect profile, read without importing Prefect."""
    import tomllib

    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    path = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    try:
        profiles = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return None
    active = os.environ.get("PREFECT_PROFILE", profiles.get("active", ""))
    return profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")


def _start(port: int, log: Path) -> subprocess.Popen:
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "masters.infra.prefect_server", str(port), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # on Ctrl-C it must outlive the flow, which reports its end
        )


def _send_logs() -> None:
    """Send the last log records while the server runs. Otherwise Prefect would try to for a minute at exit."""
    if "prefect.logging.handlers" in sys.modules:
        from prefect.logging.handlers import APILogHandler

        APILogHandler().flush()
