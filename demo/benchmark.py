"""easy-VQA's test split as a task of lmms-eval: `python -m demo.benchmark FOLDER [--limit N]`.

With MASTERS_BENCHMARK_TASKS=FOLDER, `masters evaluate ... --benchmark easyvqa_test` runs it. Like `demo.evaluate` it
shares nothing with `masters`: questions come from the package, the metric is lmms-eval's own exact match. Its Parquet
file is also a `data.source` of ours, so that both can be asked the same questions.
"""

import argparse
from pathlib import Path

import easy_vqa
import pyarrow as pa
import pyarrow.parquet as pq

TASK = "easyvqa_test"
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
    """The task's YAML, its code and its data, a Parquet file of `id`, `image`, `question`, `answer`, `split`.

    `limit`: of questions, spread evenly over the split.
    """
    questions, answers, images = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    rows = [
        dict(id=f"test-{n}", image=Path(paths[image]).read_bytes(), question=question, answer=answer, split="test")
        for n, (question, answer, image) in enumerate(zip(questions, answers, images, strict=True))
    ]
    chosen = rows[:: len(rows) // limit][:limit] if limit else rows
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.resolve() / "test.parquet"
    pq.write_table(pa.Table.from_pylist(chosen), data)
    (folder / "utils.py").write_text(UTILS)
    (folder / f"{TASK}.yaml").write_text(YAML.format(task=TASK, data=data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, help="only so many questions, spread evenly")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.limit)
    print(f"task {TASK} is in {arguments.folder}")


if __name__ == "__main__":
    main()
