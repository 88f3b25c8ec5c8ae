"""A page of Markdown with example training questions: image, responses, verdicts and rewards."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence

from PIL import Image

from masters.data import question_shards
from masters.data.images import to_rgb
from masters.reporting.markdown import embed_image, escape_text, render_table
from masters.store.artifacts import Artifact

PER_KIND = 2  # questions
MAX_CANDIDATES = 2000  # questions, the first by digest: a uniform sample that depends on the questions alone
MAX_ROWS = 24  # for a question
PIXELS = 160
LEGEND = "Equal responses share a row. Divergence and rewards are those of the last step that trained on the question."
KINDS = ("every response right", "some right", "none right", "no verdict")
KEY = ("source", "mask_ratio", "sample")

Responses = dict[str, dict[tuple, dict]]  # question id to KEY to columns of several tables


def render_gallery(
    data: Artifact, responses: Sequence[Artifact], verdicts: Sequence[Artifact] = (), trained: Sequence[Artifact] = ()
) -> str:
    """Return the page, with questions of every kind in `KINDS`. Equal tables give equal pages.

    `responses`, `verdicts` and `trained` are the artifacts of a round, in the order of its mask stages.
    """
    refs = question_shards.read_refs(data, "train")[:MAX_CANDIDATES]
    found: Responses = {ref.question_id: {} for ref in refs}
    _collect_rows(found, verdicts, "verdicts", ["score", "status"])
    chosen = dict(_choose_questions(refs, found))
    found = {ref.question_id: found[ref.question_id] for ref in chosen}
    _collect_rows(found, responses, "responses", ["text"])
    # rows are in the order of steps, so the values of the last step stay
    _collect_rows(found, trained, "rewards", ["divergence", "reward_distillation", "reward", "advantage"])
    rows = question_shards.QuestionReader(data).rows(tuple(chosen))
    parts = [
        _render_question(row, kind, found[ref.question_id])
        for row, (ref, kind) in zip(rows, chosen.items(), strict=True)
    ]
    return "\n\n".join(["# Questions with their responses", LEGEND, *parts])


def _collect_rows(found: Responses, artifacts: Sequence[Artifact], name: str, columns: list[str]) -> None:
    for row in (row for artifact in artifacts for row in artifact.rows(name, ["question_id", *KEY, *columns])):
        if row["question_id"] in found:
            key = tuple(row[part] for part in KEY)
            found[row["question_id"]].setdefault(key, {}).update({column: row[column] for column in columns})


def _choose_questions(
    refs: list[question_shards.QuestionRef], found: Responses
) -> Iterator[tuple[question_shards.QuestionRef, str]]:
    """Yield the first `PER_KIND` questions of every kind, with the kind."""
    for kind in KINDS:
        matching = [ref for ref in refs if _classify(found[ref.question_id]) == kind]
        yield from ((ref, kind) for ref in matching[:PER_KIND])


def _classify(responses: dict[tuple, dict]) -> str:
    scores = [row["score"] for row in responses.values() if row["score"] is not None]
    if not scores:
        return "no verdict"
    right = sum(score >= 0.5 for score in scores)
    return KINDS[0] if right == len(scores) else "some right" if right else "none right"


def _render_question(row: dict, kind: str, responses: dict[tuple, dict]) -> str:
    ordered = sorted(responses.items(), key=lambda item: (item[0][0] != "teacher", -(item[0][1] or 0), item[0][2]))
    shown = _merge_equal_rows([_render_response(key, columns) for key, columns in ordered if "text" in columns])
    heading = [
        f"## {escape_text(row['question'], 300)}",
        embed_image(make_thumbnail(row["image"]), "png", "the question's image"),
        f"**{kind}**; reference answer: {escape_text(row['answer'])}; question {escape_text(row['question_id'])}",
    ]
    omitted = [f"... and {len(shown) - MAX_ROWS} more rows"] if len(shown) > MAX_ROWS else []
    return "\n\n".join([*heading, *([render_table(shown[:MAX_ROWS])] if shown else []), *omitted])


def _merge_equal_rows(responses: list[dict[str, str]]) -> list[dict[str, str]]:
    """Merge equal rows and add their number as a column."""
    count = Counter(tuple(row.items()) for row in responses)
    return [dict(row[:1]) | {"times": str(times)} | dict(row[1:]) for row, times in count.items()]


def _render_response(key: tuple, columns: dict) -> dict[str, str]:
    source, ratio, _ = key
    return {
        "by": source if ratio is None else f"{source}, mask {ratio:g}",
        "verdict": _format_number(columns.get("score"))
        if columns.get("status") == "ok"
        else escape_text(columns.get("status", "")),
        "divergence": _format_number(columns.get("divergence")),
        "R distill": _format_number(columns.get("reward_distillation")),
        "reward": _format_number(columns.get("reward")),
        "advantage": _format_number(columns.get("advantage")),
        "response": escape_text(columns["text"]),  # last, because pages do not wrap cells
    }


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def make_thumbnail(image: bytes) -> bytes:
    """Return a PNG that fits into a square of `PIXELS`."""
    with Image.open(io.BytesIO(image)) as opened:
        small = to_rgb(opened)
    scale = PIXELS / max(small.size)
    width, height = (max(1, round(side * scale)) for side in small.size)
    sink = io.BytesIO()
    small.resize((width, height)).save(sink, "png")
    return sink.getvalue()
