"""The command line. Errors are one line on stderr; exit 0, 1 failed, 2 usage or bad input.

Heavy libraries are imported by the commands, after their arguments are understood: `--help` is quick.
"""

import atexit
import gc
import json
import sys
import traceback
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from masters.cli import check, registry
from masters.cli.options import ConfigPath, Json, Overrides, Rebuild, silence_libraries
from masters.cli.output import show_plan, show_summary
from masters.common.errors import MastersError, RunsFailed
from masters.common.machine import cache_folder
from masters.common.redaction import redact
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.loading import load
from masters.config.stages import Stage
from masters.config.study_file import load_study
from masters.infra.settings import Services

INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil large vision-language models with masked teachers.",
)


for part in (check.app, registry.app):
    app.add_typer(part)  # without a name: its commands are masters' own


@app.command()
def distill(
    config: ConfigPath,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be built or reused, build nothing")] = False,
    rebuild: Rebuild = None,
    as_json: Json = False,
) -> None:
    """The whole pipeline; run again, it reuses what is built and finishes what is not."""
    settings = load(config, overrides)
    if plan:
        show_plan(settings, as_json, rebuild or [])
        return
    _run("distill", settings, as_json, rebuild=rebuild)


@app.command()
def stage(
    name: Annotated[Stage, typer.Argument(help="The last stage to run")],
    config: ConfigPath,
    overrides: Overrides = None,
    rebuild: Rebuild = None,
    as_json: Json = False,
) -> None:
    """One stage and what it needs."""
    _run("distill", load(config, overrides), as_json, rebuild=rebuild, until=name)


@app.command()
def nightly(config: ConfigPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """One night: new rows, candidate, gate, champion."""
    _run("nightly", load(config, overrides), as_json)


@app.command()
def evaluate(
    config: ConfigPath,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders, hub ids, models:/NAME@ALIAS")],
    benchmarks: Annotated[
        list[str] | None,
        typer.Option("--benchmark", help="Also this one: paper (all 13), e.g. MMStar, or a task of lmms-eval's"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only so many documents of each benchmark")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Models on the evaluation split, and on the field's benchmarks."""
    settings = load(config, overrides)
    if benchmarks:
        from masters.evaluation.benchmark_selection import select_benchmarks

        select_benchmarks(benchmarks)  # at once; the flow, which may be started elsewhere, does it again
    _run("evaluate", settings, as_json, models=models, benchmarks=benchmarks, benchmark_limit=limit)


@app.command()
def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY", help="A study's TOML file, e.g. configs/studies/digits.toml")
    ],
    as_json: Json = False,
) -> None:
    """Arms compared over learning rates and seeds; run again, it goes on from the results that are there."""
    settings, design = load_study(file)
    try:
        report = _run_flow("study", settings, design=design)
    except RunsFailed as error:
        typer.echo(json.dumps(error.report) if as_json else error.report["markdown"])
        raise
    typer.echo(json.dumps(report) if as_json else report["markdown"])


@app.command()
def up(
    services: Annotated[
        Services, typer.Option(envvar="MASTERS_STACK", help="full: Postgres and an S3-compatible store too")
    ] = Services.LIGHT,
    as_json: Json = False,
) -> None:
    """The local stack: Prefect server and worker, MLflow server, deployments; on loopback."""
    from masters.infra.stack import up as start

    stack, new = start(services)
    lines = [
        f"Prefect  {stack.urls['prefect_url']}",
        f"MLflow   {stack.urls['mlflow_url']}",
        "started" if new else "runs already",
        f"to track what this shell starts there too: source {stack.folder / 'env'}",
    ]
    typer.echo("\n".join(lines), err=as_json)
    if as_json:
        typer.echo(json.dumps(stack.urls))


@app.command()
def down() -> None:
    """Stop what `masters up` started; its state stays, and runs that are interrupted go on after the next `up`."""
    from masters.infra.stack import down as stop

    typer.echo("stopped" if stop() else "nothing runs")


def main() -> None:
    """Entry point: turns expected errors into one line and an exit code."""
    atexit.register(gc.freeze)  # runs last: nothing is worth collecting then, which took 2 s where PyTorch was loaded
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"masters: {error} (masters --help lists commands and options)", err=True)
        sys.exit(2)
    except MastersError as error:
        typer.echo(f"masters: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:  # ours to mend: the line says where the rest is
        typer.echo(f"masters: unexpected {type(error).__name__}: {_kept(error)}", err=True)
        sys.exit(1)
    if code == INTERRUPTED:
        typer.echo("masters: interrupted; run again to go on from here", err=True)
    sys.exit(1 if code else 0)


def _kept(error: Exception) -> str:
    """An error's line, and the file that its traceback was written to."""
    said = " ".join(redact(str(error)).split())[:300]
    try:
        file = cache_folder() / "errors" / f"{datetime.now():%Y-%m-%d-%H%M%S}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(redact("".join(traceback.format_exception(error))))
    except OSError:
        return said
    return f"{said} (traceback: {file}; please report it)"


def _run(name: str, settings: Config, as_json: bool, **arguments: object) -> None:
    """Run the flow of this name and print its summary."""
    summary = _run_flow(name, settings, **arguments)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        show_summary(summary)


def _run_flow(name: str, settings: Config, **arguments: object) -> dict:
    """Run the flow of this name. Returns its summary."""
    from masters.infra.local_prefect import prefect_api, wait_until_ready

    check_config(settings)  # at once: the rest of preflight needs seconds of imports
    with prefect_api() as url:
        from masters.checks.preflight import preflight

        preflight(settings)  # while the server starts; the flow, which may be started elsewhere, does it again
        silence_libraries()
        flow = getattr(import_module(f"masters.flows.{name}"), name)
        wait_until_ready(url)
        return flow(settings, **arguments)
