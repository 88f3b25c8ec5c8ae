"""register: the student as a Hugging Face folder with its model card, and as a version of an MLflow model."""

from collections.abc import Mapping

import jinja2
from prefect import task

from masters.common.hashing import digest
from masters.store.artifacts import Artifact, Identity
from masters.tasks.build import STAGE, build_or_reuse
from masters.tasks.judges import evaluation_judge, metric_of
from masters.tasks.run_context import Context, Run

VERSION = 3  # 2: inputs by what they hold; 3: the card names verifier and split
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [distillation, masters]
---
# {{ name }}

A vision-language student distilled with Masters (arXiv 2512.22238): masked teachers, responses generated ahead,
offline reinforcement. Started from `{{ student }}`, taught by {{ teachers }}.

| model | {{ metric }} | n | standard error |
|---|---|---|---|
{% for model, s in scores.items() -%}
| {{ model }} | {{ "%.4f" | format(s.accuracy) }} | {{ s.n }} | {{ "%.4f" | format(s.standard_error) }} |
{% endfor %}
Split "{{ split }}" of `{{ source }}`, greedy answers through vLLM; standard errors are clustered by image. Right is
{% if judge %}what the language model `{{ judge }}` judges to say the same as the ground truth.
{%- else %}what `answers.verifier = "{{ answers.verifier }}"` accepts
{%- if answers.final_pattern %} with `final_pattern` `{{ answers.final_pattern }}`{% endif %}; texts are compared after
Unicode NFKC, case folding, and removal of surrounding space, quotes and closing punctuation.
{%- endif %}

Objective `{{ train.objective }}` on `{{ train.targets }}`, divergence `{{ train.divergence }}`, learning rate
{{ train.learning_rate }}, {{ train.epochs }} epoch(s), {{ train.questions_per_step }} questions a step,
seed {{ train.seed }}.
Training artifact `{{ trained }}`.
"""


def identity(context: Context, made: Mapping[str, Artifact]) -> Identity:
    # by what they hold: a student that was evaluated again is another version, and the one before keeps its files
    inputs = {stage: artifact.content for stage, artifact in made.items()}
    return Identity("register", VERSION, dict(name=context.config.name), inputs, slug=context.config.name)


@task(name="register", **STAGE)
def register(run: Run, trained: Artifact, evaluated: Artifact) -> tuple[Artifact, int]:
    """`model/` with weights, processor and card, and its version in the MLflow that tracks this run."""
    upstream = dict(train=trained, evaluate=evaluated)
    made_of = identity(run, upstream)

    def build() -> tuple[dict[str, str], dict, dict]:
        files = {f["name"]: f["digest"] for f in trained.record["files"] if not f["name"].endswith("README.md")}
        for name in files:
            run.storage.copy(f"{trained.folder}/{name}", f"{made_of.folder}/{name}")
        text = card(run, trained, evaluated).encode()
        run.storage.write(f"{made_of.folder}/model/README.md", text)
        files["model/README.md"] = digest(text)
        return files, dict(rows=1), {}

    artifact = build_or_reuse(run, made_of, upstream, build)
    # also a reused one: this MLflow may be another than the one that saw it built
    version = run.tracker.register_model(run.config.name, artifact, trained, evaluated)
    return artifact, version


def card(run: Run, trained: Artifact, evaluated: Artifact) -> str:
    """The model card."""
    config, judge = run.config, evaluation_judge(run)
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(CARD).render(
        name=config.name, student=run.ready.student.name, teachers=", ".join(f"`{t.name}`" for t in run.ready.teachers),
        scores=evaluated.facts["scores"], source=config.data.source, split=config.evaluate.split,
        train=config.train, trained=trained.folder,
        answers=config.answers, metric=metric_of(config), judge=judge and judge.name,
    )  # fmt: skip
