"""easy-VQA's test split as a task of lmms-eval: `python -m demo.benchmark FOLDER [--limit N]`.

With MASTERS_BENCHMARK_TASKS=FOLDER, `masters evaluate ... --benchmark easyvqa_test` runs it. Like `demo.evaluate` it
shares nothing with `masters`: questions come from the package, the metric is lmms-eval's own exact match. Its folder
`data` is also a `data.source` of ours, so that both can be asked the same questions.
"""

import argparse
from pathlib import Path

import easy_vqa
import pyarrow as pa
import pyarrow.parquet as pq

TASK = "easyvqa_test"
TRAINING = 4  # questions
YAML = """\
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.image
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
metadata:
  - version: 1.0
"""
UTILS = """\
import io

from PIL import Image


def image(doc):
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]
"""


def write(folder: Path, limit: int | None = None) -> None:
    """Write the task's YAML and code, and Parquet files of `id`, `image`, `question`, `answer`, `split` in `data`.

    `limit`: of questions, spread evenly over the split. A few training questions are added, because a source of
    masters must have some; lmms-eval does not read them.
    """
    test = rows("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
    train = rows("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
    data = folder.resolve() / "data"
    data.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(spread(test, limit or len(test))), data / "test.parquet")
    pq.write_table(pa.Table.from_pylist(spread(train, TRAINING)), data / "train.parquet")
    (folder / "utils.py").write_text(UTILS)
    (folder / f"{TASK}.yaml").write_text(YAML.format(task=TASK, data=data / "test.parquet"))


def rows(split: str, questions: tuple, paths: list[str]) -> list[tuple[str, str, str, str]]:
    """Return id, question, answer and image file of every question, in the package's order."""
    numbered = enumerate(zip(*questions, strict=True))
    return [(f"{split}-{n}", question, answer, paths[image]) for n, (question, answer, image) in numbered]


def spread(found: list[tuple[str, str, str, str]], count: int) -> list[dict]:
    """Return `count` of the rows, spread evenly, with their images."""
    return [
        dict(id=name, image=Path(path).read_bytes(), question=question, answer=answer, split=name.split("-")[0])
        for name, question, answer, path in found[:: max(1, len(found) // count)][:count]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, help="only so many questions, spread evenly")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.limit)
    print(f"task {TASK} is in {arguments.folder}")


if __name__ == "__main__":
    main()
