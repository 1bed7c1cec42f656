"""The machines are shared by all tests of a session."""

from collections.abc import Iterator

import pytest

from tests.rehearsal.machines import Ask, machines


@pytest.fixture(scope="session")
def ask() -> Iterator[Ask]:
    with machines() as ask_there:
        yield ask_there
