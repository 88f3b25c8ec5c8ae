"""Loading of a configuration: a TOML file and overrides, validated as a whole. All errors are reported on one line."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from masters.common.errors import InputError
from masters.common.files import describe_place
from masters.config import Config, presets

MAX_FILE_BYTES = 1 << 20
MAX_SHOWN_CHARACTERS = 100  # of an invalid value
RENAMED_KEYS = {  # keys of earlier versions
    "teachers.step": "mask_step",
    "train.probe_drop": "max_validation_drop",
    "runtime.silence_minutes": "heartbeat_timeout_minutes",
}


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file and apply `KEY=VALUE` overrides (VALUE is a TOML literal, otherwise a string).

    A key `preset` sets what the file and the overrides leave open (`masters.config.presets`). Raises InputError with
    one line that names every invalid key.
    """
    tree = read_toml(path)
    if "arms" in tree:
        raise InputError(f"{path} is a study, expected a configuration: run it with `masters study {path}`")
    for override in overrides or []:
        _apply_override(tree, override)
    return _validate(_apply_preset(tree), f"configuration {path}")


def read_toml(path: str | Path, file_kind: str = "configuration") -> dict:
    """Return the content of a TOML file. Raises InputError, in which the file is called `file_kind`."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InputError(f"{file_kind} {path} is longer than {MAX_FILE_BYTES} bytes: is it the right file?")
        return tomllib.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{file_kind} not found: {describe_place(path)}") from None
    # ValueError: the file is not UTF-8 or not TOML, or it contains a number of thousands of digits
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file_kind} {path} cannot be read: {error}") from None


def override_values(config: Config, values: Mapping[str, object]) -> Config:
    """Return the configuration with other values by dotted key, e.g. {"train.beta": 0.1}.

    A `preset` among the values is applied before the other keys. Raises InputError as `load` does.
    """
    tree = config.model_dump()
    preset = presets.get_preset(values["preset"]) if "preset" in values else {}
    for key, value in {**preset, **values}.items():
        if key != "preset":
            _set_key(tree, key, value, key)
    return _validate(tree, ", ".join(f"{key} = {_format_value(value)}" for key, value in values.items()))


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Return the leaves of a nested dictionary by dotted key, e.g. {"train.beta": 0.1}."""
    values: dict[str, object] = {}
    for key, value in tree.items():
        values |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def describe_errors(error: ValidationError) -> str:
    """Return all validation errors on one line: the key, what is wrong, and the value found."""
    return "; ".join(_describe_error(details) for details in error.errors())


def _describe_error(details: Mapping) -> str:
    key = ".".join(str(part) for part in details["loc"]) or "(whole file)"
    if not key.isprintable() or len(key) > MAX_SHOWN_CHARACTERS:
        key = _format_value(key)
    message = _reword(details["type"], details["loc"]) or details["msg"].removeprefix("Value error, ")
    if details["type"] == "missing" or isinstance(details["input"], dict | list):
        return f"{key}: {message}"
    return f"{key}: {message} (found {_format_value(details['input'])})"


def _reword(error_type: str, location: tuple[int | str, ...]) -> str | None:
    """Return our own message for an error type, or None where pydantic's message is clear."""
    if error_type == "extra_forbidden":
        new_name = RENAMED_KEYS.get(".".join(part for part in location if isinstance(part, str)))
        return f"unknown key, renamed to {new_name}" if new_name else "unknown key"
    return "missing" if error_type == "missing" else None


def _format_value(value: object) -> str:
    """Return a short text for an invalid value. Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    shown = text[:MAX_SHOWN_CHARACTERS]
    return text if shown == text else f"{shown}... ({len(text)} characters)"


def _validate(tree: dict, subject: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{subject}: {describe_errors(error)}") from None


def _apply_preset(tree: dict) -> dict:
    if "preset" not in tree:
        return tree
    for key, value in presets.get_preset(tree.pop("preset")).items():
        section_name, name = key.split(".")
        section = tree.setdefault(section_name, {})
        if isinstance(section, dict):  # anything else is refused when the tree is validated
            section.setdefault(name, value)
    return tree


def _apply_override(tree: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set expects KEY=VALUE, found {_format_value(override)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    _set_key(tree, key.strip(), value, f"--set {_format_value(override)}")


def _set_key(tree: dict, key: str, value: object, subject: str) -> None:
    """Set the value of a dotted key in place. `subject` begins the message of an InputError."""
    *parents, last = key.split(".")
    node: dict | list = tree
    for part in parents:
        node = _get_child(node, part, subject)
    if isinstance(node, list):
        node[_parse_index(node, last, subject)] = value
    else:
        node[last] = value


def _get_child(node: dict | list, part: str, subject: str) -> dict | list:
    child = node[_parse_index(node, part, subject)] if isinstance(node, list) else node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise InputError(f"{subject}: {_format_value(part)} is a value, not a section")
    return child


def _parse_index(node: list, part: str, subject: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
        raise InputError(f"{subject}: expected a number below {len(node)}, found {_format_value(part)}")
    return int(part)
