"""vLLM's Ray executor on a machine without accelerators, which vLLM itself refuses: Ray would have nothing to place.

A custom resource stands for the accelerators. Everything else is vLLM's own: real Ray actors, real message queues.
"""

from typing import Any

import ray
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

RESOURCE = "rank"


class CpuWorker(RayWorkerProc):  # type: ignore[misc]
    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), []

    def initialize_worker(self, *arguments: Any, **options: Any) -> None:
        options["assigned_physical_gpu_ids"] = None
        super().initialize_worker(*arguments, **options)


class RayOnCpu(RayExecutorV2):  # type: ignore[misc]
    def _init_executor(self) -> None:
        CpuPlatform.ray_device_key = RESOURCE
        ray_executor_v2.RayWorkerProc = CpuWorker
        ray.init(num_cpus=2, resources={RESOURCE: 2}, include_dashboard=False, ignore_reinit_error=True)
        super()._init_executor()
