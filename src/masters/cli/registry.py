"""Commands about models that are there: where one came from, which one is champion, what may go."""

import json
from typing import Annotated

import typer

from masters.cli.options import ConfigPath, Json, Overrides, silence_libraries
from masters.common.errors import MastersError
from masters.config.loading import load

app = typer.Typer()

MlflowUri = Annotated[
    str | None, typer.Option("--mlflow-uri", help="Default: MLFLOW_TRACKING_URI, else where this machine's runs went")
]


@app.command()
def lineage(
    reference: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RUN", help="A name, models:/NAME/3, NAME@champion, or an MLflow run id")
    ],
    mlflow_uri: MlflowUri = None,
    as_json: Json = False,
) -> None:
    """The chain behind a student, back to the questions; every file is read again and compared."""
    silence_libraries()
    from masters.tracking.lineage_report import trace

    found = trace(reference, mlflow_uri)
    _chain(found, as_json)
    if as_json:
        typer.echo(json.dumps(found))
    if not found["verified"]:
        first, *more = found["faults"]
        for fault in more:
            typer.echo(f"masters: {fault}", err=True)
        raise MastersError(f"{found['of']} does not verify: {first}")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The registered model")],
    to: Annotated[int | None, typer.Option("--to", metavar="VERSION", help="Default: the champion before")] = None,
    mlflow_uri: MlflowUri = None,
) -> None:
    """The alias champion back to an earlier version."""
    silence_libraries()
    from masters.tracking.lineage_report import registry_of

    before, now = registry_of(name, mlflow_uri).rollback(name, to)
    typer.echo(f"champion of {name}: version {now} (was {before or 'none'})")


@app.command()
def gc(
    config: ConfigPath,
    overrides: Overrides = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only listed")] = False,
    as_json: Json = False,
) -> None:
    """What no champion, candidate or live run reaches in the store; listed, or removed."""
    silence_libraries()
    from masters.flows.garbage_collection import collect_garbage

    found = collect_garbage(load(config, overrides), delete)
    for item in found["items"]:
        typer.echo(
            f"{item['bytes'] / 2**20:>10.1f} MiB  {item['kind']:<10} {item['uri']}  ({item['why']})", err=as_json
        )
    for note in found["notes"]:
        typer.echo(f"note: {note}", err=True)
    done = "removed" if delete else "would be removed (--delete removes them)"
    typer.echo(
        f"{len(found['items'])} things, {found['bytes'] / 2**20:.1f} MiB {done}; {found['kept']} artifacts kept",
        err=as_json,
    )
    if as_json:
        typer.echo(json.dumps(found))


def _chain(found: dict, to_stderr: bool) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(stderr=to_stderr, markup=False)
    table = Table(
        "stage", Column("artifact", overflow="fold"), "made from", "verified", Column("MLflow run", overflow="fold"),
        title=f"{found['of']}: {found['store']}",
    )  # fmt: skip
    for stage in found["stages"]:
        table.add_row(
            stage["name"], stage["uri"].removeprefix(f"{found['store']}/"), ", ".join(map(_read, stage["inputs"])),
            f"{stage['files']} files" if stage["verified"] else "NO", stage["mlflow_run_id"] or "-",
        )  # fmt: skip
    console.print(table)


def _read(made: dict) -> str:
    """An input by its role; of one outside the store also what became of it, where it is not as it was."""
    return made["role"] if made.get("state", "same") == "same" else f"{made['role']} ({made['state']})"
