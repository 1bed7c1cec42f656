"""Replicas of a model that drafts for itself, behind one address that speaks OpenAI's protocol.

    serve run examples/ray_serve/tiny.yaml         # on processors, with the tiny model
    serve run examples/ray_serve/qwen3-8b.yaml     # on GPUs

The files hold arguments of `build`. Nothing but `speculative_config` makes the replicas draft.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import vllm
from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app

LAST_WORDS = 120  # seconds that a replica which is told to stop has for the answers that it has begun


class Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field("Qwen/Qwen3-8B", description="folder or repository")
    head: str | None = Field(None, description="folder or repository; by the model's name if none is given")
    name: str | None = Field(None, description="by which clients ask for it; the model's if none is given")
    replicas: int = Field(1, ge=1, description="at least so many")
    most: int = Field(4, ge=1, description="at most so many")
    requests: int = Field(64, ge=1, description="under way in a replica; with more, another one is started")
    cpus: int = Field(0, ge=0, description="cores of a replica that has no GPU; 0: each rank has a GPU")
    speculative: dict[str, Any] | None = Field(
        {}, description="further settings of `speculative_config`; null: plainly"
    )
    engine: dict[str, Any] = Field({}, description="further arguments of vLLM's engine")


def build(asked: Arguments) -> Application:
    # With processors only, none is set aside for what passes requests on.
    ingress = {"ray_actor_options": {"num_cpus": 0}} if asked.cpus else {}
    try:
        return build_openai_app({"llm_configs": [config(asked)], "ingress_deployment_config": ingress})
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"Ray {version('ray')} doesn't know its way about vLLM {vllm.__version__} ({error}). Ray 2.60 goes with "
            "vLLM 0.32, not with 0.33: install vLLM 0.32, or a Ray that is newer."
        ) from error


def config(asked: Arguments) -> LLMConfig:
    head = {"model": located(asked.head)} if asked.head else {}
    drafts = (
        {} if asked.speculative is None else {"speculative_config": {"method": "orthrus", **head, **asked.speculative}}
    )
    return LLMConfig(
        model_loading_config={"model_id": asked.name or asked.model, "model_source": located(asked.model)},
        engine_kwargs=asked.engine | drafts,
        deployment_config={
            "autoscaling_config": {
                "min_replicas": asked.replicas,
                "max_replicas": max(asked.replicas, asked.most),
                "target_ongoing_requests": asked.requests,
            },
            # Requests that begin alike go to the replica that has their beginning in its cache, unless it has many more
            # to do than another. Drafts read that cache and have none of their own, so they lose nothing elsewhere.
            "request_router_config": {
                "request_router_class": "ray.serve.llm.request_router:PrefixCacheAffinityRouter",
                "request_router_kwargs": {"imbalanced_threshold": 8},
            },
            "graceful_shutdown_timeout_s": LAST_WORDS,
            **({"ray_actor_options": {"num_cpus": 0}} if asked.cpus else {}),
        },
        **(on_cpus(asked.cpus) if asked.cpus else {}),
    )


def on_cpus(cores: int) -> dict[str, Any]:
    """Replicas share a machine, so none may take its cores for itself, which is what vLLM would do."""
    threads = {"OMP_NUM_THREADS": str(cores), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {
        "accelerator_config": {"kind": "cpu"},
        "placement_group_config": {"bundle_per_worker": {"CPU": cores}},
        "runtime_env": {"env_vars": threads},
    }


def located(name: str) -> str:
    """A folder by its whole path: replicas need not run where this was called."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
