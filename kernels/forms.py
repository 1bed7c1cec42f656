"""Which form of a kernel runs: Triton's, or its twin in PyTorch."""

import os
from typing import Literal, cast

import torch

SETTING = "VLLM_ORTHRUS_KERNELS"

# Without a limit, NVIDIA's assembler spills a few registers of kernels that need many, so that one program more fits on
# a multiprocessor. For attention shared memory has no room for that one, and of others there is only one program.
REGISTERS = {} if torch.version.hip else {"maxnreg": 255}

Form = Literal["auto", "triton", "torch"]


def wanted_form() -> Form:
    """ "auto": Triton where it compiles, twins on CPUs. "triton" on a CPU means interpreted: exact, and slow."""
    form = os.environ.get(SETTING, "auto")
    if form not in ("auto", "triton", "torch"):
        raise ValueError(f"{SETTING}={form} is not one of 'auto', 'triton' and 'torch'. Unset it, or give one of them.")
    return cast(Form, form)


def runs_triton(device: torch.device, chosen: bool = False) -> bool:
    """chosen: orthrus_attention has picked this kernel, on a CPU too, so that only "torch" runs its twin."""
    form = wanted_form()
    return (chosen or device.type != "cpu") if form == "auto" else form == "triton"
