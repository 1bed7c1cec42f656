"""A folder for PYTHONPATH: whatever Python is started with it finds another release of this package."""

from pathlib import Path

RELEASE = "9.9.9"
# As the interpreter starts, so that no order of paths matters.
SITE = """
import sys
from importlib.metadata import DistributionFinder, PathDistribution
from pathlib import Path

class Another(DistributionFinder):
    def find_spec(self, *arguments, **named):
        return None

    def find_distributions(self, context):
        if context.name == "vllm-orthrus":
            yield PathDistribution(Path(__file__).parent / "vllm_orthrus.dist-info")

sys.meta_path.insert(0, Another())
"""


def write(folder: Path) -> Path:
    (folder / "sitecustomize.py").write_text(SITE)
    (folder / "vllm_orthrus.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: vllm-orthrus\nVersion: {RELEASE}\n"
    (folder / "vllm_orthrus.dist-info" / "METADATA").write_text(metadata)
    return folder
