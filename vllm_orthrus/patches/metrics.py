"""Counts of one-pass drafting, cascades and modes, from where they are made to vLLM's `/metrics` and its periodic log.

    worker        puts what was counted since the start beside each step's output
    engine core   adds what its policy of modes has, and tells the front end what is new, beside vLLM's counts of drafts
    front end     adds it up

As far as the engine core the counts are totals, so that an output that is lost, or another rank's, changes nothing.
From there on they are differences, like all that vLLM counts, because several front ends may share them.

vLLM's stat logger plugins would need none of the front end's patches, but one that is installed alters logging for
every other method too, and Ray's metrics know nothing of it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any, NamedTuple

from vllm_orthrus.cascades.rules import RULES
from vllm_orthrus.patches.arguments import is_ours
from vllm_orthrus.patches.modes import AskPolicy
from vllm_orthrus.patches.registry import Patch, takes

Counts = dict[str, int]


class Metric(NamedTuple):
    name: str  # vLLM clears the metrics of a former engine by this prefix
    documentation: str
    cause: str | None = None
    rule: str | None = None
    unit: float = 1  # of what is counted


_MISSES = ("vllm:orthrus_misses", "Verifications whose outcome no hypothesis had foreseen exactly, by cause.")

METRICS = {
    "verifications": Metric("vllm:orthrus_verifications", "Verifications of a request that carried hypotheses."),
    "hits": Metric("vllm:orthrus_hits", "Verifications whose outcome a hypothesis had foreseen exactly."),
    "accepted_count_missed": Metric(*_MISSES, cause="accepted_count"),
    "bonus_missed": Metric(*_MISSES, cause="bonus"),
    "tokens": Metric("vllm:orthrus_tokens", "Tokens that came of verifications with hypotheses."),
    "rows": Metric("vllm:orthrus_rows", "Rows in forwards with hypotheses, those of the verification included."),
    "draft_passes": Metric("vllm:orthrus_draft_passes", "Drafts of a request that took a forward of their own."),
}

# There where modes are chosen. Their quotient is by how much drafting is estimated to be faster.
MODE_METRICS = {
    "seconds": Metric(
        "vllm:orthrus_decoding_seconds",
        "Seconds of steps that decoded and read no prompt, plain ones included.",
        unit=1e-6,
    ),
    "plain_seconds": Metric(
        "vllm:orthrus_plain_seconds",
        "Seconds that plain steps would have taken for the tokens of the same steps, as is believed.",
        unit=1e-6,
    ),
}

# There once a request has asked for a cascade.
_TAKEN = ("vllm:orthrus_cascade_tokens", "LOSSY: tokens that a cascade's rule has left to the draft, by rule.")
_DEPARTED = ("vllm:orthrus_cascade_departures", "Those among them that aren't the model's likeliest, by rule.")

CASCADE_METRICS = {
    f"cascade_{what}_{rule}": Metric(*named, rule=rule)
    for what, named in (("taken", _TAKEN), ("departed", _DEPARTED))
    for rule in RULES
}

ALL_METRICS = METRICS | MODE_METRICS | CASCADE_METRICS


@dataclass
class _Extra:
    """The field that vLLM's stats get."""

    orthrus: Counts | None = None


def _spec_decoding_stats(original: Any) -> Any:
    # In place: vLLM's annotations hold this very class, and msgspec reads from them what the front end decodes.
    original.orthrus = _Extra.orthrus
    original.__annotations__ |= _Extra.__annotations__
    original.__dataclass_fields__ |= _Extra.__dataclass_fields__
    return original


def _is_dataclass(target: Any) -> str | None:
    if not is_dataclass(target) or hasattr(target, "__slots__"):
        return f"expected a dataclass without slots, found {target!r}"
    return "has a field 'orthrus' of its own" if hasattr(target, "orthrus") else None


def _sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = original(self, grammar_output)
        if output is not None and is_ours(self.speculative_config):
            output.model_runner_output.orthrus = self.speculator.counts()
        return output

    return sample_tokens


def _update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = original(self, scheduler_output, model_runner_output)
        counts: Counts = getattr(model_runner_output, "orthrus", None) or {}
        if isinstance(ask := getattr(self, "dynamic_sd_lookup", None), AskPolicy):
            counts = counts | ask.counts()
        if counts:
            all_stats = (output.scheduler_stats for output in outputs.values())
            stats = next((found.spec_decoding_stats for found in all_stats if found is not None), None)
            # None in a step that verified nothing. What it counted is in the next step's total as well.
            if stats is not None:
                told: Counts = getattr(self, "orthrus_told", {})
                stats.orthrus = new_since(told, counts)
                self.orthrus_told = told | counts
        return outputs

    return update_from_output


def new_since(told: Mapping[str, int], counts: Counts) -> Counts:
    """A total below what was told comes of a worker that was started again; nothing may count backwards."""
    again = any(count < told.get(name, 0) for name, count in counts.items())
    return {name: count - (0 if again else told.get(name, 0)) for name, count in counts.items()}


