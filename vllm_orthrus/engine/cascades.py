"""Verifying by a cascade: which requests have asked for one, and what their drafts are tested against.

vLLM's rejection sampler accepts a draft x ~ q with probability min(1, p(x) / q(x)), and otherwise draws from
norm(max(p - q, 0)). Given logits of pi in place of those of p it does just that for pi. So nothing else of it changes:

    sampling parameters, penalties, grammar    vLLM, on the AR view's logits
    pi of the rows that have a cascade         here
    accept, resample, bonus                    vLLM

Behind the last draft, where there is no q, the text follows p. So it does where a draft's row did not know what it
follows: its q is about another text. Everything stays on the device, in pieces, so that no batch needs much memory.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_orthrus.cascades.rules import RULES, Knobs
from vllm_orthrus.cascades.verify import targets
from vllm_orthrus.engine.drafting import Drafting, HostInts
from vllm_orthrus.engine.onepass.counters import LateCounts
from vllm_orthrus.engine.vllm import SamplingParams, async_tensor_h2d

NONE = -1
NAMES = list(RULES)
COUNTERS = [f"cascade_{what}_{rule}" for rule in RULES for what in ("taken", "departed")]
PIECE = 2**24  # logits that are worked on at once


class Chunk(NamedTuple):
    """Requests of a batch that vLLM verifies at once."""

    slots: HostInts  # [requests]
    starts: HostInts  # [requests + 1], of their rows
    row_slots: torch.Tensor  # [rows]
    places: torch.Tensor  # [rows], of a row within its request: which draft it judges
    drafts: torch.Tensor  # [rows], the token in each row; the next one is what a row judges, -1 if it is none


class _Rows(NamedTuple):
    """Rows that judge a draft by the same rule. On the host."""

    rule: int
    rows: HostInts  # [n]
    requests: HostInts  # [n], of the chunk
    slots: HostInts  # [n]


class _Judged(NamedTuple):
    rule: int
    requests: torch.Tensor  # [n]
    places: torch.Tensor  # [n]
    taken: torch.Tensor  # [n] bool
    departs: torch.Tensor  # [n] bool: and the AR view would rather have had another token


class Cascades:
    def __init__(self, config: Any, max_num_reqs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        # By slot, on the host.
        self.rule = np.full(max_num_reqs, NONE, dtype=np.int64)
        self.knobs = np.zeros((len(Knobs._fields), max_num_reqs), dtype=np.float32)
        self.temperature = np.ones(max_num_reqs, dtype=np.float32)  # 0: greedy
        self.judged: list[_Judged] = []
        self.counted: LateCounts | None = None  # until a request asks

    def add_request(self, slot: int, params: SamplingParams) -> None:
        asked = self.config.cascade_of(params.extra_args)
        if asked is None or asked.lossless(params.temperature == 0):
            self.rule[slot] = NONE
            return
        self.rule[slot] = NAMES.index(asked.rule)
        self.knobs[:, slot] = asked.alpha, asked.k, asked.ratio
        self.temperature[slot] = params.temperature
        if self.counted is None:
            self.counted = LateCounts(COUNTERS, torch.zeros(len(COUNTERS), dtype=torch.int64, device=self.device))

    def asked(self, slots: HostInts) -> bool:
        return bool((self.rule[slots] != NONE).any())

    def judge(self, logits: torch.Tensor, q_logits: torch.Tensor | None, chunk: Chunk, drafting: Drafting) -> None:
        """Replace the AR view's logits [rows, V] by those of pi, where they judge a draft that a cascade is asked for.

        q_logits [max_num_reqs, K, V], before temperature.
        """
        self.judged.clear()
        width = logits.shape[1] if q_logits is None else min(logits.shape[1], q_logits.shape[-1])
        for part in self._parts(chunk, max(1, PIECE // width)):
            rows, requests = async_tensor_h2d(np.stack((part.rows, part.requests)), self.device)  # [n]
            slots, places, drafts = chunk.row_slots[rows].long(), chunk.places[rows].long(), chunk.drafts[rows + 1]
            informed = drafting.informed(part.slots, slots, places)
            drafts = drafts if informed is None else drafts.where(informed, -1)
            temperature = self.temperature[part.slots]
            numbers = np.stack((*self.knobs[:, part.slots], np.where(temperature == 0, 1, temperature), temperature))
            *knobs, divisor, drawn = async_tensor_h2d(numbers, self.device)[..., None]  # [n, 1]
            p = logits[rows, :width]
            q = None if q_logits is None else q_logits[slots, places, :width].float() / divisor
            made = targets(NAMES[part.rule], Knobs(*knobs), p, q, drafts, drawn[:, 0] == 0)
            logits[rows, :width] = made.logits
            self.judged.append(_Judged(part.rule, requests, places, made.taken, made.taken & (p.argmax(-1) != drafts)))

    def _parts(self, chunk: Chunk, most: int) -> Iterator[_Rows]:
        rules = self.rule[chunk.slots]
        for rule in np.unique(rules[rules != NONE]).tolist():
            requests = np.flatnonzero(rules == rule)
            counts = chunk.starts[requests + 1] - chunk.starts[requests] - 1  # the last row judges nothing
            of = np.repeat(requests, counts)
            within = np.arange(len(of)) - np.repeat(counts.cumsum() - counts, counts)
            rows = chunk.starts[of] + within
            for first in range(0, len(of), most):
                at = slice(first, first + most)
                yield _Rows(rule, rows[at], of[at], chunk.slots[of[at]])

    def count(self, num_sampled: torch.Tensor) -> None:
        """num_sampled [requests of the chunk]: their accepted drafts, and one."""
        assert self.counted is not None
        for rule, requests, places, taken, departs in self.judged:
            accepted = places < num_sampled[requests] - 1
            for what, happened in enumerate((taken, departs)):
                self.counted.counters[2 * rule + what] += (happened & accepted).sum()
        self.judged.clear()

    def counts(self) -> dict[str, int]:
        return {} if self.counted is None else self.counted.read()
