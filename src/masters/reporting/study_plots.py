"""Plots of a study: accuracy of the arms, and validation accuracy against the learning rate."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from masters.evaluation.study_runs import StudyRuns
from masters.reporting.plots import render_png


def plot_study(found: StudyRuns, arms: Sequence[dict]) -> dict[str, bytes]:
    """Return PNGs by name, without plots that have no finished run. `arms` are rows of `summarize_arm`."""
    figures = {}
    if any(row["seeds"] for row in arms):
        figures["accuracy"] = draw_accuracy(found, arms)
    if any(row["validation"] for row in arms):
        figures["learning-rates"] = draw_learning_rates(found, arms)
    return {name: render_png(figure) for name, figure in figures.items()}


def draw_accuracy(found: StudyRuns, arms: Sequence[dict]) -> Figure:
    """Draw a row for each arm: the accuracy of each seed, their mean with its interval, and the untrained student."""
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for position, row in enumerate(arms):
        points = [run.accuracy for run in found.test_results(row["arm"]).values()]
        axes.plot(points, [position] * len(points), ".", color="tab:gray", alpha=0.6)
        if row["untrained"] is not None:
            axes.plot(row["untrained"], position, "x", color="tab:red")
        if row["interval"]:
            axes.plot(row["interval"], [position, position], color="tab:blue")
            axes.plot(row["accuracy"], position, "o", color="tab:blue")
    axes.set_yticks(range(len(arms)), [row["arm"] for row in arms])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on the test split: seeds (dots), mean and its 95 % interval over seeds, untrained (x)")
    return figure


def draw_learning_rates(found: StudyRuns, arms: Sequence[dict]) -> Figure:
    """Draw a curve for each arm: mean validation accuracy by learning rate, with each seed and the chosen rate."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(row for row in arms if row["validation"]):
        color = f"C{number}"
        runs = [run for cell, run in found.results.items() if (cell.phase, cell.arm) == ("tuning", row["arm"])]
        axes.plot([run.learning_rate for run in runs], [run.accuracy for run in runs], ".", color=color, alpha=0.4)
        rates, means = ([point[name] for point in row["validation"]] for name in ("learning_rate", "accuracy"))
        axes.plot(rates, means, color=color, label=row["arm"])
        axes.plot(row["learning_rate"], max(means), "o", color=color)
    axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy on the validation split (chosen: o)")
    axes.legend(fontsize="small")
    return figure
