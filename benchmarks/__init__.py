"""Checks and measurements of the kernels; they need torch and triton alone."""
