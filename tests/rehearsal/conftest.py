"""One process per GPU for the whole session, forked from one that has imported what they share."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.rehearsal.gpus import GPUS, pretend

SHARED = ["torch._inductor.lowering", "transformers.modeling_utils", "openai", "scipy.signal"]

Ask = Callable[..., Any]


@pytest.fixture(scope="session")
def ask() -> Iterator[Ask]:
    """`ask(gpu, question, *arguments)`: the question, a function of a module, called where that GPU is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SHARED)
    machines: dict[str, ProcessPoolExecutor] = {}

    def ask_there(gpu: str, question: Callable[..., Any], *arguments: Any) -> Any:
        if gpu not in machines:
            machines[gpu] = ProcessPoolExecutor(1, context, initializer=pretend, initargs=(GPUS[gpu],))
        return machines[gpu].submit(question, *arguments).result()

    yield ask_there
    for machine in machines.values():
        machine.shutdown()
