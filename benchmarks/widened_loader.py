"""vLLM's `load_format: widened`: weights of a larger shape, made on the device from a small trained model's.

    load_format="widened", model_loader_extra_config={"trained": "examples/tiny-orthrus/base"}

The model's folder holds a config.json from `widen.widen_facts` and nothing else. Writing sixteen gigabytes of zeros and
reading them once per engine would take longer than what is to be measured.
"""

from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_orthrus.heads import WEIGHTS
from vllm_orthrus.heads.widen import Widening, read_config, read_tensors


@register_model_loader("widened")
class WidenedLoader(BaseModelLoader):  # type: ignore[misc]
    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        target: Any = model
        trained = Path(self.load_config.model_loader_extra_config["trained"])
        device = str(next(target.parameters()).device)
        widening = Widening(read_config(trained), read_config(Path(model_config.model)), model_config.dtype, device)
        parts = widening.base(read_tensors(trained / WEIGHTS))
        target.load_weights(chain.from_iterable(part.items() for part in parts))
