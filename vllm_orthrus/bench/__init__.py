"""`vllm-orthrus bench`: ways to decode, measured side by side."""
