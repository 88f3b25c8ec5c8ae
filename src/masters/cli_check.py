"""`masters check`: what can be refused, and what can be known, before hours are spent."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from masters.allowed import check_config
from masters.config import Config
from masters.config_file import load
from masters.errors import MastersError
from masters.options import ConfigPath, Overrides

if TYPE_CHECKING:
    from masters.preflight import Ready

ESTIMATED_FROM = 32  # questions

app = typer.Typer()


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Also load the models: fast paths against plain ones, vLLM against PyTorch")
    ] = False,
    price: Annotated[
        float | None, typer.Option("--price", min=0, help="Of an hour of a device, in any currency, for the estimate")
    ] = None,
) -> None:
    """Before hours are spent: configuration, source, models, families and tokenizers, store, memory, time, cost."""
    settings = load(config, overrides)
    check_config(settings)

    from masters.preflight import preflight, warnings_of

    ready = preflight(settings)
    for line in warnings_of(settings):
        typer.echo(f"warning: {line}", err=True)
    typer.echo(f"source     {settings.data.source}")
    typer.echo(f"student    {ready.student.folder} ({ready.student.digest[:16]})")
    for teacher in ready.teachers:
        typer.echo(f"teacher    {teacher.folder} ({teacher.digest[:16]})")
    typer.echo(f"store      {ready.storage.uri('')}: read, write, conditional write")
    typer.echo(f"memory     {_memory(settings, ready)}")
    for line in _estimate(settings, ready, price):
        typer.echo(line)
    if parity:
        _parity(settings, ready)
    typer.echo("ready")


def _memory(settings: Config, ready: "Ready") -> str:
    """What training needs at least, with the largest teacher, whatever its token budget. Raises InputError."""
    from masters.models import devices, footprint

    train, ranks = settings.train, settings.runtime.train_processes
    device = devices.of_rank(0, ranks)
    teachers = [None] if train.objective == "sft" else [teacher.folder for teacher in ready.teachers]
    needs = [
        footprint.footprint(ready.student.folder, one, train, (0, 0), ranks, False, device, settings.runtime).on(device)
        for one in teachers
    ]
    largest, (available, sharing) = max(needs, key=lambda one: one.total), footprint.free(device, ranks)
    footprint.check(largest, available, sharing, device, 0)
    needed = sharing * largest.total / footprint.GIB
    return (
        f"training takes {needed:.2f} GiB and its activations, {available / footprint.GIB:.2f} GiB are free on {device}"
    )


def _parity(settings: Config, ready: "Ready") -> None:
    """Print each difference with its verdict. Raises MastersError if one is more than rounding."""
    from masters.tasks.check import parity

    differences = parity(settings, ready)
    for line in differences:
        verdict = "ok" if line["found"] <= line["limit"] else "DIFFERENT"
        typer.echo(f"{verdict:<10} {line['found']:.1e} (limit {line['limit']:.0e})  {line['name']}")
    if any(line["found"] > line["limit"] for line in differences):
        raise MastersError("this machine does not compute the method as written; see the lines marked DIFFERENT")


def _estimate(settings: Config, ready: "Ready", price: float | None) -> Iterator[str]:
    """Lines on the work ahead, the least time that it takes here, and what that costs."""
    import torch

    from masters.models import estimate
    from masters.models.precision import frozen_dtype
    from masters.tasks.check import sample

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    rows = sample(settings, ready, ESTIMATED_FROM)
    of = estimate.counted(settings, ready.source, estimate.prompt_lengths(ready.student.folder, rows))
    student, teachers = ready.student.folder, [teacher.folder for teacher in ready.teachers]
    work = estimate.flops(settings, estimate.weights(student), [estimate.weights(one) for one in teachers], of)
    computed_in = frozen_dtype(settings.train)
    fast = estimate.speed(device, computed_in)
    hours = estimate.hours(work, fast)
    total = sum(hours.values())
    parts = ", ".join(f"{stage} {share / total:.0%}" for stage, share in hours.items() if share)
    yield (
        f"work       {of.train:,.0f} training and {of.evaluation:,.0f} evaluation questions, prompts of "
        f"{of.prompt:.0f} tokens (of {len(rows)}): {sum(work.values()):.2g} FLOPs if no answer comes twice ({parts})"
    )
    yield (
        f"time       about {total:.2g} hours of {device}, at {estimate.SHARE:.0%} of the {fast / 1e12:.3g} TFLOP/s "
        f"that it shows in {computed_in} now; decoding and small models reach less"
    )
    cost = f"{total * price:.2f} at {price:g} an hour" if price is not None else "--price says what that costs"
    yield f"cost       {total:.2g} device hours: {cost}"
