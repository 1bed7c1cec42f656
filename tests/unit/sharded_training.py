"""Run by test_sharding.py in two processes: a sharded training step must be the unsharded one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.unit.conftest import make_base, make_reference
from tests.unit.test_dual_view import MASK, WIDTH, packed_rows
from vllm_orthrus.heads import BaseShape, expected_tensors
from vllm_orthrus.training.blocks import anchor_places, draw_anchors, make_blocks
from vllm_orthrus.training.dual_view import DualViewModel
from vllm_orthrus.training.views import published_name


def main() -> None:
    dist.init_process_group("gloo")
    reference = make_reference(make_base(), WIDTH)
    rows = packed_rows()
    anchors, real = draw_anchors(anchor_places(rows, WIDTH), 5, torch.Generator().manual_seed(1))
    blocks = make_blocks(rows, anchors, real, WIDTH, MASK)
    model = DualViewModel(reference.base, reference.head, "dense")

    whole = model(rows, blocks).student
    whole.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = model(rows, blocks).student
    torch.testing.assert_close(sharded, whole)
    sharded.square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad.full_tensor(), expected[name], atol=1e-4, rtol=1e-4)

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)  # complete on the first process, empty elsewhere
    names = {published_name(name) for name in state}
    complete = set(expected_tensors(BaseShape.from_config(reference.base.config)))
    assert names == (complete if dist.get_rank() == 0 else set()), names ^ complete
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Threads of Gloo's can outlive their group, and then abort a process that ends like any other.
    os._exit(0)
