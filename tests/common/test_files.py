"""Messages name the folder of a relative path, and folders that cannot be written are refused."""

from pathlib import Path

import pytest

from masters.common.errors import InputError
from masters.common.files import check_writable, describe_place
from masters.common.machine import cache_folder


def test_a_relative_path_is_named_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert describe_place("a/b") == f"a/b in the folder {tmp_path}"
    assert describe_place(tmp_path / "a") == str(tmp_path / "a")


@pytest.mark.parametrize("place", ["/proc/none/x", "/dev/null/x", "/proc"])
def test_a_folder_that_cannot_be_written_is_refused_with_the_remedy(place: str) -> None:
    with pytest.raises(InputError, match=f"^{place}, the folder for notes, cannot be written .*: set HOME$"):
        check_writable(Path(place), "notes", "set HOME")


def test_a_writable_folder_is_created_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a/b", "notes", "set HOME")
    assert list((tmp_path / "a/b").iterdir()) == []


def test_the_cache_folder_has_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/masters"
    monkeypatch.setenv("MASTERS_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("MASTERS_CACHE", "~/other cache")  # as a service's environment file has it: no shell expands it
    assert cache_folder() == tmp_path / "other cache"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTERS_CACHE", "relative")
    assert cache_folder() == tmp_path / "relative"


def test_a_user_without_a_home_folder_is_told_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_no_user(_: int) -> None:
        raise KeyError("a user id without an entry")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", find_no_user)
    for cache in ("", "~/cache", "~nobody-here/cache"):
        monkeypatch.setenv("MASTERS_CACHE", cache)
        with pytest.raises(InputError, match="no home folder: set HOME or MASTERS_CACHE to a folder"):
            cache_folder()
