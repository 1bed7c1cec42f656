"""Heads in eight bits: what their numbers mean, how they are stored and converted, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.unit.conftest import SHAPES
from tests.unit.test_heads import saved
from vllm_orthrus.cli.main import main
from vllm_orthrus.heads import HeadError, dequantized, find_nonsense, open_head, quantized
from vllm_orthrus.heads.convert import extract_head, merge_head, quantize_head
from vllm_orthrus.heads.quantize import FP8, dequantize, quantize
from vllm_orthrus.training.reference import Reference

WEIGHT = "model.layers.1.self_attn.v_proj_diff.weight"
SCALE = WEIGHT + "_scale"


@given(st.integers(0, 2**31), st.integers(-30, 30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_row_keeps_four_bits(seed: int, magnitude: int, dtype: torch.dtype) -> None:
    """Whatever its size: to within half of the last of three bits, or of the smallest number there is."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-3, 3, 7)[:, None] * 2.0**magnitude
    weight = (torch.randn(7, 33, generator=generator) * rows).to(dtype)
    weight[3] = 0
    found = quantize(weight)
    assert (found.stored.dtype, found.scale.shape, found.scale.dtype) == (FP8, (7, 1), torch.float32)
    error = (dequantize(found) - weight.float()).abs()
    assert (error <= 1.0001 * (weight.float().abs() * 2**-4).maximum(found.scale * 2**-10)).all()
    assert (dequantize(found)[3] == 0).all()
    largest = weight.float().abs().amax(1)
    torch.testing.assert_close(dequantize(found).abs().amax(1), largest)


@given(st.permutations(range(4)))
def test_halves_come_in_any_order(order: list[int]) -> None:
    weight = torch.randn(4, 6)
    parts = [*quantized([(WEIGHT, weight)]), ("a.norm", torch.ones(2)), ("b.norm", torch.ones(2))]
    found = dict(dequantized(parts[index] for index in order))
    assert found.keys() == {WEIGHT, "a.norm", "b.norm"}
    assert torch.equal(found[WEIGHT], dequantize(quantize(weight)))


@pytest.mark.parametrize("shape", SHAPES)
def test_converted_and_back(shape: str, tmp_path: Path) -> None:
    """Alone and merged; what is in the files is what is made of the trained weights while they are loaded."""
    base, head = saved(tmp_path, shape)
    trained = open_head(head)
    expected = dict(quantized(trained.stored()))
    quantize_head(trained, tmp_path / "fp8", "fp8")
    merge_head(trained, base, tmp_path / "merged", "fp8")
    merge_head(open_head(tmp_path / "fp8"), base, tmp_path / "merged-later")
    for folder in ("fp8", "merged", "merged-later"):
        found = open_head(tmp_path / folder)
        found.check_complete()
        assert found.config.quantization == "fp8"
        assert found.config.check_fits(json.loads((base / "config.json").read_text()), "base") == []
        stored = dict(found.stored())
        assert stored.keys() == expected.keys()
        assert all(stored[name].dtype == one.dtype for name, one in expected.items())
        assert all(torch.equal(stored[name].float(), one.float()) for name, one in expected.items())
        values = dict(found.tensors())
        assert values.keys() == trained.files.keys()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    extract_head(open_head(tmp_path / "merged"), tmp_path / "kept", "test/base", None)
    assert open_head(tmp_path / "kept").config.quantization == "fp8"
    extract_head(open_head(tmp_path / "merged"), tmp_path / "wide", "test/base", None, torch.bfloat16)
    wide = open_head(tmp_path / "wide")
    wide.check_complete()
    assert wide.config.quantization is None
    assert all(torch.equal(one, values[name].bfloat16()) for name, one in wide.stored())


