"""What steps take, timed before the engine serves: real steps of requests, through scheduler, model and sampler.

For each size of a batch its requests read a short prompt, and then decode a few steps in each mode. The smallest time
of a mode counts, as machines pause but never hurry; where steps overlap, the smallest of those in the middle of their
rounds. What there is no time for follows from what was timed (`Clock`).
"""

import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm.logger import init_logger

from vllm_orthrus.engine.vllm import Request, SamplingParams
from vllm_orthrus.kernels.forms import SETTING as FORM
from vllm_orthrus.policy.clock import Cell, Step
from vllm_orthrus.policy.kept import Outcome
from vllm_orthrus.policy.worth import Worth

logger = init_logger("vllm.orthrus")

SECONDS_ON_GPUS, SECONDS_ON_CPUS = 3.0, 10.0
PROMPT = 48  # tokens
LONG_PROMPT = 8192
SIZES = (1, 4, 16, 64, 256)
ROUNDS = 2  # the first steps of all are slow
OWN, OWN_AHEAD = 2, 3  # steps of a mode in a round, behind those that still verify another's drafts
MOST_STEPS = 8  # of a mode in a round
VARIABLES = ("VLLM_BATCH_INVARIANT", FORM)  # that change it


class Batch(NamedTuple):
    requests: int
    prompt: int


class Forced:
    """Stands where the policy is, and has the steps made that are to be timed."""

    def __init__(self) -> None:
        self.drafts = 0
        self.steps: list[Step] = []
        self.worth = Worth()  # nothing: what is made up is not counted

    def choose(self, requests: Sequence[Hashable], context: float) -> int:
        return self.drafts

    def observe(self, step: Step) -> None:
        if step.verified == step.drafting:  # else it is on the way from one mode to another
            self.steps.append(step)

    def verified(self, outcomes: Sequence[Outcome]) -> None:
        """Made-up prompts say nothing of real ones."""

    def gave(self, tokens: int, step: Step) -> None:
        """Nobody asked for them."""

    def finished(self, request: Hashable) -> None:
        """Nothing was kept."""

    def timed(self, drafts: int) -> int:
        return sum(step.drafting == drafts for step in self.steps)


