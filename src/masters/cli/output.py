"""What commands print for people: plans, summaries and scores as tables."""

import json
from typing import TYPE_CHECKING

import typer

from masters.config import Config
from masters.config.stages import Stage

if TYPE_CHECKING:
    from rich.console import Console


def show_plan(settings: Config, as_json: bool, rebuild: list[Stage]) -> None:
    from masters.flows.plan import plan

    lines = plan(settings, rebuild)
    if as_json:
        typer.echo(json.dumps({"stages": lines}))
    for line in lines if not as_json else []:
        changed = f"  changed: {', '.join(line['changed'])}" if line["changed"] else ""
        typer.echo(f"{line['name']:<10} {line['outcome']:<7} {line['fingerprint'] or '(after its inputs)'}{changed}")


def show_summary(summary: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # names may hold brackets
    if "student" in summary:
        scores = Table(
            "model",
            summary["metric"],
            "standard error",
            "questions",
            title=f"{summary['split']} split, greedy, through vLLM",
        )
        student = summary["student"]
        rows = [(t["name"], t) for t in summary["teachers"]] + [
            ("student before", student["before"]),
            ("student after", student["after"]),
        ]
        for name, s in rows:
            scores.add_row(name, f"{s['accuracy']:.2%}", f"{s['standard_error']:.2%}", str(s["n"]))
        console.print(scores)
    _evaluation(console, summary)
    stages = Table("stage", "outcome", "rows", "rejected", "seconds")
    for s in summary["stages"]:
        stages.add_row(s["name"], s["outcome"], str(s["rows"]), str(s["rejected"]), f"{s['seconds']:.1f}")
    console.print(stages)
    if "nightly" in summary:
        told = summary["nightly"]
        console.print(f"{told['outcome']}; champion: version {told['champion']}; {'; '.join(told['reasons'])}")
    if "student" in summary:
        console.print(f"student: {summary['student']['after']['uri']}", soft_wrap=True)
    uri = summary["mlflow"]["tracking_uri"]
    console.print(f"look at the run: mlflow ui --host 127.0.0.1 --backend-store-uri {uri}", soft_wrap=True)
    console.print("and its flow run: prefect server start --host 127.0.0.1", soft_wrap=True)


def _evaluation(console: "Console", summary: dict) -> None:
    """Of `evaluate`: each model on the evaluation split, then a table of benchmarks a model."""
    from rich.table import Table

    for model, score in summary.get("scores", {}).items():
        told = f"{score['accuracy']:.2%} (standard error {score['standard_error']:.2%}) of {score['n']} questions"
        console.print(f"{model}: {summary['metric']} {told}", soft_wrap=True)
    for model, rows in summary.get("benchmarks", {}).items():
        table = Table("task", "version", "metric", "filter", "value", "standard error", "documents", title=model)
        for row in rows:
            error = "" if row["standard_error"] is None else f"{row['standard_error']:.2g}"
            documents = "" if row["n"] is None else str(row["n"])
            names = (row[key] for key in ("task", "version", "metric", "filter"))
            table.add_row(*names, f"{row['value']:.4g}", error, documents)
        console.print(table)
