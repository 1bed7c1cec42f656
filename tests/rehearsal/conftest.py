"""The machines are shared by all tests of a session; engines are those of tests/engine."""

from collections.abc import Iterator

import pytest

from tests.engine.conftest import plain, start, tiny
from tests.rehearsal.machines import Ask, machines

__all__ = ["plain", "start", "tiny"]


@pytest.fixture(scope="session")
def ask() -> Iterator[Ask]:
    with machines() as ask_there:
        yield ask_there
