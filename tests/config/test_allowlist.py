"""Allow lists in the environment bound what a configuration may name; without them everything is allowed."""

from pathlib import Path

import pytest

from masters.common.errors import InputError
from masters.config import Config, allowlist
from masters.config.allowlist import Setting, absolute_root, check_allowed, check_config
from masters.config.loading import load
from masters.data.sources.files import ParquetSource
from masters.store.storage import open_storage
from masters.tracking.locations import tracking_uri

DEMO = Path(__file__).parents[2] / "configs" / "easyvqa.toml"


@pytest.fixture(autouse=True)
def no_allow_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in Setting:
        monkeypatch.delenv(setting, raising=False)


@pytest.fixture
def allowed_folder(tmp_path: Path) -> Path:
    """An allowed folder with links that lead out of it and one that stays inside."""
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    (tmp_path / "in/twice").symlink_to(tmp_path / "in/link")
    (tmp_path / "in/stays").symlink_to(tmp_path / "in/deep")
    (tmp_path / "also").symlink_to(tmp_path / "in")
    return tmp_path / "in"


def is_allowed(setting: Setting, value: str, entries: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv(setting, entries)
    try:
        allowlist.check_allowed(setting, "field", value) if setting != Setting.JUDGES else allowlist.check_judge(value)
    except InputError as refused:
        assert "\n" not in str(refused)
        return False
    return True


FOLDERS = [
    ("{in}", True), ("{in}/deep/new", True), ("{in}/./deep", True), ("{in}/stays", True), ("{top}/also/deep", True),
    ("file://{in}/deep", True), ("local://{in}/deep", True), ("sqlite:///{in}/mlflow.db", True),
    ("{in}/../out", False), ("{in}side", False), ("{top}", False), ("/", False), ("{in}/link", False),
    ("{in}/link/deep", False), ("{in}/twice", False), ("{in}/deep/../../out", False), ("file://{in}/../out", False),
    ("FILE://{top}/out", False), ("file:{top}/out", False), ("sqlite:///{top}/out/x.db", False), ("~", False),
    ("~/x", False), (".", False), ("../x", False), ("s3://bucket", False), ("memory://x", False),
    ("simplecache::file://{in}", False), ("org/name", False), ("\0", False), ("", False),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), FOLDERS)
