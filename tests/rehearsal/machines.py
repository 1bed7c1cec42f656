"""One process per GPU, forked from one that has imported what they share."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

from tests.rehearsal.gpus import GPUS, pretend

SHARED = ["torch._inductor.lowering", "transformers.modeling_utils", "openai", "scipy.signal"]

Ask = Callable[..., Any]


@contextmanager
def machines() -> Iterator[Ask]:
    """`ask(gpu, question, *arguments)`: the question, a function of a module, answered where that GPU is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SHARED)
    # Wherever this package has met a vLLM for CPUs, Triton's kernels are interpreted, in child processes as well.
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    forkserver.ensure_running()
    if interpreted is not None:
        os.environ["TRITON_INTERPRET"] = interpreted
    started: dict[str, ProcessPoolExecutor] = {}

    def ask(gpu: str, question: Callable[..., Any], *arguments: Any) -> Any:
        if gpu not in started:
            started[gpu] = ProcessPoolExecutor(1, context, initializer=pretend, initargs=(GPUS[gpu],))
        return started[gpu].submit(question, *arguments).result()

    try:
        yield ask
    finally:
        for machine in started.values():
            machine.shutdown()
