"""Whether an answer is right, for the classes of prompts whose answers can be checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable


def _result(text: str, expected: str) -> bool:
    """The number that it ends with."""
    found, wanted = (re.findall(r"-?\d+", one) for one in (text, expected))
    return bool(found) and found[-1] == wanted[-1]


def _numbers(text: str, expected: str) -> bool:
    """All of them, in order."""
    return re.findall(r"-?\d+", text) == re.findall(r"-?\d+", expected)


def _record(text: str, expected: str) -> bool:
    """JSON, and of the same content."""
    try:
        return bool(json.loads(text) == json.loads(expected))
    except ValueError:
        return False


def _log(text: str, expected: str) -> bool:
    """Every line is the one that was asked for, and none is missing."""
    return text.strip().splitlines() == expected.strip().splitlines()


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "arithmetic": _result,
    "counting": _numbers,
    "json": _record,
    "log": _log,
}


def is_right(kind: str, text: str, expected: str) -> bool:
    return CHECKS[kind](text, expected)
