"""Bugs that other speculators shipped, the tests that hold each off, and the fault by which these were seen to fail.

`python -m tests.compatibility` makes docs/regressions.md of it.
"""

from typing import NamedTuple


class Regression(NamedTuple):
    bug: str
    seen: str  # where
    tests: tuple[str, ...]  # below tests/, that fail when it is there
    fault: str  # how it was planted
    planted: str  # the test that plants it in every run, or how to see it


VLLM = "https://github.com/vllm-project/vllm/issues/"


def issues(*numbers: int) -> str:
    return ", ".join(f"[#{number}]({VLLM}{number})" for number in numbers)


REGRESSIONS = [
    Regression(
        "A prompt that is cached but for one token, sampled: what pads its step is said",
        "Uno",
        (
            "engine/test_oracle.py::test_sampled_repeats_of_a_cached_prompt",
            "engine/test_features_scheduling.py::test_sampled_repeats_in_one_pass",
        ),
        "placeholders are kept as if the target had said them",
        "engine/test_regressions.py::test_placeholders_behind_a_cached_prompt",
    ),
    Regression(
        "`max_model_len` is reached inside a draft",
        issues(53962),
        (
            "engine/test_oracle.py::test_context_limit",
            "engine/test_onepass.py::test_context_limit",
            "engine/test_features.py::test_context_limit",
            "engine/test_limits.py::test_limit_that_vllm_finds_itself",
        ),
        "rows may stand behind the limit",
        "engine/test_regressions.py::test_context_limit_inside_a_draft",
    ),
    Regression(
        "Position 32,768 is crossed",
        issues(52873),
        ("engine/test_oracle.py::test_far_positions",),
        "positions and lengths of sixteen bits",
        "engine/test_regressions.py::test_position_32768",
    ),
    Regression(
        "Steps scheduled ahead, and preemption",
        issues(47900, 49620, 50021),
        ("engine/test_oracle.py::test_asynchronous_scheduling", "engine/test_onepass.py::test_asynchronous_scheduling"),
        "lengths are those that the host believes in; drafts are handed to the slots of before",
        "engine/test_regressions.py::test_preemption_when_scheduled_ahead",
    ),
    Regression(
        "Structured output and preemption",
        issues(30916),
        (
            "engine/test_features_scheduling.py::test_structured_output_and_preemption",
            "engine/test_features_scheduling.py::test_structured_output_and_preemption_when_scheduled_ahead",
        ),
        "a grammar begins anew when its request does",
        "engine/test_regressions.py::test_structured_output_and_preemption",
    ),
    Regression(
        "Reasoning ends inside a draft, and what follows is not held to its form",
        issues(36138),
        ("engine/test_features_reasoning.py::test_reasoning_ends_inside_a_block",),
        "the form holds from the next block only",
        "engine/test_features_reasoning.py::test_form_from_the_next_block_is_noticed",
    ),
    Regression(
        "Log-probabilities of another token",
        issues(34497),
        ("engine/test_features.py::test_log_probabilities", "engine/test_lossless.py::test_greedy_with"),
        "the row before the one that verified a token",
        "engine/test_regressions.py::test_log_probabilities",
    ),
    Regression(
        "LoRA: drafts of the base for the text of an adapter",
        issues(20284),
        ("engine/test_features_refused.py::test_lora", "engine/test_config.py::test_refused"),
        "LoRA is refused so far; without the refusal the tests fail",
        "engine/test_features_refused.py::test_lora",
    ),
    Regression(
        "Tensor parallelism: a rank drafts otherwise than the others",
        issues(41262),
        (
            "engine/test_processes.py::test_spawned_workers",
            "engine/test_processes.py::test_one_pass_on_two_ranks",
        ),
        "one rank holds its part of the head in another order",
        "engine/test_regressions.py::test_a_rank_with_another_head",
    ),
    Regression(
        "Metrics under data parallelism leave a rank out",
        issues(24049),
        ("engine/test_features_server.py::test_a_hundred_at_once",),
        "one rank's counts are compared with what all requests are told",
        "engine/test_features_server.py::test_a_hundred_at_once",
    ),
    Regression(
        "Rejected tokens are not subtracted from lengths: drafts from text that nobody said",
        "several",
        ("engine/test_reference.py::test_block_rows_equal_the_reference",),
        "`num_rejected` is taken for zero",
        "engine/test_reference.py::test_reference_notices",
    ),
    Regression(
        "A batch larger than the largest graph drafts without one, silently",
        "several",
        (
            "engine/test_graphs.py::test_large_batches_draft_in_turns",
            "engine/test_graphs.py::test_every_mode_has_graphs",
        ),
        "one draft pass for more requests than there are graphs for",
        "engine/test_regressions.py::test_batches_beyond_the_largest_graph",
    ),
    Regression(
        "One row and several round otherwise in bfloat16; a fault is taken for a near tie",
        issues(54506),
        (
            "unit/test_near_ties.py::test_where_texts_part",
            "engine/test_tiny_orthrus.py::test_identical_text_at_the_reference_rate",
        ),
        "texts that part where no two tokens are near",
        "unit/test_near_ties.py::test_what_turns_a_comparison_red",
    ),
    Regression(
        "Acceptance collapses behind a cached prefix",
        issues(47930),
        ("engine/test_features_scheduling.py::test_acceptance_behind_a_shared_prefix",),
        "the cached prefix is not seen by the drafter",
        "engine/test_regressions.py::test_shared_prefixes",
    ),
]