def teach(core: Any, ask: Any, modes: Sequence[int]) -> None:
    """Tell a scheduler's policy what steps take on this machine."""
    facts = what_counts(core.vllm_config)
    kept = place(facts)
    steps, began = remembered(kept), time.perf_counter()
    if steps is None:
        steps = time_modes(core, ask, modes, SECONDS_ON_CPUS if _on_cpu() else SECONDS_ON_GPUS)
        remember(kept, facts, steps)
        logger.info("Orthrus has timed what steps take, in %.1f s; kept in %s.", time.perf_counter() - began, kept)
    clock = ask.policy.clock
    for step in steps:
        clock.believe(step)
    if errors := sorted(clock.errors()):
        logger.info(
            "Of %d kinds of steps, each is foretold by the others within %.0f %% (median) and %.0f %% (worst).",
            len(errors),
            100 * errors[len(errors) // 2],
            100 * errors[-1],
        )


def time_modes(
    core: Any, ask: Any, modes: Sequence[int], budget: float, of: Iterable[Batch] | None = None
) -> list[Step]:
    """core: an engine's, that has nothing to do; ask: what its scheduler asks for the number of drafts."""
    policy, began = ask.policy, time.perf_counter()
    found: list[Step] = []
    try:
        for batch in batches(core.vllm_config) if of is None else of:
            spent = time.perf_counter() - began
            if found and 2 * spent > budget:  # the next takes longer than the one before
                break
            forced = ask.policy = Forced()
            _decode(core, forced, batch, modes, began + budget)
            found += fastest(forced.steps, ahead=core.batch_queue is not None)
    finally:
        ask.policy = policy
    return found


def batches(config: Any) -> Iterator[Batch]:
    most, longest = config.scheduler_config.max_num_seqs, config.model_config.max_model_len
    short = min(PROMPT, longest // 4)
    for size in SIZES:
        if size <= most:
            yield Batch(size, short)
    if not _on_cpu() and longest >= 2 * LONG_PROMPT:
        yield Batch(1, LONG_PROMPT)


def _decode(core: Any, forced: Forced, batch: Batch, modes: Sequence[int], until: float) -> None:
    names = [f"orthrus-timing-{batch.prompt}-{which}" for which in range(batch.requests)]
    draw = random.Random(0)
    room = core.vllm_config.model_config.max_model_len - batch.prompt - 1
    # A seed of its own: requests without one draw from what those of users draw from.
    params = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True, seed=0)
    vocabulary = core.vllm_config.model_config.get_vocab_size()
    for name in names:
        prompt = [draw.randrange(vocabulary) for _ in range(batch.prompt)]
        core.add_request(Request(name, prompt, params, None, block_hasher=core.request_block_hasher))
    own = OWN if core.batch_queue is None else OWN_AHEAD
    try:
        for drafts in ROUNDS * sorted(modes):
            forced.drafts, before = drafts, forced.timed(drafts)
            for _ in range(MOST_STEPS):
                _step(core)
                if forced.timed(drafts) >= before + own:
                    break
            if time.perf_counter() > until:
                break
    finally:
        core.abort_requests(names)
        while core.scheduler.has_requests() or core.batch_queue:  # what was scheduled ahead is still to come
            _step(core)
        core.reset_prefix_cache()  # nobody will ask for these prompts


def _step(core: Any) -> None:
    _, executed = core.step_fn()
    core.post_step(executed)


def fastest(steps: Sequence[Step], ahead: bool) -> list[Step]:
    """One step for each kind, as machines pause but never hurry.

    ahead: steps were scheduled while others ran. Then one that is looked at late makes the next seem short, and of
    those that follow each other only the middle one tells.
    """
    best: dict[Cell, Step] = {}
    for cell, run in itertools.groupby(steps, lambda step: Cell.of(step.drafting, step.requests, step.context)):
        own = sorted(run, key=lambda step: step.seconds)
        step = own[len(own) // 2 if ahead else 0]
        if cell not in best or step.seconds < best[cell].seconds:
            best[cell] = step
    return list(best.values())


# Kept from one start to the next


def remembered(path: Path) -> list[Step] | None:
    try:
        steps = [Step(*values) for values in json.loads(path.read_text())["steps"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = all(isinstance(value, int | float) for step in steps for value in step)
    return steps if steps and sound and all(step.seconds > 0 for step in steps) else None


def remember(path: Path, facts: dict[str, Any], steps: Sequence[Step]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{random.SystemRandom().getrandbits(32):08x}")  # several engines may start
        unfinished.write_text(json.dumps({"of": facts, "steps": steps}, indent=1) + "\n")
        unfinished.replace(path)
    except OSError as error:
        logger.info("Orthrus cannot keep what steps take: %s. They are timed again at the next start.", error)


def place(facts: dict[str, Any]) -> Path:
    """In vLLM's folder for what it remembers."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "orthrus" / f"steps-{digest(facts)}.json"


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def of_drafting(speculative: Any) -> dict[str, Any]:
    """The head and its settings, of which vLLM's own hash knows nothing."""
    return {
        "head": [speculative.model, speculative.revision, speculative.num_speculative_tokens],
        "sampling": speculative.draft_sample_method,
        "settings": {name: str(value) for name, value in vars(speculative).items() if name.startswith("orthrus_")},
    }


def what_counts(vllm_config: Any) -> dict[str, Any]:
    """Whatever changes what a step takes."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    import vllm_orthrus

    model, parallel, graphs = vllm_config.model_config, vllm_config.parallel_config, vllm_config.compilation_config
    return of_drafting(vllm_config.speculative_config) | {
        "device": current_platform.get_device_name(),
        "threads": torch.get_num_threads() if _on_cpu() else None,
        "model": [model.model, model.revision, str(model.dtype), model.quantization, model.enforce_eager],
        "text": model.hf_text_config.to_dict(),
        "cache": str(vllm_config.cache_config.cache_dtype),
        "ranks": [parallel.tensor_parallel_size, parallel.nnodes, parallel.disable_custom_all_reduce],
        "requests": vllm_config.scheduler_config.max_num_seqs,
        "graphs": [str(graphs.cudagraph_mode), graphs.cudagraph_capture_sizes],
        "vllm": vllm_config.compute_hash(),  # attention, offloading, compilation
        "variables": [os.environ.get(name) for name in VARIABLES],
        "versions": [vllm.__version__, torch.__version__, vllm_orthrus.__version__],
    }


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
