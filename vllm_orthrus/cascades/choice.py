"""Which cascade a server or a request has chosen: read, checked, and refused with what would be allowed."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_orthrus.cascades.rules import MOST_K, NEEDS_Q, RULES
from vllm_orthrus.errors import UserError

NAME = "orthrus_cascade"  # of the setting, and of the key among a request's extra arguments
REFUSE, OFF = "refuse", "off"


class Cascade(NamedTuple):
    rule: str
    alpha: float = 0.0
    k: int = 1
    ratio: float = 1.0

    def __str__(self) -> str:
        knobs = f"k={self.k}, ratio={self.ratio}" if self.rule == "relaxed" else f"alpha={self.alpha}"
        return f"{self.rule} ({knobs})"

    def lossless(self, greedy: bool) -> bool:
        """Whether pi is p: then the request is decoded as if it had not asked."""
        if self.rule == "relaxed":
            return greedy and (self.k == 1 or self.ratio == 1)
        # A row that is certain, max q = 1, is no reason to leave it the token where nothing may be left to it.
        return self.alpha == 0 and (self.rule == "chow" or (greedy and self.rule in ("token_v2", "token_v3")))


def read(given: Any, where: str = NAME) -> Cascade:
    """Of {"rule": ..., "alpha": ...}, or of {"rule": "relaxed", "k": ..., "ratio": ...}."""
    if not isinstance(given, Mapping):
        raise UserError(f'{where}={given!r} must be an object such as {{"rule": "token_v3", "alpha": 0.2}}.')
    settings = dict(given)
    rule = settings.pop("rule", None)
    if not isinstance(rule, str) or rule not in RULES:
        raise UserError(f"{where} has rule={rule!r}. It may be one of {', '.join(RULES)}.")
    allowed = ("k", "ratio") if rule == "relaxed" else ("alpha",)
    unknown = sorted(str(name) for name in settings if name not in allowed)
    if unknown:
        raise UserError(f"{where} has no {', '.join(unknown)} with rule {rule!r}: it takes {' and '.join(allowed)}.")
    for name in allowed:
        value = settings.get(name)
        least, most, kind = (1, MOST_K, int) if name == "k" else (0, 1, (int, float))
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            number = "whole number" if name == "k" else "number"
            raise UserError(
                f"{where} has {name}={value!r} with rule {rule!r}. It must be a {number} from {least} to {most}."
            )
    return Cascade(rule, **settings)


def read_server(given: Any) -> Cascade | None:
    """Of the server's setting: what requests get that say nothing."""
    if given is None or given == REFUSE:
        return None
    if isinstance(given, str):
        raise UserError(
            f'{NAME}={given!r} is no cascade. Give {{"rule": ..., "alpha": ...}} with one of {", ".join(RULES)}, '
            f"or {REFUSE!r} to allow none, or leave it out."
        )
    return read(given)


def read_request(extra: Mapping[str, Any] | None, server: Cascade | None) -> Cascade | None:
    """Of a request's extra arguments. The HTTP interface takes no objects among them, but text that says one."""
    extra = extra or {}
    unknown = sorted(name for name in extra if name.startswith("orthrus_") and name != NAME)
    if unknown:
        raise UserError(f"no extra argument is called {', '.join(unknown)}. There is {NAME}.")
    if NAME not in extra:
        return server
    given = extra[NAME]
    if given == OFF:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise UserError(
                f'{NAME}={given!r} is neither {OFF!r} nor JSON such as \'{{"rule": "token_v3", "alpha": 0.2}}\'. '
                f"Rules are {', '.join(RULES)}."
            ) from None
    return read(given)


def obstacle(
    cascade: Cascade, draft_sample_method: str, rejection_sample_method: str, adaptive: bool, sharded: bool = False
) -> str | None:
    """Why an engine with these settings cannot follow it, and what to do."""
    if rejection_sample_method != "standard":
        return (
            f"{NAME} does not go with rejection_sample_method={rejection_sample_method!r}, which tests drafts by "
            "another rule. Set it to 'standard'."
        )
    if adaptive:
        return f"{NAME} does not go with enable_adaptive_verification=True. Leave one of them out."
    if sharded:
        return (
            f"{NAME} does not go with enable_batch_sharded_sampling=True: each rank judges some of the requests, and "
            "one rank's counts are told. Leave one of them out."
        )
    if cascade.rule in NEEDS_Q and draft_sample_method != "probabilistic":
        others = ", ".join(rule for rule in RULES if rule not in NEEDS_Q)
        return (
            f"{NAME} with rule {cascade.rule!r} needs the drafts' distributions, which "
            f"draft_sample_method={draft_sample_method!r} does not keep. Start with 'probabilistic', or choose one of "
            f"{others}."
        )
    return None
