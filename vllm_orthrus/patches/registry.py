"""Every place where this package changes vLLM, as data.

A patch says what it replaces and why, where upstream discusses it and when it
can go. Installing is all or nothing: every applicable patch checks its target
first, and one that does not recognise it stops the whole set, because half a
plugin fails later and stranger than none.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple

Check = Callable[[Any], str | None]
"""Given the target, says what is wrong with it, or None."""


class State(Enum):
    APPLIED = "applied"
    PENDING = "not applied yet"
    NOT_NEEDED = "not needed here"
    REFUSED = "target not recognised"


class Site(NamedTuple):
    """Where a target is stored: ``owner.key`` or ``owner[key]``."""

    owner: Any
    key: str
    subscript: bool

    def get(self) -> Any:
        if self.subscript:
            return self.owner[self.key]
        if isinstance(self.owner, type | ModuleType):
            return vars(self.owner)[self.key]  # keeps properties and class methods as the descriptors they are
        return getattr(self.owner, self.key)

    def set(self, value: Any) -> None:
        if self.subscript:
            self.owner[self.key] = value
        else:
            setattr(self.owner, self.key, value)


def locate(target: str) -> Site:
    """Find ``"package.module:Class.attribute[key]"``, importing its module."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = re.findall(r"[^.\[\]]+\]?", path)
    for step in parents:
        owner = owner[step[:-1]] if step.endswith("]") else getattr(owner, step)
    return Site(owner, last.rstrip("]"), last.endswith("]"))


@dataclass
class Patch:
    """One replacement inside vLLM."""

    target: str
    why: str
    upstream: str
    remove_when: str
    check: Check
    replace: Callable[[Any], Any]
    """Makes the replacement from the original."""
    also: Sequence[str] = ()
    """Where importers may hold the original by name; replaced if already imported."""
    applies: Callable[[], bool] = lambda: True
    state: State = field(default=State.PENDING, init=False)
    problem: str | None = field(default=None, init=False)

    def verify(self) -> bool:
        """Whether the target is what this patch was written against."""
        if self.state is State.APPLIED:
            return True
        if not self.applies():
            self.state, self.problem = State.NOT_NEEDED, None
            return True
        try:
            self.problem = self.check(locate(self.target).get())
        except (ImportError, AttributeError, KeyError) as error:
            self.problem = f"missing ({error!r})"
        self.state = State.REFUSED if self.problem else State.PENDING
        return self.problem is None

    def apply(self) -> None:
        if self.state is not State.PENDING:
            return
        site = locate(self.target)
        original = site.get()
        replacement = self.replace(original)
        site.set(replacement)
        for copy in self.also:
            if copy.partition(":")[0] in sys.modules:
                holder = locate(copy)
                if holder.get() is original:
                    holder.set(replacement)
        self.state = State.APPLIED


def apply_all(patches: Sequence[Patch]) -> list[Patch]:
    """Apply all patches, or none and return those whose targets were not recognised."""
    refused = [patch for patch in patches if not patch.verify()]
    if not refused:
        for patch in patches:
            patch.apply()
    return refused


# Checks


def takes(*parameters: str) -> Check:
    """The target is a function with exactly these parameters."""

    def check(target: Any) -> str | None:
        function = target.fget if isinstance(target, property) else target
        if not callable(function):
            return f"expected a function, found {type(target).__name__}"
        found = tuple(inspect.signature(function).parameters)
        return None if found == parameters else f"expected parameters {parameters}, found {found}"

    return check


def is_property(target: Any) -> str | None:
    return None if isinstance(target, property) else f"expected a property, found {type(target).__name__}"


def is_classmethod(target: Any) -> str | None:
    return None if isinstance(target, classmethod) else f"expected a classmethod, found {type(target).__name__}"


def is_bool(target: Any) -> str | None:
    return None if isinstance(target, bool) else f"expected a bool, found {type(target).__name__}"


def names(*required: str) -> Check:
    """The target is a type annotation that lists these literal values."""

    def check(target: Any) -> str | None:
        missing = [value for value in required if value not in literals(target)]
        return f"the annotation {target} does not list {missing}" if missing else None

    return check


def literals(annotation: Any) -> list[str]:
    """Every literal value in an annotation, however deeply nested."""
    arguments = getattr(annotation, "__args__", ())
    return [value for value in arguments if isinstance(value, str)] + [
        value for argument in arguments if not isinstance(argument, str) for value in literals(argument)
    ]
