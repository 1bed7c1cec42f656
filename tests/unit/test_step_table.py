"""The steps that docs/one-pass.md tells of are those of the cost model, whose launches are the counted ones."""

import re
from pathlib import Path

from benchmarks.step_table import MODEL, of_products, of_views, quantized, table
from vllm_orthrus.policy import cost
from vllm_orthrus.policy.cost import Mode, step_seconds
from vllm_orthrus.policy.devices import DEVICES

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "one-pass.md").read_text()


def counted(what: str, column: int) -> int:
    (row,) = re.findall(rf"^\| {what} \| (.+) \|$", PAGE, re.MULTILINE)
    return int(row.split(" | ")[column])


def test_the_page_has_the_table() -> None:
    for one in (table(), of_products(), of_views()):
        assert "\n".join(one) in PAGE, "python -m benchmarks.step_table"
    assert "\n".join(quantized()) in (DOCS / "heads.md").read_text()


def test_launches_of_the_model_are_those_that_were_counted() -> None:
    assert counted("a layer of a verification with hypotheses", 0) == cost.ONE_PASS_LAYER - cost.PAIRED
    assert counted("a layer of a draft pass", 2) == cost.DRAFT_LAYER
    behind = ("behind a verification: taking up its outcome", "behind a verification, besides that")
    assert sum(counted(what, 0) for what in behind) == cost.OUTCOME
    assert counted("beside the product of a verification's logits", 0) == cost.JOINED
    assert counted("around a draft pass", 2) == cost.AROUND_DRAFTS


def test_one_pass_of_the_default_size_costs_little_more_than_plain_decoding() -> None:
    plain, one = (step_seconds(DEVICES["H200"], MODEL, mode, 1, 1024) for mode in (Mode(0), Mode(15, 16, 4)))
    assert one < 1.25 * plain
