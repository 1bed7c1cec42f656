"""The `vllm-orthrus` command."""
