"""The same versions in every process: a worker with others is named before it loads anything."""

import socket
import sys

import vllm

import vllm_orthrus

Versions = dict[str, str]


def versions_here() -> Versions:
    return {"vllm-orthrus": vllm_orthrus.__version__, "vLLM": vllm.__version__}


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
    return " and ".join(f"{name} {version}" for name, version in versions.items())
