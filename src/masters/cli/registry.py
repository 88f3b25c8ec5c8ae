"""Commands for existing models: where a model came from, which version is champion, what can be deleted."""

import json
from typing import Annotated

import typer

from masters.cli.options import ConfigPath, Json, Overrides, silence_libraries
from masters.common.errors import MastersError
from masters.config.loading import load

app = typer.Typer()

MlflowUri = Annotated[
    str | None,
    typer.Option(
        "--mlflow-uri",
        help="Default: MLFLOW_TRACKING_URI, otherwise that of the name's last store on this machine",
    ),
]


@app.command()
def lineage(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN", help="A model's name, models:/NAME/3, NAME@champion, or an MLflow run id"
        ),
    ],
    mlflow_uri: MlflowUri = None,
    as_json: Json = False,
) -> None:
    """Show the chain of artifacts behind a student, back to the questions, and verify the digest of every file."""
    silence_libraries()
    from masters.tracking.lineage_report import trace_lineage

    report = trace_lineage(reference, mlflow_uri)
    _print_chain(report, as_json)
    if as_json:
        typer.echo(json.dumps(report))
    if not report["verified"]:
        first, *others = report["faults"]
        for fault in others:
            typer.echo(f"masters: {fault}", err=True)
        raise MastersError(f"{report['of']} could not be verified: {first}")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The registered model")],
    to: Annotated[int | None, typer.Option("--to", metavar="VERSION", help="Default: the previous champion")] = None,
    mlflow_uri: MlflowUri = None,
) -> None:
    """Move the alias champion back to an earlier version."""
    silence_libraries()
    from masters.tracking.lineage_report import find_registry

    before, now = find_registry(name, mlflow_uri).rollback(name, to)
    typer.echo(f"champion of {name}: version {now} (was {before or 'none'})")


@app.command()
def gc(
    config_path: ConfigPath,
    overrides: Overrides = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only listed")] = False,
    as_json: Json = False,
) -> None:
    """List or remove artifacts in the store that no champion, candidate or unfinished run needs."""
    silence_libraries()
    from masters.flows.garbage_collection import collect_garbage

    report = collect_garbage(load(config_path, overrides), delete)
    for item in report["items"]:
        size = f"{item['bytes'] / 2**20:>10.1f} MiB"
        typer.echo(f"{size}  {item['kind']:<10} {item['uri']}  ({item['why']})", err=as_json)
    for note in report["notes"]:
        typer.echo(f"note: {note}", err=True)
    verb = "removed" if delete else "would be removed (--delete removes them)"
    typer.echo(
        f"{len(report['items'])} items, {report['bytes'] / 2**20:.1f} MiB {verb}; {report['kept']} artifacts kept",
        err=as_json,
    )
    if as_json:
        typer.echo(json.dumps(report))


def _print_chain(report: dict, to_stderr: bool) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        "stage",
        Column("artifact", overflow="fold"),
        "inputs",
        "verified",
        Column("MLflow run", overflow="fold"),
        title=f"{report['of']}: {report['store']}",
    )
    for stage in report["stages"]:
        table.add_row(
            stage["name"],
            stage["uri"].removeprefix(f"{report['store']}/"),
            ", ".join(map(_describe_input, stage["inputs"])),
            f"{stage['files']} files" if stage["verified"] else "NO",
            stage["mlflow_run_id"] or "-",
        )
    Console(stderr=to_stderr, markup=False).print(table)


def _describe_input(source: dict) -> str:
    """Return an input's role. An input outside the store that has changed also shows its state."""
    state = source.get("state", "same")
    return source["role"] if state == "same" else f"{source['role']} ({state})"
