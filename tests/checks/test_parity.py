"""The parity check accepts correct code and detects wrong attention and wrong weights."""

import base64
import io
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from demo import families, shapes
from masters.checks import parity_worker
from masters.checks.parity import compare_models, sample_questions
from masters.checks.parity_job import MAX_TOKENS, ParityJob, ParityQuestion
from masters.checks.preflight import preflight
from masters.common.errors import InputError
from masters.config import Config, Runtime
from masters.config.loading import load, override_values
from masters.execution import processes
from masters.models import model_loading, prompts
from masters.models.families import family_of
from masters.models.generation.engine import Request
from masters.models.losses import formulas
from masters.models.masking import group_thresholds, iterate_tensors
from masters.models.packing import packed_batch
from masters.models.packing.packed_batch import pack, response_logits
from masters.models.packing.prefix_tree import Question
from tests.models.family_questions import load_masked
from tests.models.padded_models import save_padded
from tests.shape_data import write_rows

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "demo/models/teacher"
FAMILY = family_of(AutoConfig.from_pretrained(FOLDER).model_type)


@pytest.fixture(scope="module")
def prompt() -> dict[str, torch.Tensor]:
    png = io.BytesIO()
    shapes.draw(np.random.default_rng(0))[0].save(png, "PNG")
    return prompts.model_inputs(AutoProcessor.from_pretrained(FOLDER), "what color is the shape?", png.getvalue())


@pytest.fixture
def model() -> torch.nn.Module:
    return model_loading.load_model(FOLDER, "float32")


def test_correct_packing_agrees_with_separate_sequences(model, prompt) -> None:
    question = Question("q", prompt, [[40, 41, 2], [50, 2], [60, 61, 62, 2]])
    for difference in parity_worker.compare_packing("teacher", model, FAMILY, question):
        assert difference.is_rounding, difference


def test_responses_that_attend_to_each_other_are_detected(model, prompt, monkeypatch) -> None:
    def causal(branch_3BL: torch.Tensor) -> torch.Tensor:
        _, rows, length = branch_3BL.shape
        return torch.ones(rows, 1, length, length, dtype=torch.bool).tril()

    monkeypatch.setattr(packed_batch, "attention_mask", causal)
    question = Question("q", prompt, [[40, 41, 2], [50, 2], [60, 61, 62, 2]])
    for difference in parity_worker.compare_packing("teacher", model, FAMILY, question):
        assert not difference.is_rounding, difference


def test_an_engine_with_other_weights_is_detected(model, prompt) -> None:
    tokens = [40, 41, 2]
    packed = pack([Question("q", prompt, [tokens])], model, FAMILY)
    with torch.no_grad():
        log_probs = formulas.chosen_log_probs(response_logits(model, packed), packed.token_T).tolist()
    assert parity_worker.compare_log_probs(model, FAMILY, prompt, tokens, log_probs) == 0
    rows = group_thresholds(lambda: iterate_tensors(FOLDER), [0.2], "matrix")
    masked = load_masked(FOLDER, {r["tensor"]: r["threshold"] for r in rows}, "float32")
    assert (
        parity_worker.compare_log_probs(masked, FAMILY, prompt, tokens, log_probs)
        > parity_worker.LOG_PROB_LIMITS["float32"]
    )


RATIOS = (0.4, 0.2, 0.0)


class PlainEngine:
    """An engine without vLLM: the whole model is read from its folder for every mask, so no mask can be left over.

    Ids that the tokenizer does not have are never answered, as in `Engine`.
    """

    def __init__(self, folder: Path, dtype: str, runtime: Runtime) -> None:
        self.folder, self.processor = folder, AutoProcessor.from_pretrained(folder)
        self.remask({})

    def __enter__(self) -> "PlainEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def remask(self, thresholds: dict[str, float]) -> None:
        self.model = load_masked(self.folder, thresholds, "float32")

    @torch.no_grad()
    def decode_greedily(self, requests: list[Request], max_tokens: int) -> list[tuple[list[int], list[float]]]:
        return [self._decode(request, max_tokens) for request in requests]

    def _decode(self, request: Request, max_tokens: int) -> tuple[list[int], list[float]]:
        prompt = prompts.model_inputs(self.processor, request.question, request.image)
        vocabulary, tokens, log_probs = len(self.processor.tokenizer), [], []
        for _ in range(max_tokens):
            packed = pack([Question("", prompt, [[*tokens, 0]])], self.model, FAMILY)
            logp_V = response_logits(self.model, packed)[-1, :vocabulary].log_softmax(-1)
            tokens.append(int(logp_V.argmax()))
            log_probs.append(float(logp_V.max()))
        return tokens, log_probs


