"""Groups of a table of responses, read row by row: the reference for `masters.models.training.groups`."""

import numpy as np

from masters.config.mask_schedule import mask_stage_of
from masters.data.question_shards import QuestionRef
from masters.models.training.groups import Group
from masters.store.artifacts import Artifact


def response_groups(
    refs: list[QuestionRef],
    responses: Artifact,
    verdicts: Artifact | None,
    ratios: list[float],
    coverage: str,
    truncated: str,
) -> tuple[list[Group], int]:
    """Return the groups of every question at the mask stages that train on it, and the number of empty responses."""
    scores = _scores(verdicts) if verdicts else {}
    prompts, answered, empty = {}, {}, 0
    for row in responses.rows("responses"):
        if not row["response_token_ids"]:
            empty += 1
            continue
        is_cut = row["finish_reason"] == "length"
        if is_cut and truncated == "drop":
            continue
        prompts.setdefault(row["question_id"], np.asarray(row["prompt_token_ids"], dtype=np.int32))
        key = (row["source"], row["mask_ratio"], row["sample"])
        score = scores.get((row["question_id"], *key))
        order = (row["source"] != "teacher", row["sample"])
        is_trained = not is_cut or truncated == "keep"
        response = (order, row["response_token_ids"], np.nan if score is None else score, is_trained, key)
        answered.setdefault((row["question_id"], row["mask_ratio"]), []).append(response)
    groups = []
    for ref in refs:
        question_stage = mask_stage_of(ref.digest, len(ratios))
        for stage in range(len(ratios)) if coverage == "full" else [question_stage]:
            found = sorted(
                answered.get((ref.question_id, ratios[stage]), []) + answered.get((ref.question_id, None), []),
                key=lambda r: r[0],
            )
            if found:
                _, tokens, values, is_trained, keys = map(list, zip(*found, strict=True))
                prompt = prompts[ref.question_id]
                groups.append(Group(ref, stage, prompt, tokens, np.array(values), np.array(is_trained), keys))
    return groups, empty


def _scores(verdicts: Artifact) -> dict[tuple, float | None]:
    columns = ["question_id", "source", "mask_ratio", "sample", "score"]
    return {
        (row["question_id"], row["source"], row["mask_ratio"], row["sample"]): row["score"]
        for row in verdicts.rows("verdicts", columns)
    }
