"""What a verification tests drafts against, so that its text follows a cascade's pi: logits, a row for each draft."""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_orthrus.cascades.rules import Judged, Knobs, greedy_choice, judge, target


class Verified(NamedTuple):
    logits: Tensor  # [n, V]
    taken: Tensor  # [n] bool: the rule leaves this draft's token to the draft, so that it is accepted for certain


def targets(
    rule: str,
    knobs: Knobs,
    logits: Tensor,  # [n, V] of the AR view, all that is to be applied to them applied; [n, 1] each knob
    q_logits: Tensor | None,  # [n, V] of the draft rows, after temperature; None: the draft is all that is known of q
    drafts: Tensor,  # [n] tokens; -1: none, and the AR view decides
    greedy: Tensor,  # [n] bool
) -> Verified:
    """Logits whose softmax is pi for drawn tokens, and whose greatest is pi's token for greedy ones.

    Of a token that is taken, pi(x) >= q(x): it is given all of pi, so that rounding cannot reject it. Its like is never
    resampled, so nothing else is read of pi then. Rows that the rule leaves to the AR view altogether stay as they are.
    """
    is_draft = torch.arange(logits.shape[-1], device=logits.device) == drafts[:, None]  # [n, V]
    p = logits.softmax(-1, dtype=torch.float32)
    q = is_draft.float() if q_logits is None else q_logits.softmax(-1, dtype=torch.float32)
    judged = judge(rule, p, q, knobs)
    judged = Judged(judged.q, judged.kept & (drafts >= 0)[:, None])
    choice, chosen = greedy_choice(judged)
    taken = (judged.kept & is_draft).any(-1)
    sole = torch.where(greedy[:, None], torch.zeros_like(is_draft).scatter_(1, choice[:, None], True), is_draft)
    alone = torch.where(greedy, chosen, taken)[:, None]
    mixed = judged.kept.any(-1, keepdim=True) & ~greedy[:, None]
    logits = torch.where(mixed, target(p, judged).log(), logits.float())
    return Verified(torch.where(alone, torch.where(sole, 0.0, -torch.inf), logits), taken)