def job_of(folder: Path, ratios: tuple[float, ...], questions: int = 2) -> ParityJob:
    rng, asked = np.random.default_rng(1), []
    for _ in range(questions):
        png = io.BytesIO()
        shapes.draw(rng)[0].save(png, "PNG")
        image = base64.b64encode(png.getvalue())
        asked.append(ParityQuestion(question="what color is the shape?", answer="red", image=image))
    rows = group_thresholds(lambda: iterate_tensors(folder), [r for r in ratios if r], "matrix")
    thresholds = {
        ratio: {row["tensor"]: row["threshold"] for row in rows if row["mask_ratio"] == ratio} for ratio in ratios
    }
    return ParityJob(
        name="teacher",
        folder=folder,
        thresholds=thresholds,
        questions=tuple(asked),
        dtype="float32",
        runtime=Runtime(),
    )


def measure(job: ParityJob, monkeypatch: pytest.MonkeyPatch) -> list[parity_worker.Difference]:
    monkeypatch.setattr(parity_worker, "Engine", PlainEngine)
    return parity_worker.measure_differences(job)


@pytest.fixture(scope="module")
def unsure_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a random model: masks move all of its probabilities, while a trained one stays sure of its answers."""
    return families.save("qwen3_vl", tmp_path_factory.mktemp("random") / "teacher", ["what color is it?"], "teacher")


def test_a_mask_that_is_left_over_is_detected(unsure_teacher: Path, monkeypatch) -> None:
    monkeypatch.setattr(PlainEngine, "remask", lambda engine, thresholds: setattr(engine, "model", whole))
    whole = load_masked(unsure_teacher, {}, "float32")
    *_, masked, unmasked = measure(job_of(unsure_teacher, (0.2, 0.0), 1), monkeypatch)
    assert not masked.is_rounding and unmasked.is_rounding


@pytest.mark.parametrize("ratios", list(permutations(RATIOS)), ids=str)
def test_every_ratio_is_compared_whatever_was_masked_before(
    ratios: tuple[float, ...], unsure_teacher: Path, monkeypatch
) -> None:
    at_ratios = measure(job_of(unsure_teacher, ratios, 1), monkeypatch)[2:]
    assert [difference.name.split(":")[0] for difference in at_ratios] == [
        f"teacher, mask ratio {ratio}" for ratio in ratios
    ]
    for difference in at_ratios:
        assert difference.is_rounding, difference


def test_padding_is_no_difference(tmp_path: Path, monkeypatch) -> None:
    folder = save_padded(FOLDER, tmp_path / "padded", 12)
    for difference in measure(job_of(folder, (0.2, 0.0)), monkeypatch):
        assert difference.is_rounding, difference


def run_parity(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[ParityJob]:
    """Return the jobs that the processes of a configuration's check get."""
    jobs: list[ParityJob] = []
    monkeypatch.setattr(processes, "run", lambda children, *_: jobs.extend(child.job for child in children))
    compare_models(config, preflight(config))
    return jobs


def write_data(folder: Path, questions: list[str]) -> Path:
    (folder / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(2), []
    for number, question in enumerate(questions):
        shapes.draw(rng)[0].save(folder / "images" / f"{number}.png")
        rows.append(dict(id=f"q{number}", image=f"images/{number}.png", question=question, answer="red"))
    return write_rows(folder, rows)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    texts = [f"what color is it{' now' * number}?" for number in range(6)]
    source = write_data(tmp_path / "data", ["is it red? " * 200, *texts])
    values = {"data.source": str(source), "store.root": str(tmp_path / "store")}
    return override_values(load(ROOT / "configs/easyvqa.toml"), values)


def test_the_configurations_data_is_compared_at_all_ratios(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that no engine takes is left out, as in a run."""
    student, teacher = run_parity(config, monkeypatch)
    assert list(student.thresholds.items()) == [(0.0, {})]
    assert list(teacher.thresholds) == [0.2, 0.15, 0.1, 0.05, 0.0]
    masked = [len(thresholds) for thresholds in teacher.thresholds.values()]
    assert masked[0] > 0 and masked == [masked[0]] * 4 + [0]
    expected = [row["question"] for row in sample_questions(config, preflight(config), 5)[1:]]
    for job in (student, teacher):
        assert [question.question for question in job.questions] == expected


def test_without_a_question_that_an_engine_takes_parity_is_refused(config: Config, tmp_path: Path, monkeypatch) -> None:
    source = write_data(tmp_path / "long", ["is it red? " * 200] * 3)
    with pytest.raises(InputError, match=f"each of the first 3 prompts takes more than the {512 - MAX_TOKENS} tokens"):
        run_parity(override_values(config, {"data.source": str(source)}), monkeypatch)


def test_a_student_that_cannot_be_masked_is_compared(config: Config, tmp_path: Path, monkeypatch) -> None:
    """No threshold of it is needed: its tensors may be of types that cannot be masked."""
    folder = families.save("qwen3_vl", tmp_path / "student", ["what color is it now?"])
    teacher = families.save("qwen3_vl", tmp_path / "teacher", ["what color is it now?"], "teacher")
    model = model_loading.load_model(folder, "float64")
    model.save_pretrained(folder)
    values = {"student.model": str(folder), "teachers.0.model": str(teacher)}
    student, _ = run_parity(override_values(config, values), monkeypatch)
    assert student.thresholds == {0.0: {}}
