"""vllm-orthrus: a frozen LLM drafts for itself through a diffusion view of its own attention, inside stock vLLM."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-orthrus")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+source"
