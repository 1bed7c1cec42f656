"""Triton kernels, each beside a `naive` PyTorch twin that says what it computes."""
