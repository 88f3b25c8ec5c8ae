"""Writes `docs/reference/`: configuration keys, table columns and commands, each from the code that defines it.

    python docs/gen_reference.py

`make docs` runs it. `tests/test_docs.py` fails when a committed page differs from what this script writes.
"""

import re
from enum import StrEnum
from pathlib import Path
from typing import get_args

import pyarrow as pa
import typer
from column_descriptions import COLUMNS, TABLES

from masters.cli.main import app
from masters.config import Config
from masters.config.presets import PRESETS
from masters.config.study_file import StudyFile
from masters.store import tables

FOLDER = Path(__file__).parent / "reference"
LARGEST = 2**31 - 1  # a limit of the file format, not worth a mention
NOTE = "<!-- Written by docs/gen_reference.py: edit the code that it reads, then run `make docs`. -->\n"

CONFIGURATION = """# Configuration keys

A configuration is one TOML file. An unknown key or a value of the wrong type is an error, reported before any work
starts. On the command line, `--set SECTION.KEY=VALUE` overrides a key; `teachers.0.model` addresses the first teacher.

Every key takes part in the identity (fingerprint) of the artifacts that it affects, so changing it rebuilds them. The
exceptions are `name`, `[store]`, `[nightly]` and `[runtime]`.

`preset = "NAME"` at the top of the file sets the keys listed under [Presets](#presets). A key that the file itself sets
takes precedence over the preset.
"""

TABLES_INTRO = """# Table columns

Each stage writes its tables as Parquet files to `<store.root>/<stage>/<slug>-<fingerprint>/<table>/*.parquet`. Read
only the files that the artifact's `record.json` lists: the record is written last, and a folder without one is
unfinished.

The columns `question_id`, `source`, `mask_ratio` and `sample` together identify a response.
"""

COMMANDS_INTRO = """# Commands

Errors are one line on stderr. Exit codes: 0 success, 1 failure, 2 wrong usage or bad input. With `--json`, the last
line of stdout is one JSON object and everything else goes to stderr.

`make setup` installs the command as `.venv/bin/masters`.
"""


def main() -> None:
    """Write every page of the reference."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


def pages() -> dict[str, str]:
    """Return the Markdown text of each page by file name."""
    pages = {"configuration.md": configuration(), "tables.md": table_columns(), "commands.md": commands()}
    return {name: f"{NOTE}\n{text.rstrip()}\n" for name, text in pages.items()}


def configuration() -> str:
    """Return the page of all configuration keys, from the JSON schema of the pydantic model."""
    schema = Config.model_json_schema()
    preset = dict(description="Set of switches of the method; the keys of the file take precedence", enum=list(PRESETS))
    sections, top = [], [_key_row("preset", preset, required=False)]
    for key, value in schema["properties"].items():
        definition = _definition(value, schema)
        if definition is None:
            top.append(_key_row(key, value, key in schema["required"]))
        else:
            sections.append(_section(f"[[{key}]]" if value.get("type") == "array" else f"[{key}]", definition, schema))
    parts = [CONFIGURATION, "## Top level\n", _table(KEY_HEAD, top), *sections, _presets(), _study()]
    return "\n".join(parts)


KEY_HEAD = ("key", "type", "default", "description")


def _section(title: str, definition: dict, schema: dict, level: str = "##") -> str:
    """Return one section's table; sections inside it follow as their own."""
    rows, inner = [], []
    for key, value in definition["properties"].items():
        nested = _definition(value, schema)
        if nested is None:
            rows.append(_key_row(key, value, key in definition.get("required", [])))
        else:
            inner.append(_section(f"[{title.strip('[]')}.{key}]", nested, schema))
    return "\n".join([f"{level} `{title}`\n", f"{definition['description']}\n", _table(KEY_HEAD, rows), *inner])


def _definition(value: dict, schema: dict) -> dict | None:
    """Return the definition of a nested section (or of a list's items); None for a plain value."""
    reference = value.get("$ref") or value.get("items", {}).get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[1]] if reference else None


def _key_row(key: str, value: dict, required: bool) -> tuple[str, ...]:
    default = "required" if required else _literal(value.get("default"))
    return f"`{key}`", _type(value), default, _escape(value.get("description", ""))


