"""Getting ``method: orthrus`` through vLLM's engine arguments."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Literal

from vllm_orthrus.patches import cpu
from vllm_orthrus.patches.registry import Patch, literals, names, takes
from vllm_orthrus.patches.versions import vllm_is

METHOD = "orthrus"

# The default of --max-num-seqs where drafts keep their distributions, drafts * vocabulary * 2 bytes for each request:
# large GPUs get 1024 from vLLM, which would be 4.7 GB for Qwen3.
PROBABILISTIC_REQUESTS = 256


_FLAGS = {"method": "--spec-method", "model": "--spec-model", "num_speculative_tokens": "--spec-tokens"}


def is_ours(speculative_config: Any) -> bool:
    return speculative_config is not None and speculative_config.method == METHOD


def _create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        given = self.speculative_config
        if not isinstance(given, Mapping | None):
            raise ValueError(
                f"speculative_config={given!r} must be an object with settings such as {{'method': {METHOD!r}}}."
            )
        if METHOD not in (self.spec_method, (given or {}).get("method")):
            return original(self, target_model_config, target_parallel_config)
        settings = _settings(
            given or {},
            {"method": self.spec_method, "model": self.spec_model, "num_speculative_tokens": self.spec_tokens},
        )
        from vllm_orthrus.engine.config import OrthrusSpeculativeConfig, known_settings, unknown_settings

        unknown = unknown_settings(settings)
        if unknown:
            raise ValueError(
                f"speculative_config has no setting {', '.join(unknown)}. With method 'orthrus' it may hold: "
                f"{', '.join(known_settings())}."
            )
        if self.enable_lora:
            raise ValueError(
                "enable_lora=True is not supported with method 'orthrus' yet: drafts would pass through adapters "
                "mapped to other tokens. Serve without LoRA, or without speculation."
            )
        if self.offload_group_size > 0 and self.offload_backend in ("auto", "prefetch"):
            raise ValueError(
                f"offload_group_size={self.offload_group_size} is not supported with method 'orthrus': layers that "
                "are fetched in turn fetch each other when they are called whole, and both views of a verification "
                "pass through their parts. Offload with cpu_offload_gb, or serve without speculation."
            )
        if settings.get("draft_sample_method") == "probabilistic" and self.max_num_seqs is None:
            self.max_num_seqs = PROBABILISTIC_REQUESTS
        if settings.get("draft_load_config") is None:
            # The head is looked up when the config is built, where vLLM has not said yet how the target is to be
            # loaded. Of that only this concerns the head: are weights made up, and where do downloads go.
            load = settings["draft_load_config"] = self.create_load_config()
            load.load_format = "dummy" if load.load_format == "dummy" else "auto"
        built = OrthrusSpeculativeConfig(
            **settings, target_model_config=target_model_config, target_parallel_config=target_parallel_config
        )
        cpu.prepare_engine(target_parallel_config.tensor_parallel_size)
        return built

    return create_speculative_config


def _settings(given: Mapping[Any, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of fields, which may be written with hyphens; each said once."""
    settings: dict[str, Any] = {}
    for key, value in given.items():
        if not isinstance(key, str):
            raise ValueError(f"speculative_config has the key {key!r}, and the names of settings are text.")
        name = key.replace("-", "_")
        if name in settings:
            raise ValueError(f"speculative_config has {name} twice, with hyphens and without: keep one of them.")
        settings[name] = value
    said = {name: value for name, value in flags.items() if value is not None}
    for name, value in said.items():
        if name in settings:
            raise ValueError(
                f"{_FLAGS[name]}={value} and speculative_config[{name!r}]={settings[name]!r} both set the same thing: "
                "keep one of them."
            )
    return settings | said


def _with_orthrus(annotation: Any) -> Any:
    # One flat Literal: vLLM's command line takes its choices from a single one.
    return Literal[(*literals(annotation), METHOD)] | None


PATCHES = [
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        why="The only place where vLLM builds a SpeculativeConfig, whose validation knows a closed list of methods.",
        upstream="https://github.com/vllm-project/vllm/issues/43786",
        remove_when="vLLM lets a plugin register a speculative method with its own config class",
        check=takes("self", "target_model_config", "target_parallel_config"),
        replace=_create_speculative_config,
    ),
    Patch(
        target="vllm.config.speculative:SpeculativeConfig.__dataclass_fields__[method].type",
        why="`--spec-method` takes its choices from this annotation.",
        upstream="https://github.com/vllm-project/vllm/issues/43786",
        remove_when="vLLM lets a plugin register a speculative method",
        check=names("ngram", "eagle3", "dflash"),
        replace=_with_orthrus,
    ),
    Patch(
        target="vllm.config.vllm:EagleModelTypes",
        why="vLLM 0.32 turns asynchronous scheduling off for methods that this list does not name, though Model "
        "Runner V2 needs nothing from the method for it.",
        upstream="fixed in vLLM 0.33, which asks only Model Runner V1 for this list",
        remove_when="vLLM 0.32 is no longer supported",
        check=names("eagle", "eagle3", "dflash"),
        replace=lambda annotation: Literal[annotation, "orthrus"],
        applies=lambda: vllm_is("<0.33"),
    ),
]
