"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from masters.stages import Stage

ConfigPath = Annotated[Path, typer.Argument(help="A TOML configuration, e.g. configs/demo.toml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. train.epochs=2")
]
Rebuild = Annotated[list[Stage] | None, typer.Option("--rebuild", help="Build a stage again, in every round")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout")]
