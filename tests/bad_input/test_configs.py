"""Configurations with invalid values: one line that names the key."""

import socket
from pathlib import Path

import pytest

from masters.checks import preflight
from masters.checks.preflight import check_packages, check_ray_cluster
from masters.common.errors import InputError
from masters.config import Config
from masters.config.loading import load, override_values
from masters.models.masking import is_masked

DEMO = Path(__file__).parents[2] / "configs" / "easyvqa.toml"
MAX_ERROR_LENGTH = 1000  # characters, as errors are read in a terminal

# an override, and a part of the error line
VALUES: dict[str, tuple[str, str]] = {
    "NaN learning rate": ("train.learning_rate=nan", "train.learning_rate: Input should be"),
    "infinite beta": ("train.beta=inf", "train.beta: Input should be a finite number"),
    "negative beta": ("train.beta=-0.1", "train.beta: Input should be greater than or equal to 0"),
    "NaN share": ("generate.student_share=nan", "generate.student_share: Input should be a finite number"),
    "NaN rejected share": ("data.max_rejected_share=nan", "data.max_rejected_share: Input should be a finite number"),
    "NaN mask": ("teachers.0.r_max=nan", "teachers.0.r_max: Input should be a finite number"),
    "negative mask": ("teachers.0.r_max=-0.2", "teachers.0.r_max: Input should be greater than or equal to 0"),
    "stages without end": ("teachers.0.mask_step=1e-9", "divides r_max (0.2) into more than 1000 stages"),
    "smallest step": ("teachers.0.mask_step=5e-324", "divides r_max (0.2) into more than 1000 stages"),
    "negative seed": ("generate.seed=-1", "generate.seed: Input should be greater than or equal to 0"),
    "seed of 40 digits": ("train.seed=" + "9" * 40, "train.seed: Input should be less than or equal to 2147483647"),
    "number of 5000 digits": ("train.epochs=" + "1" * 5000, "train.epochs: Input should be a valid integer"),
    "number of 5000 hexadecimal digits": ("train.epochs=0x" + "f" * 5000, "found a number of 20000 bits"),
    "more questions than an integer": ("train.questions_per_step=10000000000000", "train.questions_per_step: Input"),
    "more tokens than an integer": ("runtime.token_budget=" + "9" * 30, "runtime.token_budget: Input should be less"),
    "top k beyond the engine's integers": ("generate.top_k=99999999999", "generate.top_k: Input should be less"),
    "temperature that engines would change": ("generate.temperature=1e-5", "temperature must be 0 or at least"),
    "temperature that engines refuse": ("generate.temperature=2.01", "generate.temperature: Input should be less than"),
    "negative temperature": ("generate.temperature=-1", "generate.temperature: Input should be greater than or equal"),
    "temperature that is no number": ("generate.temperature=nan", "generate.temperature: Input should be"),
    "equal responses": ("generate.temperature=0", "at most 1 response of the teacher and 1 of the student, found 4"),
    "no token to sample from": ("generate.top_p=0", "generate.top_p: Input should be greater than 0"),
    "more than all tokens": ("generate.top_p=1.1", "generate.top_p: Input should be less than or equal to 1"),
    "negative top k": ("generate.top_k=-1", "generate.top_k: Input should be greater than or equal to 0"),
    "no token": ("generate.max_tokens=0", "generate.max_tokens: Input should be greater than or equal to 1"),
    "no response": ("generate.responses=0", "generate.responses: Input should be greater than or equal to 1"),
    "penalty that makes infinities": ("generate.repetition_penalty=1e-300", "generate.repetition_penalty: Input"),
    "answers longer than the model takes": ("generate.max_tokens=512", "leaves no room for a prompt in runtime.max_mo"),
    "all memory there is": ("runtime.engine_memory_gib=1e300", "runtime.engine_memory_gib: Input should be less"),
    "time without end": ("runtime.judge_timeout=1e300", "runtime.judge_timeout: Input should be less"),
    "silence without end": ("runtime.heartbeat_timeout_minutes=inf", "heartbeat_timeout_minutes: Input should be"),
    "a million devices": ("runtime.tensor_parallel_size=1000000", "runtime.tensor_parallel_size: Input should be"),
    "cluster without a port": ("runtime.ray_address=head", "runtime.ray_address: String should match pattern"),
    "cluster that is a client's URL": ("runtime.ray_address='ray://head:1'", "runtime.ray_address: String"),
    "broken pattern": ("mask.exclude=['(']", "is not a regular expression"),
    "pattern of another verifier": ("answers.final_pattern='x'", 'is only used with verifier = "final", found'),
    "broken final pattern": ("answers.final_pattern='('", "is not a regular expression"),
    "no final pattern": ("answers.final_pattern=''", "answers.final_pattern: String should have at least 1 character"),
    "pattern that looks ahead": ("mask.exclude=['(?=layers)']", "is not a regular expression (invalid perl operator"),
    "pattern that looks back": ("mask.exclude=['(a)\\1']", "is not a regular expression (invalid escape sequence"),
    "pattern without end": (f"mask.exclude=['{'(a|b)?' * 100_000}']", "mask.exclude.0: expected at most 1000"),
    "patterns without end": (f"mask.exclude={['a'] * 1000}", "mask.exclude: List should have at most 100 items"),
    "repetitions of repetitions": (f"mask.exclude=['{'[a-z]{999}' * 90}']", "(pattern too large - compile failed)"),
    "repetitions without end": ("mask.exclude=['((a{999}){999}){999}']", "is not a regular expression"),
    "store in a variable": ("store.root='$HOME/store'", "expands no variables: write the folder itself, or ~"),
    "store with a variable": ("store.root='s3://${BUCKET}/x'", "expands no variables"),
    "store in memory": ("store.root='memory://x'", "found the protocol 'memory'"),
    "store of references": ("store.root='reference://x'", "found the protocol 'reference'"),
    "store on the web": ("store.root='https://host/x'", "found the protocol 'https'"),
    "store of no known kind": ("store.root='x" + "y" * 500 + "://x'", "found the protocol 'xyyy"),
    "chained store": ("store.root='simplecache::s3://bucket/x'", "store.root: expected a folder or s3://bucket/prefix"),
    "store of data": ("store.root='data:x'", "store.root: expected a folder or s3://bucket/prefix"),
    "store without a bucket": ("store.root='s3:///x'", "store.root: the URL names no bucket; expected s3://bucket/pre"),
    "store with an empty part": ("store.root='s3://bucket/a//b'", "found the part '' in it: write the prefix without"),
    "store above another": ("store.root='s3://bucket/a/../b'", "found the part '..' in it: write the prefix without"),
    "store in its own place": ("store.root='s3a://bucket/./b'", "found the part '.' in it: write the prefix without"),
    "store with a space at an end": ("store.root='s3://bucket/a /b'", "found the part 'a ': remove spaces around it"),
    "store with a line": ('store.root="s3://bucket/a\\nb"', "found the part 'a\\nb': remove"),
    "infinite limit": ("data.train_limit=inf", "data.train_limit: Input should be"),
    "text for a number": ("train.epochs='2'", "train.epochs: Input should be a valid integer (found '2')"),
    "truth for a number": ("train.epochs=true", "train.epochs: Input should be a valid integer"),
    "date for a number": ("train.epochs=2026-01-01", "train.epochs: Input should be a valid integer"),
    "name that is a path": ("name='../x'", "name: String should match pattern"),
    "name with a line": ("name='a\\n'", "name: String should match pattern"),
    "another digit": ("teachers.²=1", "expected a number below 1, found '²'"),
    "position of 5000 digits": ("teachers." + "1" * 5000 + "=1", "expected a number below 1"),
    "list without end": ("train.epochs=" + "[" * 5000, "train.epochs: Input should be a valid integer"),
    "megabyte of a name": ("data." + "x" * 1_000_000 + "=1", "unknown key"),
    "megabyte of a value": ("train.divergence='" + "x" * 1_000_000 + "'", "train.divergence: Input should be"),
}  # fmt: skip

FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "name: missing"),
    "no toml": (b"{not toml", "cannot be read"),
    "no utf-8": (b"name = '\xff'", "cannot be read"),
    "utf-16": ("name = 'a'".encode("utf-16"), "cannot be read"),
    "nulls": (bytes(100), "cannot be read"),
    "nested without end": (b"a = " + b"[" * 20_000, "cannot be read"),
    "tables without end": (b"[" + b".".join([b"a"] * 20_000) + b"]", "unknown key"),
    "number of 5000 digits": (b"a = " + b"1" * 5000, "cannot be read"),
    "a study": (b"[arms.plain]", "is a study, expected a configuration: run it with `masters study"),
    "a key twice": (b"name = 'a'\nname = 'b'", "cannot be read"),
    "model weights": (bytes(2 << 20), "is it the right file?"),
}


def error_line(refused: pytest.ExceptionInfo) -> str:
    line = str(refused.value)
    assert "\n" not in line and len(line) < MAX_ERROR_LENGTH
    return line


def test_unreachable_ray_cluster_is_refused_before_work_starts() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # without listening
        with pytest.raises(InputError, match=r"runtime.ray_address: no Ray cluster answers at 127.0.0.1:\d+ .*ray"):
            check_ray_cluster(f"127.0.0.1:{closed.getsockname()[1]}")


