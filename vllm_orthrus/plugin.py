"""The two functions vLLM calls in every one of its processes.

vLLM loads plugins in the front end, the engine core, each worker and its model
inspection subprocess, so both functions are idempotent, and neither imports
more of vLLM than the caller already has.
"""


def platform() -> None:
    """``vllm.platform_plugins``: runs while vLLM decides which platform it is on.

    Orthrus brings no platform, so this always answers "not mine". It is an entry
    point only because this is the last moment before vLLM looks for Triton, and
    a vLLM built for CPUs needs Triton's interpreter to run Model Runner V2.
    """
    from vllm_orthrus.patches.cpu import enable_interpreter

    enable_interpreter()


def register() -> None:
    """``vllm.general_plugins``: teach this process's vLLM ``method: orthrus``."""
    from vllm_orthrus.patches import install

    install()
