"""The roofline, its devices, and the clock that corrects it."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_orthrus.errors import UserError
from vllm_orthrus.heads import widen
from vllm_orthrus.policy.clock import TIMED, Clock, Step
from vllm_orthrus.policy.cost import (
    Device,
    Forward,
    Mode,
    Model,
    forward_seconds,
    forwards,
    joins,
    knee,
    launches,
    pairs,
    parts,
    step_seconds,
)
from vllm_orthrus.policy.devices import CPU, DEVICES, find_device

H200, QWEN = DEVICES["H200"], Model()
PLAIN, TWO, ONE = Mode(0), Mode(15, 16), Mode(15, 16, 8)


def test_bytes_of_an_8b_model() -> None:
    """Weights alone: a draft pass streams the head in place of the base's attention; one pass streams both."""
    without_logits = QWEN._replace(vocab=0)
    rows = {"verify": Forward(1, 0, 16), "draft": Forward(1, 0, 0, 16), "one": Forward(1, 0, 16, 128)}
    read = {name: sum(part.read for part in parts(without_logits, forward)) for name, forward in rows.items()}
    assert read["verify"] == read["draft"] == pytest.approx(13.9e9, rel=0.01)
    assert read["one"] - read["verify"] == pytest.approx(3.0e9, rel=0.01), "the head"
    assert QWEN.bytes_per_position == 147456
    vocabulary = sum(part.read for part in parts(QWEN, Forward(1, 0, 1))) - read["verify"]
    assert vocabulary == pytest.approx(1.24e9, rel=0.01)


def test_plain_decoding_of_an_8b_model_on_an_h200() -> None:
    assert step_seconds(H200, QWEN, PLAIN, 1, 1024) == pytest.approx(4.4e-3, rel=0.05)
    assert 140 < knee(H200, QWEN) < 170


@pytest.mark.parametrize("way", [TWO, ONE])
def test_a_head_in_fp8_is_half_as_many_bytes(way: Mode) -> None:
    """And more launches; products of its rows are faster where the device multiplies fp8."""
    fp8 = QWEN._replace(head_weight_bytes=1)
    before, after = (
        sum(part.read for forward in forwards(way, 1, 0) for part in parts(model, forward)) for model in (QWEN, fp8)
    )
    assert before - after == pytest.approx(1.5e9, rel=0.01)
    assert QWEN.resident_bytes - fp8.resident_bytes == before - after
    more = launches(fp8, forwards(way, 1, 0)[-1]) - launches(QWEN, forwards(way, 1, 0)[-1])
    assert more == 36 * 2
    for name, saved in (("H200", 0.04), ("RTX 4090", 0.06)):
        times = [step_seconds(DEVICES[name], model, Mode(15, 16, 8), 1, 1024) for model in (QWEN, fp8)]
        assert 1 - times[1] / times[0] > saved
    widening = DEVICES["H200"]._replace(fp8=1.0)
    assert step_seconds(widening, fp8, ONE, 1, 1024) > step_seconds(DEVICES["H200"], fp8, ONE, 1, 1024)


def test_one_pass_pays_at_short_contexts_and_not_at_long_ones() -> None:
    """Rows of hypotheses cost arithmetic in attention, which grows with the context; a draft pass costs its weights."""
    ratio = {
        context: step_seconds(H200, QWEN, TWO, 1, context) / step_seconds(H200, QWEN, ONE, 1, context)
        for context in (1024, 4096, 16384, 65536)
    }
    assert ratio[1024] > 1.2
    assert ratio[65536] < 1 < ratio[16384] < 1.05
    assert list(ratio.values()) == sorted(ratio.values(), reverse=True)


