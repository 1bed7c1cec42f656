"""What one-pass drafting remembers of each request from one step to the next, by slot.

The last place is nobody's: slot -1 stands for rows of a graph that no request fills, and of it nothing is remembered.
"""

from typing import NamedTuple

from torch import Tensor

from vllm_orthrus.kernels.chances import Calibration, Drafts, History
from vllm_orthrus.kernels.packed import require_contiguous


class Remembered(NamedTuple):
    """The hypotheses that were chosen when the drafts were made."""

    anchor_position: Tensor  # [slots] int64, where the verification must start for the rest to apply
    accepted: Tensor  # [slots, H] int64
    token: Tensor  # [slots, H] int64


class Slots(NamedTuple):
    offset: Tensor  # [slots] int64, the row of the block at hand that predicts what follows the anchor
    sampled: Tensor  # [slots] bool: temperature above 0
    hypotheses: Remembered
    drafts: Drafts  # first axis: slots
    history: History
    calibration: Calibration  # of all requests


def require_contiguous_slots(slots: Slots) -> None:
    require_contiguous(offset=slots.offset, sampled=slots.sampled)
    for part in (slots.hypotheses, slots.drafts, slots.history, slots.calibration):  # some share names
        require_contiguous(**part._asdict())