def test_a_folder_below_an_allowed_folder_is_allowed(
    allowed_folder: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    path = value.replace("{in}", str(allowed_folder)).replace("{top}", str(allowed_folder.parent))
    assert is_allowed(Setting.STORES, path, f"/elsewhere, {allowed_folder}", monkeypatch) == expected


NAMES = [
    ("s3://lake/team", "s3://lake", True), ("s3://lake/team/x", "s3://lake/team/", True),
    ("s3a://lake/team", "s3://lake", True), ("s3://lake/team2", "s3://lake/team", False),
    ("s3://lake/team/../other", "s3://lake/team", False), ("s3://lake2", "s3://lake", False),
    ("s3://lake@evil/team", "s3://lake", False), ("org/name", "org/name", True), ("org/name", "org/*", True),
    ("org/name/more", "org/*", False), ("other/name", "org/*", False), ("organ/name", "org/*", False),
    ("org/..", "org/name", False), ("http://mlflow:5000", "http://mlflow:5000", True),
    ("https://mlflow:5000", "http://mlflow:5000", False), ("http://mlflow:50001", "http://mlflow:5000", False),
]  # fmt: skip


@pytest.mark.parametrize(("value", "entry", "expected"), NAMES)
def test_a_model_is_allowed_by_url_or_name(
    monkeypatch: pytest.MonkeyPatch, value: str, entry: str, expected: bool
) -> None:
    assert is_allowed(Setting.MODELS, value, entry, monkeypatch) == expected


HOSTS = [
    ("http://judge/v1", "judge", True), ("https://JUDGE:8000/v1", "judge", True),
    ("http://judge:1/v1", "judge:1", True),
    ("http://[::1]:8/v1", "[::1]:8", True), ("https://judge/v1", "https://judge", True),
    ("http://judge:2/v1", "judge:1", False), ("http://judge/v1", "judge:80", False),
    ("http://judge.evil/v1", "judge", False),
    ("http://evil/judge", "judge", False), ("http://judge/v1", "https://judge", False),
    ("https://judge/other", "https://judge/v1", False), ("http://169.254.169.254/v1", "judge", False),
]  # fmt: skip


@pytest.mark.parametrize(("value", "entry", "expected"), HOSTS)
def test_a_judge_is_allowed_by_its_host(
    monkeypatch: pytest.MonkeyPatch, value: str, entry: str, expected: bool
) -> None:
    assert is_allowed(Setting.JUDGES, value, entry, monkeypatch) == expected


@pytest.mark.parametrize("entry", ["judge:port", "judge:99999999"])
def test_an_entry_with_an_impossible_port_is_named(monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.setenv(Setting.JUDGES, entry)
    with pytest.raises(InputError, match=f"MASTERS_ALLOWED_JUDGES: expected host or host:port, found '{entry}'"):
        allowlist.check_judge("http://judge/v1")


def demo(*overrides: str) -> Config:
    return load(DEMO, list(overrides))


REFUSED = [
    (Setting.STORES, "store.root", "store.root=/elsewhere"),
    (Setting.DATA, "data.source", "data.source=/elsewhere/x.jsonl"),
    (Setting.MODELS, "model", "student.model=/elsewhere/model"),
    (Setting.MODELS, "model", "rewards.judge=/elsewhere/judge"),
    (Setting.JUDGES, "rewards.judge", "rewards.judge=http://elsewhere/v1"),
    (Setting.MLFLOW, "runtime.mlflow_uri", "runtime.mlflow_uri=http://elsewhere:5000"),
    (Setting.RAY, "runtime.ray_address", "runtime.ray_address=elsewhere:6379"),
]


@pytest.mark.parametrize(("setting", "field", "override"), REFUSED)
def test_each_field_has_its_own_allow_list(
    monkeypatch: pytest.MonkeyPatch, setting: Setting, field: str, override: str
) -> None:
    config = demo(override)
    check_config(config)  # without an allow list everything is allowed
    for other in set(Setting) - {setting}:
        monkeypatch.setenv(other, "*")
    monkeypatch.setenv(setting, "/srv/masters")
    for other in set(Setting) - {setting}:
        monkeypatch.delenv(other)
    with pytest.raises(InputError, match=f"^{field}: .* not allowed on this machine; {setting} allows /srv/masters$"):
        check_config(config)


def test_built_in_sources_and_trained_students_are_always_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(Setting.DATA, "/srv/data")
    monkeypatch.setenv(Setting.MODELS, "/srv/models")
    store, cached = tmp_path / "store", Path.home() / ".cache/masters/models/0123"
    for model in (store / "register/x/model", cached):
        models = [f"student.model={model}", f"teachers.0.model={model}"]
        check_config(demo(f"store.root={store}", *models))
    with pytest.raises(InputError, match="model"):
        check_config(demo("store.root=s3://lake", f"student.model={store}/register/x/model"))


def test_storage_and_tracking_check_the_allow_lists_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(Setting.STORES, "/srv")
    with pytest.raises(InputError, match="MASTERS_ALLOWED_STORES"):
        open_storage(str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    monkeypatch.setenv(Setting.MLFLOW, "http://mlflow:5000")
    with pytest.raises(InputError, match="MASTERS_ALLOWED_MLFLOW"):
        tracking_uri(demo("runtime.mlflow_uri=sqlite:////elsewhere/x.db"), None)  # pyright: ignore[reportArgumentType]


def test_a_parquet_file_that_is_a_link_out_of_an_allowed_folder_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.parquet").write_bytes(b"not even opened")
    (tmp_path / "data/a.parquet").symlink_to(tmp_path / "secret.parquet")
    monkeypatch.setenv(Setting.DATA, str(tmp_path / "data"))
    with pytest.raises(InputError, match="MASTERS_ALLOWED_DATA"):
        ParquetSource(tmp_path / "data")


@pytest.mark.parametrize(
    "override",
    [
        "data.source=https://me:pass@host/x.jsonl",
        "store.root=s3://key:secret@bucket",
        "student.model=https://h/m?token=abc",
    ],
)
def test_a_configuration_with_a_secret_is_refused(override: str) -> None:
    with pytest.raises(InputError, match="contains a password or a key") as refused:
        check_config(demo(override))
    assert "pass@" not in str(refused.value) and "abc" not in str(refused.value)


def test_a_relative_store_is_allowed_before_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(Setting.STORES, str(tmp_path / "runs"))
    check_allowed(Setting.STORES, "store.root", absolute_root("runs/demo"))
    with pytest.raises(InputError, match="not allowed on this machine"):
        check_allowed(Setting.STORES, "store.root", absolute_root("elsewhere/demo"))
    assert absolute_root("s3://lake/x") == "s3://lake/x"
