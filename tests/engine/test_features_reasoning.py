"""A form that holds from where the reasoning ends, which may be in the middle of a block."""

from collections.abc import Sequence
from typing import Any

import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output import ConstraintBounds, StructuredOutputManager

from tests.engine.conftest import StartEngine
from tests.engine.harness import Engine
from tests.engine.trained import OPTIONS, TINY, chat, cut, questions, texts, trained_head


class EndsAtEquals(BaseThinkingReasoningParser):  # type: ignore[misc]
    """For a model that doesn't think: its sums up to the first equals sign, which its drafts foresee."""

    @property
    def start_token(self) -> str:
        return "<|im_start|>"

    @property
    def end_token(self) -> str:
        return "Ġ="

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False  # a prompt never ends it, though `<|im_start|>` stands in each

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        before, _, behind = model_output.partition(" =")
        return before, behind


ReasoningParserManager.register_module("ends_at_equals", module=EndsAtEquals)

THINKING = OPTIONS | {"structured_outputs_config": {"reasoning_parser": "ends_at_equals"}}
FORM = {
    "structured_outputs": StructuredOutputsParams(regex="( [a-z]{4,9}){3}\\."),
    "ignore_eos": False,
    "detokenize": True,
}


@pytest.fixture(scope="module")
def answered(start: StartEngine) -> tuple[list[list[int]], list[tuple[str, str, Any]]]:
    """Sums, and what the plain engine says of them."""
    engine = start(None, TINY / "base", **THINKING)
    given = [chat(engine, question) for question in questions(8)[:8]]
    answers = texts(engine.run(given, 64, **FORM))
    assert all(" =" in text and end == "stop" for text, end, _ in answers)
    return given, answers


@pytest.fixture(scope="module", params=["one", "two"])
def drafting(start: StartEngine, request: pytest.FixtureRequest) -> Engine:
    return start(trained_head(request.param), TINY / "base", **THINKING)


def says_the_same(engine: Engine, answered: Any) -> bool:
    given, expected = answered
    run = engine.run(given, 64, **FORM)
    assert 0 < run.counts.accepted < run.counts.drafted
    return texts(run) == expected


@pytest.mark.feature("structured output behind reasoning")
def test_reasoning_ends_inside_a_block(drafting: Engine, answered: Any) -> None:
    given, _ = answered
    freely = drafting.run(given, 64, stop_token_ids=[drafting.llm.get_tokenizer().convert_tokens_to_ids("Ġ=")])
    assert cut(freely) > len(given), "drafts never reach behind the end of the reasoning"
    assert says_the_same(drafting, answered)


def test_form_from_the_next_block_is_noticed(drafting: Engine, answered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: tokens behind the end of the reasoning go unconstrained as far as its block reaches."""
    bounds = StructuredOutputManager._get_constraint_bounds

    def late(self: Any, request: Any, spec_tokens: Any, *rest: Any, **named: Any) -> Any:
        found = bounds(self, request, spec_tokens, *rest, **named)
        behind = len(spec_tokens) + 1
        return ConstraintBounds(behind, behind) if 0 < found.constraint_start < behind and not named else found

    with monkeypatch.context() as patch:
        patch.setattr(StructuredOutputManager, "_get_constraint_bounds", late)
        assert not says_the_same(drafting, answered)
    assert says_the_same(drafting, answered)
