"""A handful of training questions to look at: image, responses, verdicts and rewards, as one page of Markdown."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence

from PIL import Image

from masters.data import question_shards
from masters.data.images import rgb
from masters.reporting.markdown import inert, picture, table
from masters.store.artifacts import Artifact

EACH = 2  # questions of each kind
CANDIDATES = 2000  # questions, the first by digest: an even sample that depends on the questions alone
ROWS = 24  # of a question
PIXELS = 160
LEGEND = "Equal responses share a row. Divergence and rewards are those of the last step that trained on the question."
KINDS = ("every response right", "some right", "none right", "no verdict")
KEY = ("source", "mask_ratio", "sample")

Found = dict[str, dict[tuple, dict]]  # by question and by whose response: columns of several tables


def gallery(
    data: Artifact, responses: Sequence[Artifact], verdicts: Sequence[Artifact] = (), trained: Sequence[Artifact] = ()
) -> str:
    """Questions of every kind that there is, good and bad: the same ones whenever the tables are the same.

    `responses`, `verdicts`, `trained`: of a round, or in order of its mask stages.
    """
    refs = question_shards.references(data, "train")[:CANDIDATES]
    found: Found = {ref.question_id: {} for ref in refs}
    _gather(found, verdicts, "verdicts", ["score", "status"])
    chosen = {ref: kind for ref, kind in _chosen(refs, found)}
    found = {ref.question_id: found[ref.question_id] for ref in chosen}
    _gather(found, responses, "responses", ["text"])
    # in order of steps: what it was at the last one stays
    _gather(found, trained, "rewards", ["divergence", "reward_distillation", "reward", "advantage"])
    rows = question_shards.Reader(data).rows(tuple(chosen))
    parts = [
        _question(row, kind, found[ref.question_id]) for row, (ref, kind) in zip(rows, chosen.items(), strict=True)
    ]
    return "\n\n".join(["# Questions with their responses", LEGEND, *parts])


def _gather(found: Found, artifacts: Sequence[Artifact], name: str, columns: list[str]) -> None:
    for row in (row for artifact in artifacts for row in artifact.rows(name, ["question_id", *KEY, *columns])):
        if row["question_id"] in found:
            key = tuple(row[part] for part in KEY)
            found[row["question_id"]].setdefault(key, {}).update({column: row[column] for column in columns})


def _chosen(refs: list[question_shards.Ref], found: Found) -> Iterator[tuple[question_shards.Ref, str]]:
    """The first `EACH` of every kind, kind by kind."""
    for kind in KINDS:
        own = [ref for ref in refs if _kind(found[ref.question_id]) == kind]
        yield from ((ref, kind) for ref in own[:EACH])


def _kind(responses: dict[tuple, dict]) -> str:
    scores = [row["score"] for row in responses.values() if row["score"] is not None]
    if not scores:
        return "no verdict"
    right = sum(score >= 0.5 for score in scores)
    return KINDS[0] if right == len(scores) else "some right" if right else "none right"


def _question(row: dict, kind: str, responses: dict[tuple, dict]) -> str:
    listed = sorted(responses.items(), key=lambda item: (item[0][0] != "teacher", -(item[0][1] or 0), item[0][2]))
    shown = _counted([_response(key, columns) for key, columns in listed if "text" in columns])
    head = [
        f"## {inert(row['question'], 300)}",
        picture(thumbnail(row["image"]), "png", "the question's image"),
        f"**{kind}**; reference answer: {inert(row['answer'])}; question {inert(row['question_id'])}",
    ]
    left = [f"... and {len(shown) - ROWS} more rows"] if len(shown) > ROWS else []
    return "\n\n".join([*head, *([table(shown[:ROWS])] if shown else []), *left])


def _counted(responses: list[dict[str, str]]) -> list[dict[str, str]]:
    """Equal rows as one, with how many there are."""
    count = Counter(tuple(row.items()) for row in responses)
    return [dict(row[:1]) | {"times": str(times)} | dict(row[1:]) for row, times in count.items()]


def _response(key: tuple, columns: dict) -> dict[str, str]:
    source, ratio, _ = key
    return {
        "by": source if ratio is None else f"{source}, mask {ratio:g}",
        "verdict": _number(columns.get("score")) if columns.get("status") == "ok" else inert(columns.get("status", "")),
        "divergence": _number(columns.get("divergence")),
        "R distill": _number(columns.get("reward_distillation")),
        "reward": _number(columns.get("reward")),
        "advantage": _number(columns.get("advantage")),
        "response": inert(columns["text"]),  # last: a page does not break a cell's lines
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def thumbnail(image: bytes) -> bytes:
    """A PNG that fits into a square of `PIXELS`."""
    with Image.open(io.BytesIO(image)) as opened:
        small = rgb(opened)
    scale = PIXELS / max(small.size)
    width, height = (max(1, round(side * scale)) for side in small.size)
    sink = io.BytesIO()
    small.resize((width, height)).save(sink, "png")
    return sink.getvalue()
