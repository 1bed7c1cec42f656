# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Buckets of confidences and shares, for the kernels that count by them."""

import triton
import triton.language as tl


@triton.jit
def bucket_of(x, edges, EDGES: tl.constexpr):
    """How many of `edges`, which rise, each value exceeds: as chances.py has it."""
    bucket = tl.zeros_like(x).to(tl.int32)
    for edge in range(EDGES):
        bucket += (x > tl.load(edges + edge)).to(tl.int32)
    return bucket
