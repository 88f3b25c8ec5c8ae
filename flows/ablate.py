"""A grid over switches of a configuration: a distillation for every combination, one after the other, and a table."""

import re
from dataclasses import dataclass
from itertools import product
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from masters.config import Config
from masters.config_file import changed
from masters.errors import InputError, MastersError
from masters.flows.attempts import attempt, patient
from masters.flows.distill import distill
from masters.preflight import preflight
from masters.secrets import masked
from masters.tasks.markdown import inert

GIVEN = ("name", "store")  # each combination gets its own name; equal stages are shared through one store


@dataclass(frozen=True)
class Cell:
    """One combination of the grid."""

    values: dict[str, Any]
    config: Config


@flow(name="ablate", flow_run_name="{config.name}", persist_result=False)
def ablate(config: Config, grid: dict[str, list[Any]]) -> list[dict]:
    """Compare what switches do to the student. Returns a row a combination, also as a table artifact.

    A combination that fails is a row with its error; the others still run, and the flow fails at the end.

    Args:
        config: What every combination shares.
        grid: Values by key, e.g. {"train.beta": [0, 0.1], "rewards.distillation": ["minmax", "off"]}.
    """
    with attempt():
        every = cells(config, grid)
        for cell in every:
            patient(lambda cell=cell: preflight(cell.config))
        rows = []
        for cell in every:
            rows.append(cell.values | _result(cell.config))
            create_table_artifact([{k: inert(str(v)) for k, v in row.items()} for row in rows], "ablation")
        failed = [row["run"] for row in rows if row["error"]]
        if failed:
            raise MastersError(f"{len(failed)} of {len(rows)} combinations failed: {', '.join(failed)}")
    return rows


def cells(config: Config, grid: dict[str, list[Any]]) -> list[Cell]:
    """Every combination, each under its own name. Raises InputError before anything has run."""
    if not grid or not all(grid.values()):
        raise InputError(f"grid: expected values for at least one key, found {grid}")
    for key in grid:
        if key.split(".")[0] in GIVEN:
            raise InputError(f"grid: {key} is not a switch: it changes nothing that is made")
    every = []
    for number, values in enumerate(product(*grid.values()), 1):
        chosen = dict(zip(grid, values, strict=True))
        said = "-".join(f"{key.split('.')[-1]}-{value}" for key, value in chosen.items())
        name = f"{config.name[:40]}-{number}-{re.sub(r'[^A-Za-z0-9]+', '-', said)}"[:64].rstrip("-")
        every.append(Cell(chosen, changed(config, chosen | {"name": name})))
    return every


def _result(config: Config) -> dict:
    empty = dict(
        run=config.name, metric=None, before=None, after=None, standard_error=None, mlflow_run_id=None, error=None
    )
    try:
        summary = distill(config)
    except Exception as error:  # of whatever kind: the others still run
        return empty | dict(error=masked(str(error) or type(error).__name__))
    student = summary["student"]
    return empty | dict(
        metric=summary["metric"], before=student["before"]["accuracy"], after=student["after"]["accuracy"],
        standard_error=student["after"]["standard_error"], mlflow_run_id=summary["mlflow"]["run_id"],
    )  # fmt: skip
