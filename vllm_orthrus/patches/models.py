"""The architecture name of merged Orthrus checkpoints."""


def register() -> None:
    """Let vLLM serve ``architectures: ["OrthrusLM"]`` without the checkpoint's remote code."""
    from vllm import ModelRegistry

    # As text, so that the class is imported where a model is built and nowhere else.
    if "OrthrusLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("OrthrusLM", "vllm_orthrus.engine.merged:OrthrusForCausalLM")
