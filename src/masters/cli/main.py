"""The command line. Errors are one line on stderr. Exit codes: 0 success, 1 failure, 2 usage or bad input.

Heavy libraries are imported inside the commands, after the arguments are parsed, so that `--help` is fast.
"""

import atexit
import gc
import json
import shlex
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from masters.cli import check, registry
from masters.cli.options import ConfigPath, Json, Overrides, Rebuild, silence_libraries
from masters.cli.output import show_plan, show_summary
from masters.common import disk_space
from masters.common.errors import InputError, MastersError, RunsFailed
from masters.common.machine import cache_folder
from masters.common.redaction import redact
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.loading import load
from masters.config.stages import Stage
from masters.config.study_file import arm_config, load_study
from masters.infra.settings import Services

INTERRUPTED = 130  # exit code that Typer returns after a KeyboardInterrupt

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distill large vision-language models with masked teachers.",
)
for commands in (check.app, registry.app):
    app.add_typer(commands)  # without a name, its commands become commands of `masters` itself


@app.command()
def distill(
    config_path: ConfigPath,
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would be built or reused, without building anything")
    ] = False,
    rebuild: Rebuild = None,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline. Run again, it reuses what is built and continues what is not."""
    config = load(config_path, overrides)
    if plan:
        show_plan(config, as_json, rebuild or [])
        return
    _run_and_show("distill", config, as_json, rebuild=rebuild)


@app.command()
def stage(
    name: Annotated[Stage, typer.Argument(help="The last stage to run")],
    config_path: ConfigPath,
    overrides: Overrides = None,
    rebuild: Rebuild = None,
    as_json: Json = False,
) -> None:
    """Run one stage and the stages that it needs."""
    _run_and_show("distill", load(config_path, overrides), as_json, rebuild=rebuild, until=name)


@app.command()
def nightly(config_path: ConfigPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Run one night: train a candidate on new data, and promote it if it is better than the champion."""
    _run_and_show("nightly", load(config_path, overrides), as_json)


@app.command()
def evaluate(
    config_path: ConfigPath,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders, Hugging Face ids, or models:/NAME@ALIAS")
    ],
    benchmarks: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark", help="Also run a benchmark: paper (all 13 of the paper), e.g. MMStar, or an lmms-eval task"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Maximum number of documents per benchmark")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Evaluate models on the evaluation split and on benchmarks."""
    config = load(config_path, overrides)
    if benchmarks:
        from masters.evaluation.benchmark_selection import select_benchmarks

        select_benchmarks(benchmarks)  # fail at once; the flow checks again, because it can be started elsewhere
    _run_and_show("evaluate", config, as_json, models=models, benchmarks=benchmarks, benchmark_limit=limit)


@app.command()
def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY", help="The TOML file of a study, e.g. configs/studies/digits.toml")
    ],
    as_json: Json = False,
    report_only: Annotated[bool, typer.Option("--report", help="Report the finished runs, and run none")] = False,
) -> None:
    """Compare ways to train over learning rates and seeds. Run again, it continues from the existing results."""
    config, design = load_study(file)
    if report_only:
        from masters.flows.study import StudyRunner

        report = StudyRunner(config, design).report_finished()
        typer.echo(json.dumps(report) if as_json else report["markdown"])
        typer.echo(f"{len(report['missing'])} runs of the study are not finished", err=True)
        return
    try:
        arms = [arm_config(config, design, arm) for arm in design.arms]
        report = _run_flow("study", config, arms, design=design)
    except RunsFailed as error:
        typer.echo(json.dumps(error.report) if as_json else error.report["markdown"])
        raise
    typer.echo(json.dumps(report) if as_json else report["markdown"])


@app.command()
def up(
    services: Annotated[
        Services, typer.Option(envvar="MASTERS_STACK", help="full: also Postgres and an S3-compatible store")
    ] = Services.LIGHT,
    as_json: Json = False,
) -> None:
    """Start the local stack on loopback: Prefect server and worker, MLflow server, deployments."""
    from masters.infra.stack import up as start_stack

    stack, is_new = start_stack(services)
    lines = [
        f"Prefect  {stack.urls['prefect_url']}",
        f"MLflow   {stack.urls['mlflow_url']}",
        "started" if is_new else "already running",
        f"to use the stack from this shell: source {shlex.quote(str(stack.folder / 'env'))}",
    ]
    typer.echo("\n".join(lines), err=as_json)
    if as_json:
        typer.echo(json.dumps(stack.urls))


@app.command()
def down() -> None:
    """Stop the local stack. Its state is kept, and interrupted runs continue after the next `masters up`."""
    from masters.infra.stack import down as stop_stack

    typer.echo("stopped" if stop_stack() else "nothing is running")


def main() -> None:
    """Run the command line. Every error becomes one line and an exit code."""
    # Runs last. The garbage collection at exit frees nothing useful and took 2 s with PyTorch loaded.
    atexit.register(gc.freeze)
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"masters: {error} (masters --help lists commands and options)", err=True)
        sys.exit(2)
    except MastersError as error:
        typer.echo(f"masters: {disk_space.describe(error)}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:  # a bug in masters, unless the disk is full
        if number := disk_space.find_errno(error):
            typer.echo(f"masters: {_describe(error)}; {disk_space.REMEDIES[number]}", err=True)
            sys.exit(1)
        typer.echo(f"masters: unexpected {type(error).__name__}: {_save_traceback(error)}", err=True)
        sys.exit(1)
    if code == INTERRUPTED:
        typer.echo("masters: interrupted; run again to continue from here", err=True)
    sys.exit(1 if code else 0)


def _save_traceback(error: Exception) -> str:
    """Write the traceback to a file. Returns the error's message with the path of the file."""
    message = _describe(error)
    try:
        file = cache_folder() / "errors" / f"{datetime.now():%Y-%m-%d-%H%M%S}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(redact("".join(traceback.format_exception(error))))
    except (OSError, InputError):
        return message
    return f"{message} (traceback: {file}; please report it)"


def _describe(error: Exception) -> str:
    """Return an error's text on one line, without secrets."""
    return " ".join(redact(str(error)).split())[:300]  # redacted first: a secret must not be cut in two


def _run_and_show(name: str, config: Config, as_json: bool, **arguments: object) -> None:
    """Run the flow of this name and print its summary."""
    summary = _run_flow(name, config, [config], **arguments)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        show_summary(summary)


def _run_flow(name: str, config: Config, checked: Sequence[Config], **arguments: object) -> dict:
    """Run the flow of this name and return its result. `checked`: the configurations that it trains with."""
    from masters.infra.local_prefect import prefect_api

    for each in checked:
        check_config(each)  # fail at once; the other checks need seconds of imports
    with prefect_api() as api:
        from masters.checks.preflight import preflight

        for each in checked:  # while the server starts; the flow checks again, because it can be started elsewhere
            preflight(each)
        silence_libraries()
        flow = getattr(import_module(f"masters.flows.{name}"), name)
        api.wait_until_ready()
        return flow(config, **arguments)
