"""What clients get when a part of the server dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.serve import faults, servers

THOROUGH = bool(os.environ.get("ORTHRUS_TEST_THOROUGH"))

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not THOROUGH, reason="a server each; nightly, and with ORTHRUS_TEST_THOROUGH=1")
@pytest.mark.parametrize("fault", ["kill-worker", "kill-engine"])
def test_clients_are_told_when_a_process_dies(fault: str, tmp_path: Path) -> None:
    """All of them, soon; and nothing of the server is left. Its status is 0, which stock vLLM's is, too."""
    with servers.drafting(tmp_path) as server:
        found = faults.strike(server, faults.FAULTS[fault])
    assert found.hanging == 0 and found.answered == 0
    assert len(found.told) == 24 and all(found.told)
    assert found.seconds < 20
    assert found.status is not None and not found.left_behind
