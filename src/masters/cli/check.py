"""`masters check`: check a configuration and estimate its work before hours are spent."""

from typing import TYPE_CHECKING, Annotated

import typer

from masters.cli.options import ConfigPath, Overrides
from masters.common.errors import MastersError
from masters.config import Config
from masters.config.allowlist import check_config
from masters.config.loading import load

if TYPE_CHECKING:
    from masters.checks.model_folder import JudgeServer
    from masters.checks.preflight import Resources
    from masters.data.question_selection import Selection
    from masters.rewards.judge_probe import ProbeResult

app = typer.Typer()


@app.command()
def check(
    config_path: ConfigPath,
    overrides: Overrides = None,
    parity: Annotated[
        bool,
        typer.Option(
            "--parity",
            help="Also load the models and compare fast code with plain code, and vLLM with transformers",
        ),
    ] = False,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Price of a device hour, for the cost estimate")
    ] = None,
) -> None:
    """Check configuration, data, models, store, tracking and memory; estimate time and cost."""
    config = load(config_path, overrides)
    check_config(config)

    from masters.checks.engine_limits import check_engine_limits
    from masters.checks.estimates import describe_estimates, describe_memory
    from masters.checks.model_folder import JudgeServer
    from masters.checks.preflight import list_warnings, preflight
    from masters.checks.prompt_lengths import check_prompt_lengths
    from masters.checks.rows import list_row_warnings, select_valid_rows
    from masters.infra.local_prefect import check_home
    from masters.tracking.client import redact_uri
    from masters.tracking.experiments import check_tracking

    check_home()
    resources = preflight(config)
    tracking_uri, notes = check_tracking(config, resources.storage)
    _check_pools(config, resources)
    check_engine_limits(config, [resources.student, *resources.teachers])
    selection = select_valid_rows(config, resources)
    warnings = [*list_warnings(config, resources.student), *list_row_warnings(selection)]
    warnings += [*check_prompt_lengths(config, resources), *notes]
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    _print_inputs(config, resources, selection)
    probe = _ask_judge(config, resources.judge) if isinstance(resources.judge, JudgeServer) else None
    typer.echo(f"tracking   {redact_uri(tracking_uri)}")
    typer.echo(f"memory     {describe_memory(config, resources)}")
    for line in describe_estimates(config, resources, selection, price, probe):
        typer.echo(line)
    if parity:
        _check_parity(config, resources)
    typer.echo("ready")


def _check_pools(config: Config, resources: "Resources") -> None:
    """Raise InputError if a work pool cannot build its stages. Without pools, no Prefect server is asked."""
    if not config.runtime.pools.names:
        return
    from masters.infra.local_prefect import prefect_api

    with prefect_api() as api:
        api.wait_until_ready()
        from masters.tasks.work_pools import check_pools

        check_pools(config, resources.storage)


def _print_inputs(config: Config, resources: "Resources", selection: "Selection") -> None:
    from masters.checks.rows import describe_rows

    typer.echo(f"source     {config.data.source}")
    for line in describe_rows(selection):
        typer.echo(line)
    typer.echo(f"student    {resources.student.folder} ({resources.student.digest[:16]})")
    for teacher in resources.teachers:
        typer.echo(f"teacher    {teacher.folder} ({teacher.digest[:16]})")
    typer.echo(f"store      {resources.storage.uri('')}: read, write, conditional write")


def _ask_judge(config: Config, server: "JudgeServer") -> "ProbeResult":
    """Ask the judge's server one question and print its verdict. Raises InputError if it gives none."""
    from masters.checks import judge

    result = judge.ask_test_question(server, config, judge.CHECK_RETRIES)
    judge.require_verdict(server, result)
    for warning in judge.list_probe_warnings(server, result):
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"judge      {judge.describe_probe(server, result)}")
    return result


def _check_parity(config: Config, resources: "Resources") -> None:
    """Print the measured differences. Raises MastersError if one is larger than a rounding error."""
    from masters.checks.parity import compare_models

    differences = compare_models(config, resources)
    for difference in differences:
        verdict = "ok" if difference.is_rounding else "DIFFERENT"
        typer.echo(f"{verdict:<10} {difference.found:.1e} (limit {difference.limit:.0e})  {difference.name}")
    if not all(difference.is_rounding for difference in differences):
        raise MastersError(
            "on this machine the fast code gives other results than the plain code: see the lines marked DIFFERENT"
        )
