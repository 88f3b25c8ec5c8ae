"""Division of steps into forward passes: the plan, the passes that are run, and the split across ranks."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from masters.data.question_shards import QuestionRef
from masters.models.packing.prefix_tree import TokenCounts
from masters.models.training import load_balancing, trainer
from masters.models.training.groups import Group, Step
from tests.models.tiny_contexts import make_context, references

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=12)


def group(prompt: int, responses: list[list[int]]) -> Group:
    keys, scores = [("teacher", 0.2, n) for n in range(len(responses))], np.zeros(len(responses))
    is_trained = np.ones(len(responses), bool)
    return Group(QuestionRef("", "q", 0, 0), 0, np.zeros(prompt, np.int32), responses, scores, is_trained, keys)


@given(lengths, st.integers(1, 100), st.integers(1, 4))
def test_a_plan_counts_the_passes_of_all_ranks(sizes: list[int], budget: int, ranks: int) -> None:
    members = tuple(range(len(sizes)))
    steps = [Step(0, 0, members), Step(0, 1, members[::-1])]
    planned = load_balancing.plan(steps, sizes, budget, ranks)
    planned_batches = [
        batch
        for step in steps
        for rank_groups in load_balancing.split_across_ranks(step.groups, sizes, ranks)
        for batch in load_balancing.batches(rank_groups, sizes.__getitem__, budget)
    ]
    assert planned is not None
    assert planned == load_balancing.plan(steps, sizes, budget, ranks)
    assert planned.passes == len(planned_batches) and planned.tokens == 2 * sum(sizes)
    totals = [sum(sizes[g] for g in batch) for batch in planned_batches]
    assert planned.largest_tokens == max(totals) == sum(sizes[g] for g in planned.largest)
    assert planned.largest_tokens <= max(budget, *sizes)


@given(lengths, st.integers(1, 5))
def test_ranks_share_a_step_evenly_and_keep_its_order(sizes: list[int], ranks: int) -> None:
    groups = tuple(range(len(sizes)))[::-1]
    rank_groups = load_balancing.split_across_ranks(groups, sizes, ranks)
    assert sorted(g for part in rank_groups for g in part) == sorted(groups)
    assert all(part == [g for g in groups if g in part] for part in rank_groups)
    loads = [sum(sizes[g] for g in part) for part in rank_groups]
    assert max(loads) - min(loads) <= max(sizes)  # the fullest rank would have fewer without its last question
    assert load_balancing.split_across_ranks(groups, [*sizes[:-1], None], ranks) == [
        list(groups[r::ranks]) for r in range(ranks)
    ]
    assert load_balancing.split_across_ranks(groups, sizes, 1) == [list(groups)]


def test_repeated_responses_count_once_and_unknown_prompts_have_no_size() -> None:
    known = group(5, [[1, 2], [1, 2], [3]])
    assert load_balancing.size_of(known) == 5 + 2 + 1
    unknown = replace(known, prompt=None)  # training on labels
    assert load_balancing.size_of(unknown) is None
    assert load_balancing.plan([Step(0, 0, (0, 1))], [8, None], 10, 1) is None
    assert load_balancing.plan([], [8], 10, 1) is None


def test_the_passes_that_are_run_are_those_planned() -> None:
    context = make_context("qwen3_vl")
    prompts = [context.question(group).ids_P.numpy() for group in context.groups]
    groups = [replace(group, prompt=prompt) for group, prompt in zip(context.groups, prompts, strict=True)]
    # a copy, because other tests share the context
    context = replace(context, groups=groups, token_budget=60, token_counts=TokenCounts())
    step = Step(0, 0, tuple(range(8)))
    planned = load_balancing.plan([step], context.group_tokens, 60, 1)
    trainer.run_step(context, step, references(context))
    context.student.zero_grad()
    assert planned is not None and planned.passes > 2
    counts = context.token_counts
    assert counts.passes == planned.passes
    assert counts.packed_tokens <= planned.tokens < counts.separate  # fewer where questions of a pass share an image
    assert counts.packed_tokens <= counts.padded
