"""Where greedy texts part, and how nearly tied the two tokens were there: plain decoding from itself, drafting from it.

One request at a time is plain decoding's reference. In batches of another size the same products add in another order,
so that plain decoding parts from itself as well: that is the floor, and what drafting is to be judged by.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from vllm_orthrus.bench import plots
from vllm_orthrus.bench.asked import classes_of, environment_of, prepare, settings_for, title_of
from vllm_orthrus.bench.files import write_csv, write_json
from vllm_orthrus.bench.near_ties import BOUNDS, Close, deficits, parting, ties
from vllm_orthrus.bench.offline import starting
from vllm_orthrus.bench.prompts import Prompt
from vllm_orthrus.bench.settings import Settings
from vllm_orthrus.bench.texts import Texts
from vllm_orthrus.bench.ways import PLAIN
from vllm_orthrus.errors import UserError

Likeliest = Sequence[Sequence[Sequence[Any]]]  # by answer and place: token and logit, the best first

RUNNERS_UP = 4
INVARIANT = "VLLM_BATCH_INVARIANT"
COLUMNS = ("way", "at_once", "answer", "place", "best", "best_logit", "second", "second_logit", "said", "gap", "within")


class Reference(NamedTuple):
    """Plain decoding, one request at a time."""

    said: Texts
    likeliest: Likeliest

    def close(self, answer: int) -> Close:
        return dict(enumerate(deficits((token, logit) for token, logit in place) for place in self.likeliest[answer]))


def run_lossless(asked: argparse.Namespace) -> int:
    if asked.invariant and not torch.cuda.is_available():
        raise UserError(
            f"--invariant: needs a GPU. {INVARIANT}=1 has vLLM compute with Triton kernels, so on a CPU stock vLLM "
            "ends with a TypeError in its first forward. Leave it away here."
        )
    out = prepare(asked, ("at_once", "per_class") if asked.per_class is not None else ("at_once",))
    settings = settings_for(asked)
    classes = {kind: prompts[: asked.per_class] for kind, prompts in classes_of(asked).items()}
    facts = environment_of(asked, settings, 1, "vLLM's engine")
    print(f"logs in {settings.logs}", flush=True)
    prompts = [prompt for some in classes.values() for prompt in some]
    reference, said = ask(settings, prompts, sorted(set(asked.at_once)), asked.invariant)
    bound = BOUNDS[asked.dtype]
    found = judge(reference, said, bound, asked.invariant)
    near = [ties(reference.close(answer), bound) for answer in range(len(prompts))]
    tied = {"places": sum(map(len, reference.said)), "with_a_second_token_within_the_bound": sum(near)}
    content = {"environment": facts, "bound": bound, "invariant": asked.invariant, "tied": tied, "comparisons": found}
    write_json(out, content)
    partings = [{"way": one["way"], "at_once": one["at_once"], **parted} for one in found for parted in one["partings"]]
    write_csv(out.with_suffix(".csv"), COLUMNS, partings)
    plots.draw_lossless(found, bound, title_of(asked, facts), out.with_suffix(".png"))
    print(table(found, bound))
    print(f"plain text: at {sum(near)} of {tied['places']} places a second token is within {bound} of the best logit")
    print(f"\n{out}, {out.with_suffix('.csv').name}, {out.with_suffix('.png').name}")
    return 0 if all(one["as_it_must_be"] for one in found) else 1


def ask(
    settings: Settings, prompts: Sequence[Prompt], sizes: Sequence[int], invariant: bool
) -> tuple[Reference, dict[tuple[str, int], Texts]]:
    """What each way says with so many requests at once. Ways are up one after the other."""
    sampling = {"temperature": 0, "max_tokens": settings.tokens}
    said: dict[tuple[str, int], Texts] = {}
    reference = Reference([], [])
    with tqdm(total=len(settings.ways) * len(sizes) + (1 not in sizes), desc="comparisons") as progress:
        for way in settings.ways:
            mine = replace(settings, further={INVARIANT: "1"} if invariant else {})
            if way.name == PLAIN:
                mine = replace(mine, options=["--logprobs-mode", "raw_logits", *mine.options])
            with starting(mine, [way]) as engines:
                engine = engines[way.name]
                if way.name == PLAIN:
                    found = engine.ask(prompts, 1, **sampling, logprobs=RUNNERS_UP)
                    reference = Reference(found["said"], found["likeliest"])
                    progress.update()
                for size in sizes:
                    if (way.name, size) != (PLAIN, 1):
                        said[way.name, size] = engine.ask(prompts, size, **sampling)["said"]
                        progress.update()
    return reference, said


def judge(
    reference: Reference, said: Mapping[tuple[str, int], Texts], bound: float, invariant: bool
) -> list[dict[str, Any]]:
    """Of each way and size, where it parts from the reference; and whether it may."""
    found = []
    for (way, at_once), texts in said.items():
        partings = [
            parted | {"within": parted["gap"] is not None and parted["gap"] < bound}
            for answer in range(len(texts))
            if (parted := _parting(reference, answer, texts[answer]))
        ]
        compared = sum(len(text) for text in texts) - sum(
            len(texts[parted["answer"]]) - parted["place"] - 1 for parted in partings
        )
        gaps = [parted["gap"] for parted in partings if parted["gap"] is not None]
        within = all(parted["within"] for parted in partings)
        found.append(
            {
                "way": way,
                "at_once": at_once,
                "answers": len(texts),
                "equal": len(texts) - len(partings),
                "tokens": compared,  # up to where texts part: what follows answers different questions
                "per_1000_tokens": 1e3 * len(partings) / max(1, compared),
                "largest_gap": max(gaps, default=0.0),
                "within": within,
                "as_it_must_be": not partings if invariant else within,
                "partings": partings,
            }
        )
    return found


def _parting(reference: Reference, answer: int, text: Sequence[int]) -> dict[str, Any] | None:
    found = parting(reference.said[answer], reference.close(answer), text)
    if found is None:
        return None
    tokens = reference.likeliest[answer]
    (best, best_logit), (second, second_logit) = tokens[min(found.place, len(tokens) - 1)][:2]
    return {
        "answer": answer,
        "place": found.place,
        "best": best,
        "best_logit": best_logit,
        "second": second,
        "second_logit": second_logit,
        "said": text[found.place] if found.place < len(text) else None,
        "gap": found.deficit,  # none: more than is looked for, or one text just ends
    }


def table(found: Sequence[Mapping[str, Any]], bound: float) -> str:
    lines = [f"{'way':<8}{'at once':>8}{'equal':>12}{'tokens':>9}{'partings/1000':>15}{'largest gap':>13}   verdict"]
    floor = max((one["largest_gap"] for one in found if one["way"] == PLAIN), default=0.0)
    for one in found:
        verdict = "identical" if not one["partings"] else f"within {bound}" if one["within"] else f"NOT within {bound}"
        if one["way"] != PLAIN and one["partings"]:
            verdict += f", {'within' if one['largest_gap'] <= floor else 'beyond'} plain's own {floor:.2g}"
        if not one["as_it_must_be"] and one["within"]:
            verdict += f": but {INVARIANT} should make it identical"
        unseen = any(parted["gap"] is None for parted in one["partings"])
        gap = "> 1" if unseen else f"{one['largest_gap']:.2g}"
        equal = f"{one['equal']} of {one['answers']}"
        lines.append(
            f"{one['way']:<8}{one['at_once']:>8}{equal:>12}{one['tokens']:>9}"
            f"{one['per_1000_tokens']:>15.2f}{gap:>13}   {verdict}"
        )
    return "\n".join(lines)
