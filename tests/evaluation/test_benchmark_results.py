"""lmms-eval's results become rows; incomplete results are errors."""

import copy
import json
import math

import pytest

from masters.common.errors import WorkerError
from masters.evaluation.benchmark_results import check_complete, sample_rows, score_rows


def sample(doc: int, response: object, **scores: object) -> dict:
    return (
        dict(
            doc_id=doc,
            doc={"id": doc},
            target="red",
            arguments=["what color?", {"max_new_tokens": 8}, doc],
            resps=[[response]],
            filtered_resps=[response],
            doc_hash="0",
            token_counts=[None],
        )
        | scores
    )


# as returned by lmms-eval 0.7.3 for one task, with a second task without a version and a group added
RESULTS = {
    "results": {
        "both": {"alias": "both", "exact_match,none": 0.75, "exact_match_stderr,none": "N/A"},
        "one": {
            "alias": "one",
            "exact_match,none": 0.5,
            "exact_match_stderr,none": 0.5,
            "exact_match_stderr_clt,none": 0.5,
            "submission,none": None,
            "exact_match,strict": 0.0,
            "exact_match_stderr,strict": 0.0,
            "nan,none": math.nan,
        },
        "two": {"alias": "two", "judged,none": 1, "judged_stderr,none": "N/A", "file,none": "submissions/two.json"},
    },
    "configs": {"one": {"metadata": [{"version": 1.0}]}, "two": {}},
    "versions": {"one": "Yaml", "two": "Yaml", "both": 0.1},
    "n-samples": {"one": {"original": 9, "effective": 2}, "two": {"original": 1, "effective": 1}},
    "samples": {
        "one": [sample(0, "red", exact_match=1.0), sample(1, "blue", exact_match=0.0)],
        "two": [sample(0, ["a", "b"], judged={"score": 1, "by": "ü"})],
    },
}


def test_each_number_becomes_a_row_with_its_version() -> None:
    check_complete("both", RESULTS)
    rows = [tuple(row.values()) for row in score_rows("both", RESULTS)]
    assert rows == [
        ("both", "both", "0.1", "exact_match", "none", 0.75, None, None),
        ("both", "one", "1.0", "exact_match", "none", 0.5, 0.5, 2),
        ("both", "one", "1.0", "exact_match", "strict", 0.0, 0.0, 2),
        ("both", "two", "unversioned", "judged", "none", 1.0, None, 1),
    ]


def test_each_document_becomes_a_row() -> None:
    rows = list(sample_rows("both", RESULTS))
    values = [(row["task"], row["doc_id"], row["prompt"], row["response"], row["filtered"]) for row in rows]
    assert values == [
        ("one", 0, "what color?", "red", "red"),
        ("one", 1, "what color?", "blue", "blue"),
        ("two", 0, "what color?", '["a", "b"]', '["a", "b"]'),
    ]
    assert [json.loads(row["scores"]) for row in rows] == [
        {"exact_match": 1.0},
        {"exact_match": 0.0},
        {"judged": {"score": 1, "by": "ü"}},
    ]


def test_incomplete_results_are_refused() -> None:
    def changed(change) -> dict:
        results = copy.deepcopy(RESULTS)
        change(results)
        return results

    cases = {
        "gave no results": changed(lambda r: r.update({"n-samples": {}})),
        "one has samples of 1 documents, expected 2": changed(lambda r: r["samples"]["one"].pop()),
        "one has samples of 1 documents, ": changed(lambda r: r["samples"]["one"][1].update(doc_id=0)),
        "two has samples of 0 documents": changed(lambda r: r["samples"].pop("two")),
        "gave two no score": changed(lambda r: r["results"]["two"].pop("judged,none")),
    }
    for message, results in cases.items():
        with pytest.raises(WorkerError, match=message):
            check_complete("both", results)
