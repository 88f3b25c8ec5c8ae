"""register: publish the student as a Hugging Face folder with a model card and as a version of an MLflow model."""

from collections.abc import Mapping

import jinja2
from prefect import task

from masters.store.artifacts import Artifact, Identity
from masters.tasks.build_or_reuse import TASK_OPTIONS, StageResult, build_or_reuse, write_file
from masters.tasks.judges import accuracy_metric, evaluation_judge
from masters.tasks.run_context import Context, Run

VERSION = 3  # 2: inputs by content; 3: the card names verifier and split
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
Split "{{ split }}" of `{{ source }}`, greedy answers through vLLM; standard errors are clustered by image. An answer is
correct if {% if judge %}the language model `{{ judge }}` judges that it says the same as the ground truth.
{%- else %}`answers.verifier = "{{ answers.verifier }}"` accepts
{%- if answers.final_pattern %} with `final_pattern` `{{ answers.final_pattern }}`{% endif %}; texts are compared after
Unicode NFKC, case folding, and removal of surrounding space, quotes and closing punctuation.
{%- endif %}

Objective `{{ train.objective }}` on `{{ train.targets }}`, divergence `{{ train.divergence }}`, learning rate
{{ train.learning_rate }}, {{ train.epochs }} epoch(s), {{ train.questions_per_step }} questions a step,
seed {{ train.seed }}.
Training artifact `{{ trained }}`.
"""


def make_identity(context: Context, upstream: Mapping[str, Artifact]) -> Identity:
    # by content: a student that was evaluated again is another version, and the version before keeps its files
    inputs = {stage: artifact.content_digest for stage, artifact in upstream.items()}
    return Identity("register", VERSION, dict(name=context.config.name), inputs, slug=context.config.name)


@task(name="register", **TASK_OPTIONS)
def register(run: Run, trained: Artifact, evaluated: Artifact) -> tuple[Artifact, int]:
    """Build `model/` with weights, processor and card, and register it as a version of the run's MLflow model."""
    upstream = dict(train=trained, evaluate=evaluated)
    identity = make_identity(run, upstream)

    def build() -> StageResult:
        listed = {file["name"]: file["digest"] for file in trained.record["files"]}
        files = {name: sha256 for name, sha256 in listed.items() if not name.endswith("README.md")}
        for name in files:
            run.storage.copy(f"{trained.folder}/{name}", f"{identity.folder}/{name}")
        card = render_card(run, trained, evaluated).encode()
        files |= write_file(run.storage, identity, "model/README.md", card)
        return StageResult(files, dict(rows=1))

    artifact = build_or_reuse(run, identity, upstream, build)
    # a reused artifact too: this MLflow may not be the one that it was registered in
    version = run.tracker.register_model(run.config.name, artifact, trained, evaluated)
    return artifact, version


def render_card(run: Run, trained: Artifact, evaluated: Artifact) -> str:
    """Render the model card."""
    config, judge = run.config, evaluation_judge(run)
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(CARD)
    return template.render(
        name=config.name,
        student=run.resources.student.name,
        teachers=", ".join(f"`{teacher.name}`" for teacher in run.resources.teachers),
        scores=evaluated.facts["scores"],
        source=config.data.source,
        split=config.evaluate.split,
        train=config.train,
        trained=trained.folder,
        answers=config.answers,
        metric=accuracy_metric(config),
        judge=judge and judge.name,
    )
