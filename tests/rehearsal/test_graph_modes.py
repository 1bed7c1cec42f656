"""Which graphs there are, by what the target's attention backend supports and what was asked for."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest

from tests.rehearsal.machines import Ask
from tests.rehearsal.qwen3 import configure, load, resolve


class Handed(NamedTuple):
    mode: str  # that vLLM hands to its own manager and to the speculator
    drafts: int  # graphs of draft passes
    outcomes: int  # graphs that take up an outcome


def handed(support: str, asked: str | None) -> Handed:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    options = {} if asked is None else {"compilation_config": {"cudagraph_mode": CUDAGraphMode[asked]}}
    backend = SimpleNamespace(min_cg_support=AttentionCGSupport[support], min_cg_attn_backend="a backend")
    mode = resolve(configure(**options), backend, None)
    speculator = load().speculator
    kept = speculator.graphs, speculator.outcome_graphs
    try:
        speculator.init_cudagraph_manager(mode)
        drafts, outcomes = (
            sum(map(len, manager._capture_descs.values())) for manager in (speculator.graphs, speculator.outcome_graphs)
        )
    finally:
        speculator.graphs, speculator.outcome_graphs = kept
    return Handed(mode.name, drafts, outcomes)


@pytest.mark.parametrize(
    ("support", "asked", "mode"),
    [
        ("ALWAYS", None, "FULL_AND_PIECEWISE"),
        ("UNIFORM_BATCH", None, "FULL_AND_PIECEWISE"),
        ("UNIFORM_SINGLE_TOKEN_DECODE", None, "PIECEWISE"),
        ("NEVER", None, "PIECEWISE"),
        ("ALWAYS", "FULL", "FULL"),
        ("UNIFORM_BATCH", "FULL", "FULL_AND_PIECEWISE"),
        ("ALWAYS", "FULL_DECODE_ONLY", "FULL_DECODE_ONLY"),
        ("UNIFORM_SINGLE_TOKEN_DECODE", "FULL_DECODE_ONLY", "PIECEWISE"),
        ("ALWAYS", "PIECEWISE", "PIECEWISE"),
        ("ALWAYS", "NONE", "NONE"),
    ],
)
def test_mode_that_is_handed_to_the_speculator(support: str, asked: str | None, mode: str, ask: Ask) -> None:
    found = ask("H200", handed, support, asked)
    assert found.mode == mode
    if mode.startswith("FULL"):
        assert (found.drafts, found.outcomes) == (11, 6)
    else:
        assert found.outcomes == 0, "no verification has a graph that could carry hypotheses"
        assert found.drafts == (0 if mode == "NONE" else 11), "our passes are captured by themselves"