def _literal(value: object) -> str:
    """Return a value as TOML writes it; `none` stands for a key that is left out."""
    if value is None:
        return "none"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value!r}`".replace("'", '"')


def _type(value: dict) -> str:
    """Return a type with its limits, for example "integer, 1 to 64"."""
    options = [option for option in value.get("anyOf", [value]) if option.get("type") != "null"]
    return " or ".join(map(_simple_type, options))


def _simple_type(value: dict) -> str:
    if "enum" in value:
        return ", ".join(f'`"{choice}"`' for choice in value["enum"])
    if value.get("type") == "array":
        return f"list of: {_simple_type(value['items'])}"
    if "additionalProperties" in value:
        return "table"
    return f"{value.get('type', 'any')}{_limits(value)}"


def _limits(value: dict) -> str:
    low = _limit(value, "minimum", "at least") or _limit(value, "exclusiveMinimum", "above")
    high = _limit(value, "maximum", "at most") or _limit(value, "exclusiveMaximum", "below")
    return "".join(f", {limit}" for limit in (low, high) if limit)


def _limit(value: dict, key: str, word: str) -> str:
    return f"{word} {value[key]:,}" if value.get(key, LARGEST) != LARGEST else ""


def _presets() -> str:
    keys = next(iter(PRESETS.values()))
    rows = [(f"`{key}`", *(_literal(values[key]) for values in PRESETS.values())) for key in keys]
    return "\n".join(["## Presets\n", _table(("key", *(f'`"{name}"`' for name in PRESETS)), rows)])


def _study() -> str:
    """Return the keys of a study's file; its arms and comparisons follow as sections of their own."""
    schema = StudyFile.model_json_schema()
    plain = {k: v for k, v in schema["properties"].items() if k not in ("validation", "arms", "comparisons")}
    rows = [_key_row(key, value, key in schema["required"]) for key, value in plain.items()]
    parts = ["## Study files\n", "`masters study` reads these keys: [Compare ways to train](../studies.md).\n"]
    parts.append(_table(KEY_HEAD, rows))
    for title, name in (("[validation]", "Validation"), ("[arms.NAME]", "Arm"), ("[[comparisons]]", "Comparison")):
        parts.append(_section(title, schema["$defs"][name], schema, level="###"))
    return "\n".join(parts)


def table_columns() -> str:
    """Return the page of all tables, from the Arrow schemas. Raises KeyError for a column without a description."""
    parts = [TABLES_INTRO]
    for constant, (title, text) in TABLES.items():
        rows = [(f"`{f.name}`", _arrow(f.type), _escape(_column(constant, f.name))) for f in getattr(tables, constant)]
        parts += [f"## {title}\n", f"{text}\n", _table(("column", "type", "description"), rows)]
    return "\n".join(parts)


def undescribed_tables() -> set[str]:
    """Return the names of Arrow schemas in `masters.store.tables` that the reference leaves out."""
    return {name for name, value in vars(tables).items() if isinstance(value, pa.Schema)} - TABLES.keys()


def _column(table: str, column: str) -> str:
    return COLUMNS.get(f"{table}.{column}") or COLUMNS[column]


def _arrow(kind: pa.DataType) -> str:
    return re.sub(r"<\w+: (\w+)>", r" of \1", str(kind)).replace("double", "float64")


def commands() -> str:
    """Return the page of all commands, from the Typer application."""
    group = typer.main.get_command(app)
    parts = [COMMANDS_INTRO]
    for name, command in sorted(group.commands.items()):
        usage = f"masters {name} {_usage(command)}".rstrip()
        parts += [f"## `masters {name}`\n", f"{command.help}\n", f"```text\n{usage}\n```\n"]
        parts.append(_table(("parameter", "description"), [_parameter(p) for p in command.params]))
    return "\n".join(parts)


def _usage(command) -> str:
    arguments = [_argument_name(p) for p in command.params if p.param_type_name == "argument"]
    return " ".join([*arguments, "[OPTIONS]"] if len(arguments) < len(command.params) else arguments)


def _argument_name(parameter) -> str:
    return (parameter.metavar or parameter.name).strip("{}").upper()


def _parameter(parameter) -> tuple[str, str]:
    help_text = _escape(". ".join(filter(None, [parameter.help, _choices(parameter.type_descriptor.annotation)])))
    if parameter.param_type_name == "argument":
        return f"`{_argument_name(parameter)}`", help_text
    value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
    return f"`{parameter.opts[0]}{value}`", help_text


def _choices(annotation: object) -> str:
    """Return the values of an enumeration, or of a list of one; an empty text for another type."""
    kind = next(iter(get_args(annotation)), annotation)
    is_enumeration = isinstance(kind, type) and issubclass(kind, StrEnum)
    return f"One of: {', '.join(kind)}" if is_enumeration else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows] if rows else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _escape(text: str) -> str:
    """Keep a cell on one line, and its special characters literal."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
