"""`logprob_token_ids` of tokens that a verification yields.

A request may ask for the logprobs of tokens that it names. vLLM's sampler gives them; its rejection sampler gives the
likeliest tokens' in their place, or none, and then the request ends in an error.
"""

from collections.abc import Callable
from typing import Any

from vllm_orthrus.patches.arguments import is_ours
from vllm_orthrus.patches.registry import Patch, takes


def _rejection_sampler(original: type[Any]) -> Callable[..., Any]:
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    class AskedTokens(original):  # type: ignore[misc]
        """The rejection sampler, with the tokens that requests ask about."""

        def __init__(self, sampler: Any, *arguments: Any, **named: Any) -> None:
            super().__init__(sampler, *arguments, **named)
            dims = sampler.get_logprobs_dims
            # Where ranks sample for each other, vLLM asks how much to gather, and leaves these out.
            sampler.get_logprobs_dims = lambda slots, include_token_ids=True: dims(slots)
            self.asked = 0  # the most tokens that a request of this batch names
            self.slots: Any = None  # [rows of logits that are still to come], of the requests they belong to

        def _verify_in_chunks(
            self, logits: Any, input_batch: Any, draft_logits: Any, draft_sampled: Any, pos: Any, limit: int, *rest: Any
        ) -> Any:
            wanted, *others = rest  # logprobs of the likeliest tokens
            self.asked = self.sampler.logprob_token_ids_state.max_num_token_ids(input_batch.idx_mapping_np)
            self.slots = input_batch.expanded_idx_mapping
            if self.asked:
                wanted = max(wanted, 0)
            return super()._verify_in_chunks(
                logits, input_batch, draft_logits, draft_sampled, pos, limit, wanted, *others
            )

        def _get_logprobs_tensors(
            self, sampled: Any, num_sampled: Any, logits: Any, starts: Any, starts_np: Any, wanted: int
        ) -> Any:
            found = super()._get_logprobs_tensors(sampled, num_sampled, logits, starts, starts_np, wanted)
            slots, self.slots = self.slots[: len(logits)], self.slots[len(logits) :]  # chunks come in order
            if not self.asked:
                return found
            return compute_topk_scores(
                logits,
                wanted,
                found.logprob_token_ids[:, 0].contiguous(),  # the sampled ones
                found.cu_num_generated_tokens or found.cu_num_generated_tokens_tensor,
                logprob_token_ids_state=self.sampler.logprob_token_ids_state,
                expanded_idx_mapping=slots,
                max_per_req_token_ids=self.asked,
                logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
            )

    def make(sampler: Any, spec_config: Any, *arguments: Any, **named: Any) -> Any:
        chosen = AskedTokens if is_ours(spec_config) else original
        return chosen(sampler, spec_config, *arguments, **named)

    return make


def _is_the_sampler(target: Any) -> str | None:
    methods = {
        "__init__": ("self", "sampler", "spec_config", "device", "watermark_key"),
        "_verify_in_chunks": (
            *("self", "logits", "input_batch", "draft_logits", "draft_sampled", "pos", "max_chunk_logits"),
            *("max_num_logprobs", "verify_draft_sampled"),
        ),
        "_get_logprobs_tensors": (
            *("self", "sampled", "num_sampled", "logits", "cu_num_logits", "cu_num_logits_np", "max_num_logprobs"),
        ),
    }
    problems = (takes(*parameters)(getattr(target, name)) for name, parameters in methods.items())
    return next(filter(None, problems), None)


# Only workers load the model runner, so this one is applied there, once a drafter is made.
WORKER_PATCHES = [
    Patch(
        target="vllm.v1.worker.gpu.model_runner:RejectionSampler",
        why="A request with `logprob_token_ids` ends in an error, or gets other tokens' logprobs, once its drafts are "
        "verified.",
        upstream="https://github.com/vllm-project/vllm/pull/44727",
        remove_when="vLLM's rejection sampler on Model Runner V2 hands `logprob_token_ids` to `compute_topk_scores`",
        check=_is_the_sampler,
        replace=_rejection_sampler,
    ),
]
