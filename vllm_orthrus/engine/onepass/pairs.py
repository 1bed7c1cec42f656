"""Both views' projections of one kind as one product, where their weights lie side by side.

    window[0] = x[:m]     window[1] = x[-m:]      [2, m, in], of the verification's rows and the hypotheses' behind them
    out       = window @ weights.T                weights [2, out, in], the target's and the diffusion view's

m is the larger of both numbers of rows, so the windows of the smaller view reach into the other's rows, and what comes
of these is nobody's. Either matrix is read once, as in two products, and one launch is saved. `policy/cost.py` says
for how many rows that is quicker.
"""

from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from vllm_orthrus.engine.costs import device_of, model_of
from vllm_orthrus.engine.settings import DraftShape
from vllm_orthrus.engine.view import DiffusionView
from vllm_orthrus.engine.vllm import VllmConfig
from vllm_orthrus.policy.cost import pairs

PROJECTIONS = ("qkv_proj", "o_proj")


def requests_paired(shape: DraftShape, vllm_config: VllmConfig) -> frozenset[int]:
    """The numbers of requests whose verification shares its projections' products with its blocks."""
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        return frozenset()  # the target's weights are where vLLM wants them, and not beside others
    device, model = device_of(), model_of(vllm_config)
    return frozenset(count for count in range(1, shape.most_carried + 1) if pairs(device, model, shape.carrying(count)))


def is_a_product(linear: Any) -> bool:
    """Of a matrix that lies as it was loaded, by whichever kernel is fastest."""
    return (
        isinstance(linear.quant_method, UnquantizedLinearMethod)
        and linear.weight.dim() == 2
        and linear.weight.numel() > 0  # on CPUs vLLM may keep it in another form
        and not current_platform.is_rocm()  # which has products of its own for few rows
        and not envs.VLLM_BATCH_INVARIANT
    )


def lay_side_by_side(view: DiffusionView) -> None:
    """Move the target's weights and the head's to where one product finds both. They take as much memory as before."""
    for layer, diffusion in zip(view.target.model.layers, view.layers, strict=True):
        for name in PROJECTIONS:
            first, second = getattr(layer.self_attn, name), getattr(diffusion, name)
            if all(is_a_product(one) and one.bias is None for one in (first, second)) and _alike(first, second):
                both = torch.stack([first.weight.data, second.weight.data])
                first.weight.data, second.weight.data = both.unbind()


def _alike(first: Any, second: Any) -> bool:
    one, other = first.weight, second.weight
    return bool(one.shape == other.shape and one.dtype == other.dtype and one.device == other.device)


def side_by_side(first: Any, second: Any) -> torch.Tensor | None:
    """[2, out, in], the weights of two linear layers, if the second's begin where the first's end."""
    one, other = first.weight, second.weight
    if (
        one.numel() == 0
        or one.untyped_storage()._cdata != other.untyped_storage()._cdata
        or other.storage_offset() != one.storage_offset() + one.numel()
        or not _alike(first, second)
    ):
        return None
    both: torch.Tensor = one.as_strided((2, *one.shape), (one.numel(), *one.stride()))
    return both


def project(x: torch.Tensor, first: int, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows of both, in], the first of them the target's. Returns both views' results, each [its rows, out]."""
    most, width = max(first, len(x) - first), x.shape[1]
    windows = x.as_strided((2, most, width), ((len(x) - most) * width, width, 1))
    out = torch.bmm(windows, weights.transpose(1, 2))
    return out[0, :first], out[1, first + most - len(x) :]


class Room:
    """Where both views put what they have attended to, so that one product makes one tensor of their results.

    The windows may not overlap here, as their results would: the smaller view's is filled up with whatever lies in the
    memory. It lies on the far side, so that those of both views' rows are neighbours.
    """

    def __init__(self, like: torch.Tensor, verified: int, drafted: int) -> None:
        most = max(verified, drafted)
        self.rows = slice(most - verified, most + drafted)
        self.both = like.new_empty(2 * most, like.shape[1])
        self.verified, self.drafted = self.both[self.rows].split([verified, drafted])

    def results(self, weights: torch.Tensor) -> torch.Tensor:
        """[rows of both, out]"""
        windows = self.both.view(2, -1, self.both.shape[1])
        return torch.bmm(windows, weights.transpose(1, 2)).flatten(0, 1)[self.rows]