@given(
    device=st.sampled_from([*DEVICES.values(), CPU]),
    requests=st.integers(1, 256),
    context=st.floats(1, 131072),
    verified=st.integers(1, 64),
    drafted=st.integers(0, 256),
)
def test_more_work_takes_longer(device: Device, requests: int, context: float, verified: int, drafted: int) -> None:
    forward = Forward(requests, context, verified, drafted, min(drafted, 16))
    seconds = forward_seconds(device, QWEN, forward)
    assert 0 < seconds < math.inf
    for more in (
        forward._replace(requests=requests + 1),
        forward._replace(context=2 * context),
        forward._replace(verified=verified + 1),
        forward._replace(drafted=drafted + 1),
    ):
        assert forward_seconds(device, QWEN, more) > seconds or more.drafted > drafted
    assert forward_seconds(device, QWEN.share(2), forward) < seconds


def most_rows(pays: Callable[[Device, Model, Forward], bool], device: Device) -> int:
    """That blocks may add to a verification for one product to pay."""
    paying = [rows for rows in range(16, 2048, 16) if pays(device, QWEN, Forward(1, 0, 16, rows, 16))]
    assert paying == [*range(16, 16 * (len(paying) + 1), 16)], "and then no more"
    return max(paying, default=0)


def test_the_vocabulary_is_read_once_up_to_the_knee() -> None:
    """Rows that the verification and its blocks add to a product cost nothing, until they cost what they save."""
    assert {name: most_rows(joins, device) for name, device in DEVICES.items()} == {
        "A100": 208, "H100": 400, "H200": 272, "B200": 384, "L40S": 576, "RTX 4090": 224, "RTX 5090": 144, "MI300X": 336
    }  # fmt: skip
    assert most_rows(joins, CPU) == 16, "one block, all of which drafts: as many rows as in two products"
    two, one = (sum(part.read for part in parts(QWEN, Forward(1, 0, 16, 64, 16), way)) for way in (False, True))
    assert two - one == pytest.approx(1.2e9, rel=0.05)


def test_one_product_serves_both_views_up_to_the_knee() -> None:
    """Rows of the other view cost nothing, until they cost more than two launches of a layer."""
    assert {name: most_rows(pairs, device) for name, device in DEVICES.items()} == {
        "A100": 64, "H100": 160, "H200": 128, "B200": 208, "L40S": 160, "RTX 4090": 64, "RTX 5090": 48, "MI300X": 160
    }  # fmt: skip
    assert most_rows(pairs, CPU) == 16, "as many rows as the verification has: nothing is filled up"
    one = Forward(1, 0, 16, 64, 16)
    assert not pairs(H200, QWEN._replace(head_weight_bytes=1), one), "weights of two kinds"
    assert not pairs(H200, QWEN._replace(weight_bytes=1, head_weight_bytes=1), one), "no plain products"
    assert launches(QWEN, one) - launches(QWEN, one, paired=True) == 36 * 2
    two, both = (sum(part.read for part in parts(QWEN, one, paired=way)) for way in (False, True))
    assert two == both, "every weight once, either way"


def test_a_selector_walks_from_draft_to_draft() -> None:
    """By latency: as long for one request as for many, and next to nothing beside a forward."""
    selecting = QWEN._replace(selector=True)
    more = [
        step_seconds(H200, selecting, mode, requests, 1024) - step_seconds(H200, QWEN, mode, requests, 1024)
        for mode in (TWO, ONE)
        for requests in (1, 4)
    ]
    assert more == pytest.approx([32 * H200.launch] * 2 + [34 * H200.launch] * 2, rel=0.1)
    assert step_seconds(H200, selecting, PLAIN, 1, 1024) == step_seconds(H200, QWEN, PLAIN, 1, 1024)


def test_forwards_of_a_step() -> None:
    assert forwards(PLAIN, 3, 100) == [Forward(3, 100, 1)]
    assert forwards(TWO, 3, 100) == [Forward(3, 100, 16), Forward(3, 100, 0, 16, 15)]
    assert forwards(ONE, 3, 100) == [Forward(3, 100, 16, 128, 16)]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx5090", "RTX 5090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("cpu", "CPU"),
    ],
)
def test_devices_by_name(said: str, meant: str) -> None:
    assert find_device(said).name == meant


