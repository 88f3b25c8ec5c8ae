"""The source archive and the wheel hold every module, and the wheel is complete without links."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("flows", "tasks", "models", "rewards", "infra")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from the source archive, as an installer would."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def modules() -> set[str]:
    """Return every module of the checkout by its name in the package."""
    own = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/masters").glob("**/*.py")}
    rooms = {f"masters/{p.relative_to(ROOT).as_posix()}" for room in ROOMS for p in (ROOT / room).glob("**/*.py")}
    return {name for name in own | rooms if "__pycache__" not in name}


def test_the_wheel_holds_every_module(built: Path) -> None:
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert len(modules()) > 50
    assert modules() | {"masters/prefect.yaml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "demo/", "tasks/", "benchmarks/", "examples/"))]


def test_the_source_archive_holds_license_and_modules(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert {f"src/{name}" for name in modules()} - names == set()
