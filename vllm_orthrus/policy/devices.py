"""Devices by name: what their makers state, and what share of it serving attains.

Shares are what well-made kernels reach at the sizes of an 8B model; products of few rows, and attention with few rows,
reach less than large ones. They are a first idea: where an engine runs, its own steps correct them.
"""

from __future__ import annotations

from vllm_orthrus.errors import UserError
from vllm_orthrus.policy.cost import Device

MEMORY, PRODUCTS, ATTENTION = 0.875, 0.657, 0.404  # of the peaks
FP8 = {"A100": 1.0}  # which widens weights; all others multiply twice as fast
LAUNCH = 1.2e-6
STEP = 3e-4

_STATED = {  # bytes per second, dense operations per second in bf16 with sums in fp32, bytes
    "A100": (2.039e12, 312e12, 80e9),
    "H100": (3.35e12, 989e12, 80e9),
    "H200": (4.8e12, 989e12, 141e9),
    "B200": (8.0e12, 2250e12, 180e9),
    "L40S": (0.864e12, 362e12, 48e9),
    "RTX 4090": (1.008e12, 165e12, 24e9),
    "RTX 5090": (1.792e12, 209e12, 32e9),
    "MI300X": (5.3e12, 1307e12, 192e9),
}

DEVICES = {
    name: Device(
        name, MEMORY * memory, PRODUCTS * peak, ATTENTION * peak, LAUNCH, STEP, 4.0, capacity, FP8.get(name, 2.0)
    )
    for name, (memory, peak, capacity) in _STATED.items()
}

# Two cores with AVX-512 and no products in bfloat16, in float32; corrected by what is measured.
CPU = Device("CPU", 1.2e10, 1.2e11, 4e10, 2.5e-5, 1e-3, 1.0, 16e9)


def find_device(name: str) -> Device:
    """By its short name, or by the longer one that a driver gives."""
    for known in sorted(DEVICES, key=len, reverse=True):
        if _plain(known) in _plain(name):
            return DEVICES[known]
    if _plain(name).startswith("cpu"):
        return CPU
    raise UserError(f"device {name!r} is not known. Known are {', '.join(DEVICES)} and CPU.")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
