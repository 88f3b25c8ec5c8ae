"""The report of a study as Markdown tables: arms, comparisons and failed runs."""

from collections.abc import Mapping, Sequence

from masters.evaluation.study_results import Cell
from masters.reporting.markdown import render_table


def render_study(arms: Sequence[dict], comparisons: Sequence[dict], errors: Mapping[Cell, str]) -> str:
    """Return the report as Markdown: arms, comparisons and failed runs."""
    parts = [render_table([format_arm(row) for row in arms])]
    if edges := [row["arm"] for row in arms if row["at_edge"]]:
        parts.append(
            f"\\* {', '.join(edges)}: the best learning rate lies at the edge of those tried; one beyond it may be "
            "better."
        )
    if comparisons:
        parts += [render_table([format_comparison(row) for row in comparisons]), EXPLANATION]
    parts += [f"failed: {cell.name}: {' '.join(error.split())}" for cell, error in errors.items()]
    return "\n\n".join(parts) + "\n"


EXPLANATION = (
    "Differences are means over seeds and test questions, paired by both. By image: the seeds are fixed, images vary "
    "(clustered interval, exact sign-flip test). By seed: questions and responses are fixed, the order of training "
    "varies (paired t). The primary p is the larger of the two, corrected by Holm over the planned comparisons; "
    "intervals hold together at 95 % (Bonferroni)."
)


def format_arm(row: dict) -> dict[str, str]:
    """Format a row of `summarize_arm` for a table."""
    rate = "none finished" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
    return {
        "arm": row["arm"],
        "learning rate": rate + (" \\*" if row["at_edge"] else ""),
        "seeds": str(row["seeds"]),
        "accuracy": _format_percent(row["accuracy"]),
        "sd over seeds": _format_percent(row["standard_deviation"]),
        "untrained": _format_percent(row["untrained"]),
        "gain": _format_difference(row["gain"]),
        "failed": str(len(row["errors"])),
    }


def format_comparison(row: dict) -> dict[str, str]:
    """Format a row of `compare_arms` for a table."""
    named = {"comparison": f"{row['better']} - {row['than']}"}
    columns = ("difference", "interval by image", "interval by seed", "p by image", "p by seed", "corrected p")
    if "error" in row:
        return named | dict.fromkeys(columns, "") | {"difference": row["error"]}
    cells = [
        _format_difference(row["difference"]),
        *(_format_interval(row[f"{unit}_interval"]) for unit in ("image", "seed")),
    ]
    cells += [f"{row[name]:.2g}" for name in ("image_p_value", "seed_p_value", "corrected")]
    return named | dict(zip(columns, cells, strict=True))


def _format_percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _format_difference(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f}"


def _format_interval(ends: Sequence[float]) -> str:
    return f"{_format_difference(ends[0])} to {_format_difference(ends[1])}"
