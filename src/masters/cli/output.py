"""Print plans, summaries and scores as tables."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from masters.config import Config
from masters.config.stages import Stage

if TYPE_CHECKING:
    from rich.console import Console


def show_plan(config: Config, as_json: bool, rebuild: list[Stage]) -> None:
    """Print a line per stage, or one JSON object."""
    from masters.flows.plan import plan

    lines = plan(config, rebuild)
    if as_json:
        typer.echo(json.dumps({"stages": lines}))
        return
    for line in lines:
        changed = f"  changed: {', '.join(line['changed'])}" if line["changed"] else ""
        typer.echo(f"{line['name']:<10} {line['outcome']:<7} {line['fingerprint'] or '(after its inputs)'}{changed}")


def show_summary(summary: dict) -> None:
    """Print the summary of a distillation, a night or an evaluation."""
    from rich.console import Console

    console = Console(markup=False)  # names may contain brackets
    if "student" in summary:
        _print_scores(console, summary)
    _print_evaluation(console, summary)
    _print_stages(console, summary)
    if "nightly" in summary:
        night = summary["nightly"]
        console.print(f"{night['outcome']}; champion: version {night['champion']}; {'; '.join(night['reasons'])}")
    if "student" in summary:
        console.print(f"student: {summary['student']['after']['uri']}", soft_wrap=True)
    uri = summary["mlflow"]["tracking_uri"]
    is_server = uri.startswith(("http://", "https://"))
    mlflow = _command_line("mlflow", "ui", "--host", "127.0.0.1", "--backend-store-uri", uri)
    console.print(f"look at the run: {uri if is_server else mlflow}", soft_wrap=True)
    prefect = _command_line("prefect", "server", "start", "--host", "127.0.0.1")
    console.print(f"and at its flow run: {prefect}", soft_wrap=True)


def _command_line(program: str, *arguments: str) -> str:
    """Return a command that a shell takes as it is, also where the environment of this program is not active."""
    path = program if shutil.which(program) else str(Path(sys.executable).with_name(program))
    return shlex.join([path, *arguments])


def _print_scores(console: "Console", summary: dict) -> None:
    """Print the accuracy of the teachers and of the student before and after training."""
    from rich.table import Table

    title = f"{summary['split']} split, greedy, through vLLM"
    table = Table("model", summary["metric"], "standard error", "questions", title=title)
    student = summary["student"]
    scores = [(teacher["name"], teacher) for teacher in summary["teachers"]]
    scores += [("student before", student["before"]), ("student after", student["after"])]
    for name, score in scores:
        table.add_row(name, f"{score['accuracy']:.2%}", f"{score['standard_error']:.2%}", str(score["n"]))
    console.print(table)


def _print_stages(console: "Console", summary: dict) -> None:
    from rich.table import Table

    table = Table("stage", "outcome", "rows", "rejected", "seconds")
    for stage in summary["stages"]:
        counts = (str(stage["rows"]), str(stage["rejected"]), f"{stage['seconds']:.1f}")
        table.add_row(stage["name"], stage["outcome"], *counts)
    console.print(table)
    for stage in summary["stages"]:
        if signal := stage.get("signal"):
            shares = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in signal.items())
            console.print(f"training signal, {stage['name']}: {shares}", soft_wrap=True)


def _print_evaluation(console: "Console", summary: dict) -> None:
    """Print the scores of `masters evaluate`: a line per model, then a table of benchmarks per model."""
    from rich.table import Table

    for model, score in summary.get("scores", {}).items():
        accuracy = f"{score['accuracy']:.2%} (standard error {score['standard_error']:.2%}) of {score['n']} questions"
        console.print(f"{model}: {summary['metric']} {accuracy}", soft_wrap=True)
    for model, rows in summary.get("benchmarks", {}).items():
        table = Table("task", "version", "metric", "filter", "value", "standard error", "documents", title=model)
        for row in rows:
            error = "" if row["standard_error"] is None else f"{row['standard_error']:.2g}"
            documents = "" if row["n"] is None else str(row["n"])
            names = (row[key] for key in ("task", "version", "metric", "filter"))
            table.add_row(*names, f"{row['value']:.4g}", error, documents)
        console.print(table)