def _init_prom(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __init__(
        self: Any,
        speculative_config: Any,
        labelnames: list[str],
        per_engine_labelvalues: Any,
        is_diffusion: bool = False,
    ) -> None:
        original(self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion)
        if not is_ours(speculative_config):
            return
        make = partial(_make_counters, self._counter_cls, labelnames, per_engine_labelvalues)
        self.orthrus = make(METRICS) if speculative_config.orthrus_passes == "one" else {}
        self.orthrus |= make(MODE_METRICS) if speculative_config.orthrus_modes else {}
        self.orthrus_cascades = partial(make, CASCADE_METRICS)

    return __init__


def _make_counters(
    counter_cls: Callable[..., Any],
    labelnames: list[str],
    per_engine_labelvalues: dict[int, list[object]],
    metrics: Mapping[str, Metric],
) -> dict[str, dict[int, Any]]:
    """By what they count, then by engine."""
    from vllm.v1.metrics.utils import create_metric_per_engine

    families: dict[str, Any] = {}
    counters = {}
    for counted, metric in metrics.items():
        own = {name: value for name, value in (("cause", metric.cause), ("rule", metric.rule)) if value is not None}
        if metric.name not in families:
            labels = [*labelnames, *own]
            families[metric.name] = counter_cls(name=metric.name, documentation=metric.documentation, labelnames=labels)
        values = {engine: [*values, *own.values()] for engine, values in per_engine_labelvalues.items()}
        counters[counted] = create_metric_per_engine(families[metric.name], values)
    return counters


def _observe_prom(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def observe(self: Any, spec_decoding_stats: Any, engine_idx: int = 0) -> None:
        original(self, spec_decoding_stats, engine_idx)
        new: Counts | None = getattr(spec_decoding_stats, "orthrus", None)
        if new is None:
            return
        if not CASCADE_METRICS.keys().isdisjoint(new) and not CASCADE_METRICS.keys() <= self.orthrus.keys():
            self.orthrus |= self.orthrus_cascades()
        for counted, counters in getattr(self, "orthrus", {}).items():
            counters[engine_idx].inc(ALL_METRICS[counted].unit * new.get(counted, 0))

    return observe


def _observe_log(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def observe(self: Any, spec_decoding_stats: Any) -> None:
        original(self, spec_decoding_stats)
        vars(self).setdefault("orthrus", Counter()).update(getattr(spec_decoding_stats, "orthrus", None) or {})

    return observe


def _log(original: Callable[..., None]) -> Callable[..., None]:
    vllms = signature(original).parameters["log_fn"].default

    @wraps(original)
    def log(self: Any, log_fn: Callable[..., None] = vllms) -> None:
        original(self, log_fn)
        counts: Counter[str] = vars(self).pop("orthrus", Counter())
        _log_cascades(counts, log_fn)
        if counts["seconds"]:
            log_fn(
                "Orthrus: %.2f times as fast as plain steps, as is believed.",
                counts["plain_seconds"] / counts["seconds"],
            )
        verifications = counts["verifications"]
        if not verifications:
            return
        log_fn(
            "Orthrus in one pass: %.2f tokens per forward; %.0f%% of outcomes foreseen, %.0f%% missed for their "
            "accepted count, %.0f%% for their bonus; %.1f rows per request and forward; "
            "%d drafts in a pass of their own.",
            counts["tokens"] / verifications,
            100 * counts["hits"] / verifications,
            100 * counts["accepted_count_missed"] / verifications,
            100 * counts["bonus_missed"] / verifications,
            counts["rows"] / verifications,
            counts["draft_passes"],
        )

    return log


def _log_cascades(counts: Counter[str], log_fn: Callable[..., None]) -> None:
    by_rule = {rule: counts[f"cascade_taken_{rule}"] for rule in RULES}
    if any(by_rule.values()):
        log_fn(
            "Orthrus cascades (LOSSY): %d tokens left to drafts (%s), %d of them not the model's likeliest.",
            sum(by_rule.values()),
            ", ".join(f"{rule} {count}" for rule, count in by_rule.items() if count),
            sum(counts[f"cascade_departed_{rule}"] for rule in RULES),
        )


_UPSTREAM = "vLLM has stat logger plugins for the front end, and no way for a speculator to reach them"
_REMOVE_WHEN = "a speculator can count things of its own"
_STATS = "vllm.v1.spec_decode.metrics"

PATCHES = [
    Patch(
        target="vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        why="Here a step's output meets the stats that are sent to the front end.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=takes("self", "scheduler_output", "model_runner_output"),
        replace=_update_from_output,
    ),
    Patch(
        target=f"{_STATS}:SpecDecodingStats",
        why="msgspec carries a step's stats from engine core to front end, and decodes only declared fields.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=_is_dataclass,
        replace=_spec_decoding_stats,
    ),
    Patch(
        target=f"{_STATS}:SpecDecodingProm.__init__",
        why="One-pass drafting's counters belong under /metrics, beside vLLM's own for drafts.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=takes("self", "speculative_config", "labelnames", "per_engine_labelvalues", "is_diffusion"),
        replace=_init_prom,
    ),
    Patch(
        target=f"{_STATS}:SpecDecodingProm.observe",
        why="Here a step's stats are added to the counters under /metrics; ours are added with vLLM's own.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=takes("self", "spec_decoding_stats", "engine_idx"),
        replace=_observe_prom,
    ),
    Patch(
        target=f"{_STATS}:SpecDecodingLogging.observe",
        why="vLLM's periodic log covers many steps; here the counts of each are added up until the next line.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=takes("self", "spec_decoding_stats"),
        replace=_observe_log,
    ),
    Patch(
        target=f"{_STATS}:SpecDecodingLogging.log",
        why="vLLM's periodic log is where one looks for how well drafting does; here its line on drafts is written.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=takes("self", "log_fn"),
        replace=_log,
    ),
]

# Only workers load the model runner, so this one is applied there, once a drafter is made.
WORKER_PATCHES = [
    Patch(
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens",
        why="One-pass drafting counts on the device of the rank whose output goes to the scheduler.",
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        check=takes("self", "grammar_output"),
        replace=_sample_tokens,
    ),
]
