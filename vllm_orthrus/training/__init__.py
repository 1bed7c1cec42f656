"""The reference model and the trainer: plain PyTorch, no vLLM."""
