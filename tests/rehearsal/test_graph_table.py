"""docs/graphs.md says what vLLM's graph managers say."""

from tests.rehearsal.graph_table import PAGE, page
from tests.rehearsal.machines import Ask


def test_page_is_what_the_managers_say(ask: Ask) -> None:
    assert PAGE.read_text() == page(ask), "if this is meant: python -m tests.rehearsal.graph_table"
