"""What drafting costs in memory: the head, and nothing of the base a second time."""

from pathlib import Path

import pytest

from tests.engine import checkpoints
from tests.engine.subprocesses import result_of

pytestmark = pytest.mark.slow

MEASURE = """
import json, sys
from tests.engine.harness import Engine, prompts
if __name__ == "__main__":
    model, speculative = map(json.loads, sys.argv[1:])
    engine = Engine(model, speculative)
    engine.run(prompts(2), 4)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print("RESULT", int(status["RssAnon"].split()[0]) << 10)
"""


def test_resident_memory_grows_by_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights large enough that a second copy of any big part of the base could not hide in the noise."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "head_dim": 64}
    for name, value in (sizes | {"num_key_value_heads": 8, "num_hidden_layers": 8}).items():
        monkeypatch.setitem(checkpoints.CONFIG, name, value)
    base = checkpoints.write_base(tmp_path / "base")
    head = checkpoints.write_head(tmp_path / "head", block_size=4)
    head_bytes, base_bytes = ((folder / "model.safetensors").stat().st_size for folder in (head, base))
    assert base_bytes > 3 * head_bytes > 150e6
    plain = result_of(tmp_path, MEASURE, str(base), None)
    drafting = result_of(tmp_path, MEASURE, str(base), {"method": "orthrus", "model": str(head)})
    grown = drafting - plain
    print(f"grown by {grown / 1e6:.0f} MB; head {head_bytes / 1e6:.0f} MB, base {base_bytes / 1e6:.0f} MB")
    # What the engine allocates on the way varies by some tens of megabytes; half of the base again would be 190.
    assert grown < head_bytes + 0.3 * base_bytes
