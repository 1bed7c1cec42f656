"""Ways to decode: plain, this package's, and whatever else vLLM can do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_orthrus.errors import UserError

PLAIN = "plain"
OURS: dict[str, dict[str, Any]] = {"two": {"orthrus_passes": "two"}, "one": {"orthrus_passes": "one"}, "auto": {}}
NAMES = (PLAIN, *OURS)


class Way(NamedTuple):
    name: str
    speculative: dict[str, Any] | None  # vLLM's speculative config, if it is to have one

    @property
    def variables(self) -> dict[str, str]:
        """Whoever is compared with us runs vLLM as it is: no plugin has this name, so none is loaded."""
        ours = self.speculative is not None and self.speculative["method"] == "orthrus"
        return {} if ours else {"VLLM_PLUGINS": "none"}

    @property
    def lossless(self) -> bool:
        """Whether it claims to say what plain decoding says."""
        return self.speculative is None or self.speculative.get("rejection_sample_method") != "synthetic"


def choose_ways(names: Sequence[str], against: Sequence[str] = (), head: str | None = None) -> list[Way]:
    """Plain decoding first, as all others are told in its terms."""
    ways = [Way(PLAIN, None)]
    for name in dict.fromkeys(names):
        if name in OURS:
            ways.append(Way(name, orthrus(head) | OURS[name]))
        elif name != PLAIN:
            raise UserError(f"--ways {name}: known are {', '.join(NAMES)}. For other methods there is --against.")
    for text in against:
        speculative = _speculative(text)
        if speculative["method"] == "orthrus":
            speculative = orthrus(head) | speculative
        name = str(speculative.pop("name", speculative["method"]))
        if name in {way.name for way in ways}:
            raise UserError(f'--against {text}: there is a way called {name} already. Add another "name" to it.')
        ways.append(Way(name, speculative))
    return ways


def orthrus(head: str | None) -> dict[str, Any]:
    return {"method": "orthrus"} | ({"model": head} if head else {})


def _speculative(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--against {text}: not JSON ({error}). Quote it as one argument.") from error
    if not isinstance(found, dict) or not isinstance(found.get("method"), str):
        raise UserError(f'--against {text}: must be a speculative config with a "method", as in {{"method": "ngram"}}.')
    return found
