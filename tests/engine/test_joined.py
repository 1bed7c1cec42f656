"""The projections of both views: a product for each or one for both, and results in one tensor, whatever they are."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_orthrus.engine.onepass import joined, pairs
from vllm_orthrus.engine.rotation import rotates_plainly
from vllm_orthrus.kernels.forms import SETTING

HIDDEN, WIDTH = 12, 8


class Quantized:
    """A projection that is no product of `weight`."""

    @staticmethod
    def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, layer.weight, bias)


def attention(method: Any, bias: bool, rank: int, ranks: int) -> Any:
    weight, offset = torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN) if bias else None
    o_proj = SimpleNamespace(
        weight=weight,
        bias=offset,
        quant_method=method,
        cpu_linear=linear,
        tp_rank=rank,
        tp_size=ranks,
        output_size=HIDDEN,
    )
    return SimpleNamespace(o_proj=o_proj)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_each_view_s_own_product_and_one_sum(
    quantized: bool, bias: bool, rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first rank adds the bias, and what ranks have is summed once for both views."""
    method = Quantized() if quantized else UnquantizedLinearMethod()
    target, diffusion = (attention(one, bias, rank, ranks) for one in (method, UnquantizedLinearMethod()))
    sums: list[torch.Tensor] = []

    def all_reduce(out: torch.Tensor) -> torch.Tensor:
        sums.append(out)
        return 2 * out

    monkeypatch.setattr(joined, "tensor_model_parallel_all_reduce", all_reduce)
    rows = torch.randn(3, WIDTH), torch.randn(5, WIDTH)
    added = [one.o_proj.bias if rank == 0 else None for one in (target, diffusion)]
    weights = (target.o_proj.weight, diffusion.o_proj.weight)
    expected = torch.cat([linear(*one) for one in zip(rows, weights, added, strict=True)])
    found = joined.results(target, diffusion, *rows)
    torch.testing.assert_close(found, ranks * expected)
    assert len(sums) == ranks - 1


@pytest.mark.parametrize(
    ("plain", "wanted"),
    [
        ({}, True),
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, True),
        ({"partial_rotary_factor": 0.5}, False),
        ({"mrope_section": [4, 6, 6]}, False),
    ],
)
def test_which_rotations_are_plain(plain: dict[str, Any], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"rope_theta": 10000.0, "rope_type": "default", "original_max_position_embeddings": 64} | plain
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(32, 64, rope_parameters=parameters, dtype=torch.float32)
    monkeypatch.setenv(SETTING, "triton")
    assert rotates_plainly(rotary, 32, torch.device("cpu")) == wanted
    monkeypatch.setenv(SETTING, "torch")
    assert not rotates_plainly(rotary, 32, torch.device("cpu")), "twins are vLLM's own modules"


def linears(bias: bool = False, method: Any = None) -> tuple[Any, Any]:
    """A projection of the target, and the diffusion view's."""

    def linear() -> Any:
        offset = torch.randn(HIDDEN) if bias else None
        weight = torch.nn.Parameter(torch.randn(HIDDEN, WIDTH), requires_grad=False)
        return SimpleNamespace(weight=weight, bias=offset, quant_method=method or UnquantizedLinearMethod())

    return linear(), linear()


def lay(first: Any, second: Any) -> None:
    target, diffusion = (SimpleNamespace(qkv_proj=one, o_proj=one) for one in (first, second))
    layers = [SimpleNamespace(self_attn=target)]
    view: Any = SimpleNamespace(target=SimpleNamespace(model=SimpleNamespace(layers=layers)), layers=[diffusion])
    pairs.lay_side_by_side(view)


@pytest.mark.parametrize(("verified", "drafted"), [(3, 5), (5, 3), (4, 4), (1, 9)])
def test_one_product_for_both_views(verified: int, drafted: int) -> None:
    first, second = linears()
    expected = first.weight.clone(), second.weight.clone()
    parameters = first.weight, second.weight
    lay(first, second)
    assert (first.weight, second.weight) == parameters, "the same objects, which vLLM and loaders of weights know"
    torch.testing.assert_close((first.weight.data, second.weight.data), expected, rtol=0, atol=0)
    weights = pairs.side_by_side(first, second)
    assert weights is not None
    rows = torch.randn(verified, WIDTH), torch.randn(drafted, WIDTH)
    wanted = [linear(*one) for one in zip(rows, expected, strict=True)]
    torch.testing.assert_close(list(pairs.project(torch.cat(rows), verified, weights)), wanted)

    # What lies in the memory that fills up the smaller view's rows must not matter.
    room = pairs.Room(rows[0], verified, drafted)
    room.both.fill_(torch.nan)
    for part, given in zip((room.verified, room.drafted), rows, strict=True):
        part.copy_(given)
    found = room.results(weights)
    torch.testing.assert_close(found, torch.cat(wanted))
    assert found.is_contiguous()


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_attended_rows_give_their_results(pair: bool, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they were put is where they are read; what ranks have is summed once, whichever products there are."""
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(joined, "tensor_model_parallel_all_reduce", lambda out: sums.append(out) or 2 * out)
    target, diffusion = (attention(UnquantizedLinearMethod(), False, 0, ranks) for _ in range(2))
    for one in (target, diffusion):
        one.o_proj.weight = torch.nn.Parameter(one.o_proj.weight, requires_grad=False)
    lay(target.o_proj, diffusion.o_proj)
    rows, fresh = torch.randn(3, WIDTH), torch.randn(5, WIDTH)
    attended = joined.Attended(target, diffusion, (rows, rows, rows), (fresh, fresh, fresh), pair)
    assert (attended.weights is not None) == pair
    attended.verified.copy_(rows)
    attended.drafted.copy_(fresh)
    expected = torch.cat([linear(rows, target.o_proj.weight), linear(fresh, diffusion.o_proj.weight)])
    torch.testing.assert_close(attended.results(), ranks * expected)
    assert len(sums) == ranks - 1


@pytest.mark.parametrize("kind", ["with a bias", "quantized", "kept in another form", "of another dtype"])
def test_what_cannot_share_a_product_stays_apart(kind: str) -> None:
    first, second = linears(kind == "with a bias", Quantized() if kind == "quantized" else None)
    if kind == "kept in another form":
        for one in (first, second):
            one.weight.data = torch.empty(0)
    if kind == "of another dtype":
        second.weight.data = second.weight.data.bfloat16()
    lay(first, second)
    assert pairs.side_by_side(first, second) is None


def test_weights_that_were_moved_are_found_apart() -> None:
    """Then each view has its own product again, of whatever weights there are."""
    first, second = linears()
    lay(first, second)
    assert pairs.side_by_side(second, first) is None
    first.weight.data = first.weight.data.clone()
    assert pairs.side_by_side(first, second) is None
