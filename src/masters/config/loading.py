"""Reads a configuration: one TOML file and overrides, checked as a whole before anything starts; faults on one line."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from masters.common.errors import InputError
from masters.config import Config, presets

BYTES = 1 << 20  # of a file
SHOWN = 100  # characters of a value at fault
RENAMED = {  # keys of earlier versions
    "teachers.step": "mask_step",
    "train.probe_drop": "max_validation_drop",
    "runtime.silence_minutes": "heartbeat_timeout_minutes",
}


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file and apply `KEY=VALUE` overrides (VALUE a TOML literal, else a string).

    A key `preset` sets what the file and the overrides leave open (`masters.config.presets`). Raises InputError with
    one line that names every key at fault.
    """
    tree = read_toml(path)
    for override in overrides or []:
        _set(tree, override)
    return _validated(_with_preset(tree), f"configuration {path}")


def _with_preset(tree: dict) -> dict:
    if "preset" not in tree:
        return tree
    for key, value in presets.get_preset(tree.pop("preset")).items():
        section, name = key.split(".")
        given = tree.setdefault(section, {})
        if isinstance(given, dict):  # anything else is refused when the tree is validated
            given.setdefault(name, value)
    return tree


def read_toml(path: str | Path, what: str = "configuration") -> dict:
    """What a TOML file holds. Raises InputError; `what`: how it calls the file."""
    try:
        with open(path, "rb") as file:
            data = file.read(BYTES + 1)
        if len(data) > BYTES:
            raise InputError(f"{what} {path} is longer than {BYTES} bytes: is it the right file?")
        return tomllib.loads(data.decode())
    except FileNotFoundError:
        raise InputError(f"{what} not found: {path}") from None
    # ValueError: no UTF-8, no TOML, or a number of thousands of digits
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from None


def override_values(config: Config, values: Mapping[str, object]) -> Config:
    """The configuration with other values, by key, e.g. {"train.beta": 0.1}; a `preset` goes before the other keys.

    Raises InputError as `load` does.
    """
    tree, others = config.model_dump(), {key: value for key, value in values.items() if key != "preset"}
    chosen = presets.get_preset(values["preset"]) if "preset" in values else {}
    for key, value in {**chosen, **others}.items():
        _put(tree, key, value, key)
    return _validated(tree, ", ".join(f"{key} = {_shown(value)}" for key, value in values.items()))


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Values by dotted key, e.g. {"train.beta": 0.1}."""
    values: dict[str, object] = {}
    for key, value in tree.items():
        values |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def _validated(tree: dict, what: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{what}: {describe_errors(error)}") from None


def describe_errors(error: ValidationError) -> str:
    """All faults of a file's values on one line: key, what is wrong, what was found."""
    faults = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"]) or "(whole file)"
        message = _message(fault["type"], fault["loc"]) or fault["msg"]
        found = (
            ""
            if fault["type"] == "missing" or isinstance(fault["input"], dict | list)
            else f" (found {_shown(fault['input'])})"
        )
        named = key if key.isprintable() and len(key) <= SHOWN else _shown(key)
        faults.append(f"{named}: {message.removeprefix('Value error, ')}{found}")
    return "; ".join(faults)


def _message(fault: str, location: tuple[int | str, ...]) -> str | None:
    """Our wording of a fault; None where pydantic's will do."""
    if fault == "extra_forbidden":
        renamed = RENAMED.get(".".join(part for part in location if isinstance(part, str)))
        return f"unknown key, renamed to {renamed}" if renamed else "unknown key"
    return "missing" if fault == "missing" else None


def _shown(value: object) -> str:
    """A value at fault, not at any length. Python refuses to write out numbers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def _set(tree: dict, override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key.strip():
        raise InputError(f"--set expects KEY=VALUE, found {_shown(override)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    _put(tree, key.strip(), value, f"--set {_shown(override)}")


def _put(tree: dict, key: str, value: object, what: str) -> None:
    *parents, last = key.split(".")
    node: dict | list = tree
    for part in parents:
        node = _child(node, part, what)
    if isinstance(node, list):
        node[_index(node, last, what)] = value
    else:
        node[last] = value


def _child(node: dict | list, part: str, what: str) -> dict | list:
    child = node[_index(node, part, what)] if isinstance(node, list) else node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise InputError(f"{what}: {_shown(part)} is a value, not a section")
    return child


def _index(node: list, part: str, what: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
        raise InputError(f"{what}: expected a number below {len(node)}, found {_shown(part)}")
    return int(part)
