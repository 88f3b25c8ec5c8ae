"""Plots of a training round from the tables of its artifacts, so that reused stages have them too."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from masters.store.artifacts import Artifact

pc: Any = pyarrow.compute  # its functions are created at import, which type checkers cannot see
MAX_POINTS = 400  # of a curve; with more steps, each point is a mean over a part of them
MAX_RESPONSES = 500_000  # in a distribution; of more, every second, fourth, ... is taken
SOURCES = {"teacher": "tab:blue", "student": "tab:orange", "label": "tab:green"}
SHARES = {
    "greedy_end": "end tokens that are the greedy choice",
    "rare_negatives_gradient": "reward gradient on tokens given up",
    "distillation_agreement": "distillation reward agrees with the verdict",
    "reward_agreement": "reward agrees with the verdict",
}
LOG_PI = {
    f"log_pi_{verdict}_{source}": f"{verdict}, {source}"
    for verdict in ("right", "wrong")
    for source in ("teacher", "student")
}
MIN_DIVERGENCE = 1e-6  # nats; smaller ones are drawn here


def plot_training(trained: Sequence[Artifact]) -> dict[str, bytes]:
    """Return PNGs of a round by name. Objectives without rewards or divergences have no plot of them.

    `trained` are the round's train artifacts, in the order of its mask stages.
    """
    steps = pa.concat_tables(batch for part in trained for batch in part.batches("history"))
    columns = ["teacher_ratio", "source", "divergence", "reward"]
    responses, stride = subsample(
        (batch for part in trained for batch in part.batches("rewards", columns)), MAX_RESPONSES
    )
    figures = {"training": draw_training(steps)}
    if steps["entropy"].null_count < steps.num_rows:
        figures["diagnostics"] = draw_diagnostics(steps)
    note = f" (every {stride}th)" if stride > 1 else ""
    for name, column, label in (
        ("rewards", "reward", f"reward of a response, accuracy + distillation{note}"),
        ("divergences", "divergence", f"divergence of student and masked teacher on a response, nats{note}"),
    ):
        known = responses.filter(pc.is_valid(responses[column]))
        if known.num_rows:
            figures[name] = draw_distributions(known, column, label, logarithmic=column == "divergence")
    return {name: render_png(figure) for name, figure in figures.items()}


def subsample(batches: Iterable[pa.Table], limit: int) -> tuple[pa.Table, int]:
    """Return every n-th row and n, the smallest power of two that leaves at most `limit` rows.

    Holds little more than `limit` rows in memory.
    """
    kept, stride, seen = [], 1, 0
    for batch in batches:
        kept.append(batch.take(pa.array(range(-seen % stride, batch.num_rows, stride), pa.int64())))
        seen += batch.num_rows
        while sum(part.num_rows for part in kept) > limit:
            rows = pa.concat_tables(kept)
            kept, stride = [rows.take(pa.array(range(0, rows.num_rows, 2), pa.int64()))], 2 * stride
    return pa.concat_tables(kept), stride


def draw_training(steps: pa.Table) -> Figure:
    """Draw loss and divergence above, the share of predicted labels and the teacher's mask ratio below."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    step = _column(steps, "step")
    for name in ("loss", "divergence"):
        values = _column(steps, name)
        if not np.isnan(values).all():
            upper.plot(_means(step), _means(values), label=name, linewidth=1)
    upper.set_ylabel("mean over a step's questions")
    upper.legend()
    probe = _column(steps, "probe_accuracy")
    measured = ~np.isnan(probe)
    lower.plot(step[measured], probe[measured], "o-", color="tab:green")
    lower.set(xlabel="step", ylabel="labels predicted token by token", ylim=(-0.03, 1.03))
    masked = lower.twinx()
    masked.step(step, _column(steps, "mask_ratio"), where="mid", color="tab:gray", linestyle="--")
    masked.set_ylabel("mask ratio (dashed)")
    masked.set_ylim(bottom=-0.01)
    return figure


def draw_diagnostics(steps: pa.Table) -> Figure:
    """Draw log pi of right and wrong responses, the entropy of the student, and the shares in `SHARES`."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    groups = (LOG_PI, "log pi, nats a token"), ({"entropy": "entropy"}, "nats a token"), (SHARES, "share")
    for panel, (columns, label) in zip(panels, groups, strict=True):
        for column in columns:
            known = steps.filter(pc.is_valid(steps[column]))
            if known.num_rows:
                panel.plot(_means(_column(known, "step")), _means(_column(known, column)), label=columns[column])
        panel.set_ylabel(label)
        if panel.lines:
            panel.legend(fontsize="x-small")
    panels[-1].set(xlabel="step", ylim=(-0.03, 1.03))
    return figure


def draw_distributions(responses: pa.Table, column: str, label: str, logarithmic: bool) -> Figure:
    """Draw a histogram of a column for each mask ratio of the teacher, by source of the responses."""
    values, ratios = _column(responses, column), _column(responses, "teacher_ratio")
    if logarithmic:
        values = np.maximum(values, MIN_DIVERGENCE)
    sources = np.array(responses["source"].to_pylist())
    edges = _bin_edges(values, logarithmic)
    panels = sorted(set(ratios), reverse=True)
    figure = Figure(figsize=(8, 1.2 + 1.1 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for panel, ratio in zip(axes, panels, strict=True):
        by_source = {source: values[(ratios == ratio) & (sources == source)] for source in ("teacher", "student")}
        _draw_histograms(panel, {source: group for source, group in by_source.items() if len(group)}, edges)
        panel.set_ylabel(f"mask {ratio:g}")
    if logarithmic:
        axes[-1].set_xscale("log")
    axes[-1].set_xlabel(label)
    figure.supylabel("share of responses")
    return figure


def _draw_histograms(panel: Axes, by_source: dict[str, np.ndarray], edges: np.ndarray) -> None:
    for source, values in by_source.items():
        weights = np.full(len(values), 1 / len(values))
        label = f"{source}, n = {len(values):,}, mean {values.mean():.3g}"
        style: dict[str, Any] = dict(histtype="step") if source == "student" else dict(histtype="stepfilled", alpha=0.4)
        panel.hist(values, list(edges), weights=weights, color=SOURCES[source], label=label, **style)
    panel.legend(fontsize="x-small")


def _bin_edges(values: np.ndarray, logarithmic: bool) -> np.ndarray:
    low, high = values.min(), values.max()
    if low == high:
        low, high = low * 0.5 - 0.5 * (not logarithmic), high * 1.5 + 0.5
    return np.geomspace(low, high, 41) if logarithmic else np.linspace(low, high, 41)


def _column(table: pa.Table, name: str) -> np.ndarray:
    """Return a column as floats, with NaN for missing values."""
    return table[name].cast(pa.float64()).to_numpy()


def _means(values: np.ndarray) -> list[float]:
    """Return means over at most `MAX_POINTS` equal parts of the values."""
    return [float(part.mean()) for part in np.array_split(values, min(MAX_POINTS, len(values)))]


def render_png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()
