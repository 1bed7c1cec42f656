"""Consensus: how many drafts the AR view accepts, and which token follows them.

Greedy: accept while draft == argmax p. Sampling: accept x with probability min(1, p(x) / q(x)); at the first rejection
draw from norm(max(p - q, 0)), which leaves the output distributed exactly as p (speculative rejection sampling).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    accepted: Tensor  # [B] how many drafts were kept
    bonus: Tensor  # [B] the AR view's own token after them


def verify_greedy(drafts: Tensor, logits: Tensor) -> Verdict:
    """drafts [B, K], AR logits [B, K+1, V]."""
    choice = logits.argmax(-1)  # [B, K+1]
    accepted = _leading(drafts == choice[:, :-1])
    return Verdict(accepted, choice.gather(1, accepted[:, None]).squeeze(1))


def verify_sampling(drafts: Tensor, q: Tensor, p: Tensor, generator: torch.Generator | None = None) -> Verdict:
    """drafts [B, K] drawn from q [B, K, V]; p [B, K+1, V] is the AR view's distribution at the same places."""
    chance = p[:, :-1].gather(2, drafts[..., None]).squeeze(2) / q.gather(2, drafts[..., None]).squeeze(2)
    u = torch.rand(drafts.shape, generator=generator, device=drafts.device, dtype=p.dtype)
    accepted = _leading(u < chance)
    # Past the last draft there is nothing to subtract, so a zero row makes the residual p itself.
    q = torch.cat((q, torch.zeros_like(q[:, :1])), dim=1)
    rows = torch.arange(len(drafts), device=drafts.device)
    p, q = p[rows, accepted], q[rows, accepted]  # [B, V]
    residual = (p - q).clamp(min=0)
    # p == q up to rounding: a rejection is then itself a rounding error, and p the right distribution to draw from.
    residual = torch.where(residual.sum(1, keepdim=True) > 0, residual, p)
    return Verdict(accepted, torch.multinomial(residual, 1, generator=generator).squeeze(1))


def _leading(agreed: Tensor) -> Tensor:
    """How many leading columns of [B, K] are true."""
    return agreed.long().cumprod(1).sum(1)
