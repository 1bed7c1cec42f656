"""An engine whose steps are timed, in a process of its own.

    python -m vllm_orthrus.bench.cost_engine --serve TASK

The task is the options of `vllm serve`. A question is requests and contexts; the answer, each step that was timed, with
what the engine would have foretold of it from what it timed before it served, and with the roofline's word.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from vllm_orthrus.bench.process import answer, questions


def main() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_orthrus.engine import timing
    from vllm_orthrus.policy.clock import Cell

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = json.loads(sys.argv[sys.argv.index("--serve") + 1])
    engine: Any = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(arguments)))
    core = engine.engine_core.engine_core
    ask = core.scheduler.dynamic_sd_lookup
    if not hasattr(ask, "policy"):
        raise SystemExit("This engine has no modes to choose from, so it foretells nothing.")
    clock, modes = ask.policy.clock, ask.policy.modes
    before = set(clock.known)
    for requests, contexts in questions():
        asked = [timing.Batch(count, context) for context in contexts for count in requests]
        steps = timing.time_modes(core, ask, modes, math.inf, asked)
        answer(
            {
                "steps": [
                    step._asdict()
                    | {
                        "foretold": clock.seconds(step.requests, step.context, [step.drafting])[step.drafting],
                        "roofline": clock.costs(step.drafting, step.requests, step.context),
                        "timed_before": Cell.of(step.drafting, step.requests, step.context) in before,
                    }
                    for step in steps
                ]
            }
        )


if __name__ == "__main__":
    main()
