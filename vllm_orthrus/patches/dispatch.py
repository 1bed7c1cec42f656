"""Getting from ``method: orthrus`` to our speculator and model class."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_orthrus.patches.arguments import is_ours
from vllm_orthrus.patches.registry import Patch, takes

UPSTREAM = "https://github.com/vllm-project/vllm/issues/43786"


def _init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not is_ours(vllm_config.speculative_config):
            return original(vllm_config, device, req_states)
        from vllm_orthrus.engine.speculator import OrthrusSpeculator
        from vllm_orthrus.patches import install_in_worker

        install_in_worker()
        return OrthrusSpeculator(vllm_config, device)

    return init_speculator


def _v1_unsupported(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @wraps(original)
    def _get_v1_model_runner_unsupported_features(self: Any) -> list[str]:
        unsupported = original(self)
        if is_ours(self.speculative_config):
            unsupported.append("method 'orthrus' (leave VLLM_USE_V2_MODEL_RUNNER unset)")
        return unsupported

    return _get_v1_model_runner_unsupported_features


PATCHES = [
    Patch(
        target="vllm.v1.worker.gpu.spec_decode:init_speculator",
        why="Model Runner V2 picks its speculator in a closed chain of methods.",
        upstream=UPSTREAM,
        remove_when="vLLM lets a plugin register a speculator",
        check=takes("vllm_config", "device", "req_states"),
        replace=_init_speculator,
        also=("vllm.v1.worker.gpu.model_runner:init_speculator",),
    ),
    Patch(
        target="vllm.config.vllm:VllmConfig._get_v1_model_runner_unsupported_features",
        why="Model Runner V1 would fail much later, with a message that names no way out.",
        upstream=UPSTREAM,
        remove_when="Model Runner V1 is gone",
        check=takes("self"),
        replace=_v1_unsupported,
    ),
]