def test_half_the_bytes(tmp_path: Path) -> None:
    _, head = saved(tmp_path)
    extract_head(open_head(head), tmp_path / "bf16", None, None, torch.bfloat16)
    quantize_head(open_head(head), tmp_path / "fp8", "fp8")
    tensors = [dict(open_head(tmp_path / name).stored()) for name in ("bf16", "fp8")]
    before, after = (sum(one.nbytes for name, one in found.items() if "proj" in name) for found in tensors)
    scales = sum(one.nbytes for name, one in tensors[1].items() if name.endswith("scale"))
    assert after == before / 2 + scales


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, head = saved(tmp_path)
    assert main(["head", "convert", str(head), str(tmp_path / "x")]) == 2
    assert "nothing to convert to: give --base to merge with it, --quantize fp8, or both" in capsys.readouterr().err
    assert main(["head", "convert", str(head), str(tmp_path / "fp8"), "--quantize", "fp8"]) == 0
    assert main(["head", "convert", str(head), str(tmp_path / "fp8"), "--quantize", "fp8"]) == 2
    assert "is not empty" in capsys.readouterr().err
    merged = str(tmp_path / "merged")
    assert main(["head", "convert", str(head), merged, "--base", str(base), "--quantize", "fp8"]) == 0
    for quantized_head in (str(tmp_path / "fp8"), merged):
        assert main(["head", "inspect", quantized_head]) == 0
        assert "projections in fp8 (E4M3), a scale per output channel" in capsys.readouterr().out
        assert main(["head", "verify", quantized_head, "--base", str(base)]) == 0


def test_the_reference_takes_what_it_means(tmp_path: Path) -> None:
    base, head = saved(tmp_path)
    quantize_head(open_head(head), tmp_path / "fp8", "fp8")
    layers = Reference.from_pretrained(base, tmp_path / "fp8").head.layers
    trained = dict(open_head(head).tensors())[WEIGHT]
    found = layers[1].v_proj.weight  # type: ignore[union-attr]
    assert torch.equal(found, dequantize(quantize(trained)))  # type: ignore[arg-type]


# Refusals


def damaged(folder: Path, config: dict[str, object] | None = None, **tensors: torch.Tensor | None) -> None:
    found = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, folder / "model.safetensors")
    facts = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({key: fact for key, fact in facts.items() if fact is not None}))


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"head_quantization": "nvfp4"}, {}, r"head_quantization='nvfp4', and this version reads heads in fp8"),
        ({"head_quantization": ["fp8"]}, {}, r"head_quantization=\['fp8'\]"),
        ({"head_quantization": None}, {}, r"stored as F8_E4M3; where config.json has no head_quantization, it must be"),
        ({}, {SCALE: None}, r"v_proj_diff\.weight_scale is missing"),
        ({}, {SCALE: torch.ones(1, 48)}, r"v_proj_diff\.weight_scale is \(1, 48\), not \(48, 1\)"),
        ({}, {SCALE: torch.ones(48, 1).bfloat16()}, r"weight_scale is stored as BF16; .*it must be F32"),
        ({}, {WEIGHT: torch.ones(48, 48)}, r"stored as F32; where .* says head_quantization='fp8', it must be F8_E4M3"),
    ],
    ids=["newer", "no text", "not said", "no scales", "transposed", "other scales", "not in eight bits"],
)
def test_refused(config: dict[str, object], tensors: dict[str, torch.Tensor | None], said: str, tmp_path: Path) -> None:
    _, head = saved(tmp_path)
    quantize_head(open_head(head), tmp_path / "fp8", "fp8")
    damaged(tmp_path / "fp8", config, **tensors)
    with pytest.raises(HeadError, match=said):
        open_head(tmp_path / "fp8").check_complete()


@pytest.mark.parametrize(
    ("value", "said"), [(math.nan, "not finite in 1 of its 18 tensors"), (0.0, "nothing but zeros in 1 of its 18")]
)
def test_nonsense_in_scales(value: float, said: str, tmp_path: Path) -> None:
    """They are told as the weights that they spoil."""
    _, head = saved(tmp_path)
    quantize_head(open_head(head), tmp_path / "fp8", "fp8")
    damaged(tmp_path / "fp8", **{SCALE: torch.full((48, 1), value)})
    open_head(tmp_path / "fp8").check_complete()
    assert said in str(find_nonsense(open_head(tmp_path / "fp8").tensors()))


# What was measured


def test_the_page_says_what_was_measured() -> None:
    """By `python -m benchmarks.quantized_head`: every class within 3 %, and not the same."""
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "heads.md").read_text()
    found = json.loads((root / "benchmarks" / "evidence" / "quantized-head-tiny.json").read_text())
    for kind, rates in found["tokens_per_cycle"]["two"].items():
        before, *rounded = rates.values()
        changes = [rate / before - 1 for rate in rounded]
        assert 0 < max(map(abs, changes)) < 0.03
        cells = " | ".join(f"{rate:.3f} ({change:+.1%})" for rate, change in zip(rounded, changes, strict=True))
        assert f"| {kind} | {before:.3f} | {cells} |" in page
