"""Speculative cascades: a request's choice is checked in the front end and reaches the verification in the worker.

    front end    refuses what the server cannot follow, before a request is queued
    worker       notes each request's choice by its slot, and puts a cascade's distribution in place of the AR view's
                 between vLLM's sampling parameters and its rejection sampling

Steps in which nobody asks for a cascade pass through untouched.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_orthrus.cascades.choice import NAME
from vllm_orthrus.errors import UserError
from vllm_orthrus.patches.arguments import is_ours
from vllm_orthrus.patches.registry import Patch, takes

_UPSTREAM = "vLLM's pull requests for relaxed acceptance were closed for lack of users: #43184"


def _validate_spec_decode(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def validate(self: Any, speculative_config: Any) -> None:
        original(self, speculative_config)
        if not is_ours(speculative_config):
            return
        try:
            speculative_config.cascade_of(self.extra_args)
        except UserError as error:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(str(error), parameter=NAME) from error

    return validate


def _load_model(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def load_model(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if is_ours(self.speculative_config) and self.rejection_sampler is not None:
            judge_by_cascades(self.sampler, self.rejection_sampler, self.speculator)

    return load_model


def judge_by_cascades(sampler: Any, rejection: Any, speculator: Any) -> None:
    """Of one engine: its samplers tell, and ask, the speculator's cascades."""
    import torch
    from vllm.config.model import PROCESSED_LOGPROBS_MODES

    from vllm_orthrus.engine.cascades import Chunk

    cascades = speculator.cascades
    add_request, apply, verify = sampler.add_request, sampler.apply_sampling_params, rejection._verify
    in_chunks = rejection._verify_in_chunks
    starts: list[Any] = []  # of the requests' rows, of all chunks that are still to come

    def note_request(slot: int, params: Any) -> None:
        add_request(slot, params)
        cascades.add_request(slot, params)

    def verify_in_chunks(logits: Any, batch: Any, *rest: Any) -> Any:
        starts[:] = [batch.cu_num_logits_np]
        return in_chunks(logits, batch, *rest)

    def verify_by_cascade(logits: Any, q_logits: Any, *of_chunk: Any) -> Any:
        _, _, _, _, slots, row_slots, places, _, drafts = of_chunk
        ahead = starts[0]
        starts[0] = ahead[len(slots) :]
        if not cascades.asked(slots):
            return verify(logits, q_logits, *of_chunk)
        processed: list[Any] = []

        def apply_and_judge(given: Any, *rest: Any) -> Any:
            own = apply(given, *rest)
            processed.append(own)
            read_again = sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES or sampler.return_sampling_mask
            tested = own.to(torch.float32, copy=True) if read_again or own is given else own
            chunk = Chunk(slots, ahead[: len(slots) + 1] - ahead[0], row_slots, places, drafts)
            cascades.judge(tested, q_logits, chunk, speculator.drafting)
            return tested

        sampler.apply_sampling_params = apply_and_judge
        try:
            _, sampled, num_sampled = verify(logits, q_logits, *of_chunk)
        finally:
            del sampler.apply_sampling_params
        cascades.count(num_sampled)
        return processed[0], sampled, num_sampled  # logprobs are the AR view's

    sampler.add_request = note_request
    rejection._verify_in_chunks = verify_in_chunks
    rejection._verify = verify_by_cascade


def _is_the_runner(target: Any) -> str | None:
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    of_chunk = (
        *("draft_sampled", "pos", "cu_num_logits", "idx_mapping", "idx_mapping_np", "expanded_idx_mapping"),
        *("expanded_local_pos", "seq_lens_upper_bound_np", "verify_draft_sampled"),
    )
    problems = (
        takes("self", "load_dummy_weights", "args", "model", "kwargs")(target),
        takes("self", "req_idx", "sampling_params")(Sampler.add_request),
        takes("self", "logits", "draft_logits", *of_chunk)(RejectionSampler._verify),
    )
    return next(filter(None, problems), None)


PATCHES = [
    Patch(
        target="vllm.sampling_params:SamplingParams._validate_spec_decode",
        why="A request that asks for a cascade that there is not, or that this server cannot follow, is refused where "
        "vLLM refuses sampling parameters: in the front end, as a mistake of the client.",
        upstream=_UPSTREAM,
        remove_when="a plugin can check a request's extra arguments",
        check=takes("self", "speculative_config"),
        replace=_validate_spec_decode,
    ),
]

# Only workers load the model runner, so this one is applied there, once a drafter is made.
WORKER_PATCHES = [
    Patch(
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model",
        why="Here samplers are made. Requests that ask for a cascade are tested against its distribution; should this "
        "not be recognised, against the model's own, as all others.",
        upstream=_UPSTREAM,
        remove_when="vLLM's rejection sampler lets a plugin say what drafts are tested against",
        check=_is_the_runner,
        replace=_load_model,
    ),
]
