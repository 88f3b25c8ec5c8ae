"""The default Prefect server: on loopback, ended with this process, with its history in ~/.prefect.

Prefect's own ephemeral server outlives a killed parent; this one does not. A server that PREFECT_API_URL or the Prefect
profile names is used instead.
"""

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from masters.common import disk_space
from masters.common.errors import MastersError, StoreError
from masters.common.files import check_writable
from masters.common.log_errors import find_error
from masters.common.machine import user_folder
from masters.infra.api import is_responding
from masters.infra.ports import free_ports
from masters.infra.service import wait_for

START_SECONDS = 120
PREFECT_HOME = "PREFECT_HOME"  # environment variable


@dataclass(frozen=True)
class PrefectApi:
    """A Prefect API and, if this process started it, its server with the server's log."""

    url: str
    server: subprocess.Popen | None = None
    log: Path | None = None

    def wait_until_ready(self) -> None:
        """Wait until the server answers. Raises MastersError if it ends, or does not answer in `START_SECONDS`."""
        if not wait_for(self._is_ready, START_SECONDS):
            raise MastersError(f"the Prefect server at {self.url} did not answer within {START_SECONDS} s")

    def _is_ready(self) -> bool:
        if self.server and self.log and self.server.poll() is not None:
            reason = find_error(self.log.read_text(errors="replace"))
            raise MastersError(f"the Prefect server with its database in {_prefect_home()} ended: {reason}")
        return is_responding(f"{self.url}/health")

    def check_disk(self) -> None:
        """Raise StoreError if the server's database found no space: requests then fail in many ways."""
        if self.log and disk_space.TEXTS.search(self.log.read_text(errors="replace")):
            raise StoreError(f"Prefect's database in {_prefect_home()}: {os.strerror(errno.ENOSPC)}")


@contextmanager
def prefect_api() -> Iterator[PrefectApi]:
    """Yield a Prefect API and set PREFECT_API_URL to it; to be entered before Prefect is imported."""
    check_home()
    if configured := _configured_url():
        yield PrefectApi(configured)
        return
    log = Path(tempfile.mkdtemp(prefix="masters-prefect-")) / "server.log"
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    os.environ["PREFECT_API_URL"] = url
    server = _start(port, log)
    api = PrefectApi(url, server, log)
    try:
        yield api
    except MastersError:
        raise
    except Exception:
        api.check_disk()
        raise
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


def check_home() -> None:
    """Raise InputError if a server of our own is needed and the folder of its database cannot be written."""
    if not _configured_url():
        check_writable(_prefect_home(), "Prefect's history", f"set {PREFECT_HOME} or HOME to another folder")


def _configured_url() -> str | None:
    return os.environ.get("PREFECT_API_URL") or _profile_url()


def _profile_url() -> str | None:
    """Return the API URL of the user's Prefect profile, read without importing Prefect."""
    import tomllib

    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or _prefect_home() / "profiles.toml")
    try:
        profiles = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return None
    active = os.environ.get("PREFECT_PROFILE", profiles.get("active", ""))
    return profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")


def _prefect_home() -> Path:
    """Return the folder of Prefect's database, PREFECT_HOME, else ~/.prefect."""
    return user_folder(PREFECT_HOME, ".prefect")


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
