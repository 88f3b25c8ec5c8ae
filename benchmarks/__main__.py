"""`python -m benchmarks NAME [--json]`: measure, print a table, and keep the rows in `runs/bench/NAME.json`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import Benchmark, load_benchmark, measure_on_gpu
from masters.cli.options import Json
from masters.common.errors import InputError, MastersError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(name: Annotated[Benchmark, typer.Argument(help="What to measure")], as_json: Json = False) -> None:
    """Compare our fast paths with what a user would write otherwise, on this machine."""
    try:
        rows = [row.as_dict() for row in load_benchmark(name)()]
    except ImportError as error:
        raise InputError(f"expected the baselines' libraries (extra dev), found {error}: run `make setup`") from None
    gpu_error = None
    try:
        rows += [row.as_dict() for row in measure_on_gpu(name)]
    except Exception as error:  # rows that took minutes on the CPU are shown first
        gpu_error = error
    print_rows(name, rows, as_json)
    if as_json:
        print(json.dumps(dict(name=name, rows=rows)))
    file = Path("runs", "bench", f"{name}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(name=name, rows=rows), indent=1) + "\n")
    if gpu_error:
        raise MastersError(f"bench {name}: GPU rows failed, the others are in {file}: {gpu_error!r}") from gpu_error


def print_rows(name: str, rows: list[dict], to_stderr: bool) -> None:
    """Print the rows as a table of medians with their spread."""
    table = Table("case", "ours", "baseline", "unit", "ratio", title=f"{name}: median (smallest to largest)")
    for row in rows:
        sides = [
            f"{row[side]:.4g}" + (f" ({low:.4g} to {high:.4g})" if low != high else "")
            for side, (low, high) in zip(("ours", "baseline"), row["spread"], strict=True)
        ]
        table.add_row(row["case"], *sides, row["unit"], f"{row['ratio']:.2f} x" if row["ratio"] else "-")
    Console(stderr=to_stderr, markup=False).print(table)


def main() -> None:
    """Run the command; an expected error is one line on stderr and its exit code."""
    try:
        app()
    except MastersError as error:
        typer.echo(f"benchmarks: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