def test_verifier_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages(load(DEMO, ["answers.verifier='number'"]))
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    check_packages(load(DEMO, ["answers.verifier='final'"]))
    with pytest.raises(InputError, match=r'answers.verifier = "number" needs math-verify, .* masters\[number\], or'):
        check_packages(load(DEMO, ["answers.verifier='number'"]))


@pytest.mark.parametrize("name", VALUES)
def test_invalid_value_is_refused_with_its_key(name: str) -> None:
    override, message = VALUES[name]
    with pytest.raises(InputError) as refused:
        load(DEMO, [override])
    assert message in error_line(refused)


@pytest.mark.parametrize("name", FILES)
def test_a_faulty_config_file_is_refused(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        load(path)
    assert message in error_line(refused)


@pytest.mark.timeout(60)
def test_catastrophic_pattern_is_matched_quickly() -> None:
    """Python's `re` would take years for one tensor name."""
    exclude = load(DEMO, [r"mask.exclude=['([\w.]+)+!', '(x+x+)+y']"]).mask.exclude
    assert is_masked("model.language_model.layers.0.mlp.gate_proj.weight", 2, tuple(exclude))
    assert is_masked("x" * 10_000 + ".weight", 2, tuple(exclude))
    assert not is_masked("x" * 10_000 + "y.weight", 2, tuple(exclude))


@pytest.mark.parametrize("root", ["s3://bucket/a team's/störe", "s3a://bucket/a/b", "s3://bucket"])
@pytest.mark.parametrize("end", ["", "/", "//"])
def test_an_s3_store_loses_slashes_at_its_end(root: str, end: str) -> None:
    assert load(DEMO, [f"store.root={root}{end}"]).store.root == root


@pytest.mark.parametrize("root", ["runs/x", "/tmp/x", "file:///tmp/x", "s3://bucket/x", "C:x", "a:b"])
def test_folders_and_s3_are_accepted_as_stores(root: str) -> None:
    assert load(DEMO, [f"store.root='{root}'"]).store.root == root


def test_endless_config_file_is_refused() -> None:
    with pytest.raises(InputError, match="is it the right file"):
        load("/dev/zero")


def test_study_grid_with_invalid_values_is_refused() -> None:
    """A study overrides values of the configuration in the same way."""
    config: Config = load(DEMO)
    for value in (10**5000, "x" * 10**6, [[]] * 1000, {"a": 1}, None, float("nan"), -1):
        with pytest.raises(InputError) as refused:
            override_values(config, {"train.beta": value})
        assert "train.beta" in error_line(refused)
