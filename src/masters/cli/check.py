"""`masters check`: what can be refused, and what can be known, before hours are spent."""

from typing import TYPE_CHECKING, Annotated

import typer

from masters.cli.options import ConfigPath, Overrides
from masters.common.errors import MastersError
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.loading import load

if TYPE_CHECKING:
    from masters.checks.preflight import Resources

app = typer.Typer()


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    compare_models: Annotated[
        bool, typer.Option("--parity", help="Also load the models: fast paths against plain ones, vLLM against PyTorch")
    ] = False,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Of an hour of a device, in any currency, for the estimate")
    ] = None,
) -> None:
    """Before hours are spent: configuration, source, models, families and tokenizers, store, memory, time, cost."""
    settings = load(config, overrides)
    check_config(settings)

    from masters.checks.estimates import describe_estimates, describe_memory
    from masters.checks.preflight import preflight, list_warnings

    resources = preflight(settings)
    for line in list_warnings(settings):
        typer.echo(f"warning: {line}", err=True)
    typer.echo(f"source     {settings.data.source}")
    typer.echo(f"student    {resources.student.folder} ({resources.student.digest[:16]})")
    for teacher in resources.teachers:
        typer.echo(f"teacher    {teacher.folder} ({teacher.digest[:16]})")
    typer.echo(f"store      {resources.storage.uri('')}: read, write, conditional write")
    typer.echo(f"memory     {describe_memory(settings, resources)}")
    for line in describe_estimates(settings, resources, price):
        typer.echo(line)
    if compare_models:
        _parity(settings, resources)
    typer.echo("ready")


def _parity(settings: Config, resources: "Resources") -> None:
    """Print each difference with its verdict. Raises MastersError if one is more than rounding."""
    from masters.checks.parity import compare_models

    differences = compare_models(settings, resources)
    for line in differences:
        verdict = "ok" if line["found"] <= line["limit"] else "DIFFERENT"
        typer.echo(f"{verdict:<10} {line['found']:.1e} (limit {line['limit']:.0e})  {line['name']}")
    if any(line["found"] > line["limit"] for line in differences):
        raise MastersError("this machine does not compute the method as written; see the lines marked DIFFERENT")