def test_unknown_device_names_those_that_are_known() -> None:
    with pytest.raises(UserError, match=r"'TPU v7'.*A100.*RTX 4090.*CPU"):
        find_device("TPU v7")


# The clock


def observed(clock: Clock, costs: object, cells: list[tuple[int, int]], noise: float = 0.0) -> None:
    draw = random.Random(0)
    for drafts, requests in cells:
        for _ in range(2 * TIMED):
            seconds = costs(drafts, requests, 500.0) * (1 + noise * draw.random())  # type: ignore[operator]
            clock.observe(Step(requests, 500, drafts, drafts, seconds))


def roofline(device: Device, model: Model = QWEN) -> object:
    return lambda drafts, requests, context: step_seconds(device, model, Mode(drafts, 16), requests, context)


@pytest.mark.parametrize("wrong", [{"memory": 2.0}, {"products": 0.4}, {"launch": 3.0}, {"memory": 0.5, "step": 5.0}])
def test_a_few_steps_put_a_wrong_idea_right(wrong: dict[str, float]) -> None:
    """Timed: three modes of one request, and of sixteen. Foretold: others, and other sizes."""
    true = H200._replace(**{name: getattr(H200, name) * factor for name, factor in wrong.items()})
    clock = Clock(roofline(H200))  # type: ignore[arg-type]
    observed(clock, roofline(true), [(drafts, n) for n in (1, 16) for drafts in (0, 3, 15)], noise=0.02)
    errors = [
        abs(clock.seconds(n, 500, [drafts])[drafts] / roofline(true)(drafts, n, 500.0) - 1)  # type: ignore[operator]
        for n in (1, 2, 4, 8, 16, 32)
        for drafts in (0, 3, 7, 15)
    ]
    assert sorted(errors)[len(errors) // 2] < 0.1
    assert max(errors) < 0.35


def test_errors_are_those_of_what_was_left_out() -> None:
    clock = Clock(roofline(H200))  # type: ignore[arg-type]
    cells = [(drafts, n) for n in (1, 4) for drafts in (0, 3, 7, 15)]
    observed(clock, roofline(H200._replace(memory=1e12)), cells)
    assert len(clock.errors()) == len(cells)
    assert max(clock.errors()) < 0.1
    odd = Clock(roofline(H200))  # type: ignore[arg-type]
    observed(odd, lambda drafts, requests, context: 1.0 if (drafts, requests) == (7, 1) else 0.1, cells)
    assert max(odd.errors()) > 0.5, "one that fits no other"


def test_a_pause_of_the_machine_is_hardly_believed() -> None:
    clock = Clock(lambda drafts, requests, context: 1.0)
    observed(clock, lambda drafts, requests, context: 1.0, [(0, 1)])
    clock.observe(Step(1, 500, 0, 0, 100.0))
    assert clock.seconds(1, 500, [0])[0] < 1.05


def test_the_default_model_is_the_one_it_says() -> None:
    shape = widen.shape_like("Qwen3-8B", {})
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert QWEN[:7] == (*(shape[name] for name in names), shape["head_dim"], shape["vocab_size"])


def test_what_a_pause_takes_from_the_next_step_is_not_believed() -> None:
    """With asynchronous scheduling a step that is looked at late makes the next seem short."""
    clock = Clock(lambda drafts, requests, context: 1.0)
    steps = [Step(1, 100, 3, 3, seconds) for seconds in [1.0] * 10 + [1.9, 0.1] + [1.0] * 2]
    for step in steps:
        clock.observe(step)
    assert clock.seconds(1, 100, [3])[3] == pytest.approx(1, rel=0.05)
    for _ in range(3):  # and what is short again and again is
        clock.observe(Step(1, 100, 3, 3, 0.5))
    assert clock.seconds(1, 100, [3])[3] == pytest.approx(0.5, rel=0.1)
