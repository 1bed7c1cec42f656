"""``speculative_config`` for ``method: orthrus``: what may be set, what is filled in, what is refused."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pydantic import Field
from vllm import envs
from vllm.config.speculative import SpeculativeConfig, SpeculativeMethod
from vllm.config.utils import config
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_orthrus.cascades.choice import NAME, REFUSE, Cascade, obstacle, read_request, read_server
from vllm_orthrus.engine.quantization import why_not_here
from vllm_orthrus.engine.skew import versions_here
from vllm_orthrus.errors import UserError
from vllm_orthrus.heads import HeadConfig, is_folder, open_head, open_selector, read_head_config, resolve_head
from vllm_orthrus.kernels.forms import runs_triton, wanted_form

OrthrusMethod = Literal[(*get_args(SpeculativeMethod), "orthrus")]  # type: ignore[valid-type]

# Sixteen verified rows per request: predictable text accepts most of them, and vLLM's largest
# verification graph (512 rows) still holds 32 requests.
DEFAULT_DRAFTS = 15

# What vLLM's own fields mean here. All others of them are refused where they say anything but their default.
_VLLMS = (
    "method",
    "model",
    "revision",
    "num_speculative_tokens",
    "draft_tensor_parallel_size",
    "draft_load_config",
    "draft_sample_method",
    "rejection_sample_method",
    "synthetic_acceptance_rates",
    "synthetic_acceptance_length",
    "use_local_argmax_reduction",
    "num_speculative_tokens_per_batch_size",
    "enable_adaptive_verification",
)
_GIVEN_BY_VLLM = ("target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config")
_NOT_OURS: dict[str, str] = {
    "parallel_drafting": "an Orthrus block is always drafted in parallel; leave it out",
    "use_heterogeneous_vocab": "the model drafts for itself, so there is one vocabulary; leave it out",
    "quantization": "it would be a draft model's; set orthrus_head_quantization for the head",
    "kv_cache_dtype": "the head reads the target's cache; set --kv-cache-dtype for both",
    "attention_backend": "the head reads the target's cache; set --attention-backend for the target",
    "max_model_len": "the head drafts up to the target's limit; set --max-model-len",
    "enforce_eager": "drafts have graphs where the target has; set --enforce-eager for both",
    "tensor_parallel_size": "the head is split as the target is; leave it out",
    "code_revision": "no code of a checkpoint is ever run; leave it out",
    **dict.fromkeys(
        ("fly_window_size", "fly_entropy_threshold", "fly_entropy_top_k"),
        "it belongs to rejection_sample_method 'fly'; leave it out",
    ),
    "disable_padded_drafter_batch": "every Orthrus request drafts the same number of rows; leave it out",
}


@config(repr=False)
class OrthrusSpeculativeConfig(SpeculativeConfig):  # type: ignore[misc]
    """A subclass rather than a patched class: it travels to workers by its name, which imports this package there.

    vLLM sees a method that none of its branches knows, which leaves every one of them at its neutral default.
    """

    if TYPE_CHECKING:  # vLLM's own fields that are filled in here
        model: str | None
        revision: str | None
        num_speculative_tokens: int | None
        draft_load_config: Any

    method: OrthrusMethod | None = None  # type: ignore[valid-type]

    orthrus_block_size: int | None = Field(default=None, ge=1)
    """Rows of a draft block, the anchor included. Unset, as many as were trained, but no more than 16, or one more than
    the drafts; narrower blocks cost less and draft a little worse."""

    orthrus_attention: Literal["auto", "kernel", "gather", "write_through"] = "auto"
    """How a block reads the target's cache. "kernel" is our own, in place: the fastest, where it knows the cache's
    format. "write_through" runs the target's own attention layers over slots reserved for the block; it works
    everywhere, and is what "auto" falls back to. "gather" copies the prefix into a dense PyTorch attention; it suits
    CPUs."""

    orthrus_passes: Literal["auto", "one", "two"] = "auto"
    """"two": draft in a pass of its own after each verification. "one": draft inside the verification, for the outcomes
    it is likely to have. "auto" chooses one pass on GPUs, if the cache can be read for it, and two on CPUs, where rows
    are dear."""

    orthrus_modes: list[int] | None = None
    """Numbers of drafts to choose from in each step, by what a step takes and by how many drafts are kept; 0 is plain
    decoding. In one pass the most of them, `num_speculative_tokens`, means one pass, and every other two. Unset, and
    with `orthrus_passes` at "auto": as many as there are, half, a quarter and none, and in one pass one fewer than
    there are; else always `num_speculative_tokens`. An empty list: always that."""

    orthrus_time_modes: bool = True
    """Time each mode before serving, where there is a choice: at most some 3 seconds on a GPU and 10 on a CPU, and only
    once, as vLLM's cache folder keeps what was found. If not, a roofline stands in until steps have been timed."""

    orthrus_hypotheses: int = Field(default=4, ge=1, le=64)
    """Blocks per request that ride along with a verification, if `orthrus_rows` allows. More foresee more, and by the
    roofline cost more than they bring on most GPUs."""

    orthrus_rows: int = Field(default=192, ge=1)
    """Rows that a forward may hold before it takes noticeably longer than one with few: with more requests there are
    fewer hypotheses each, and beyond that two passes."""

    orthrus_verification: Literal["backend", "fused"] = "backend"
    """Who attends for the verification rows of one pass. "backend": vLLM's own attention, before ours takes the
    hypotheses, so each prefix is read twice. "fused": our kernel takes both in one launch and reads it once; needs
    "kernel" attention over full, causal layers. Verified logits then round as our kernel does."""

    orthrus_head_quantization: Literal["fp8"] | None = None
    """"fp8": the head's projections in eight bits, with a scale for each output channel, so that a forward streams half
    as many bytes of them. They are quantized while loading, unless the head's checkpoint is; unset, they stay as that
    is. GPUs that multiply fp8 (compute capability 8.9) round activations as well, row by row, as vLLM does elsewhere;
    older ones widen the weights in the product. On CPUs weights are rounded all the same, but no byte is saved."""

    orthrus_vocabulary: Literal["auto", "once", "twice"] = "auto"
    """How often a step in one pass reads the vocabulary's projection. "twice": for the verification, and for the drafts
    once its outcome is known. "once": in one product for all rows that may come to draft, whose logits then take
    memory. "auto": once for as many requests as that is quicker for, by this device's roofline; on CPUs hardly ever."""

    orthrus_selector: str = "auto"
    """What reads the draft before when the next is chosen. "auto": the head's own, if it has one. "off": each row
    speaks for itself. Else the folder or repository of one that was trained for this head."""

    orthrus_cascade: dict[str, Any] | str | None = None
    """LOSSY. The rule by which requests that say nothing leave tokens to the draft, as {"rule": "token_v3", "alpha":
    0.2}. Unset, there is none, and only requests that ask for one have it; "refuse" refuses those. The page on cascades
    says what rules there are."""

    orthrus_check_attention: bool = False
    """For debugging: run every draft through "write_through" as well, and log how far the two are apart."""

    orthrus_mask_token_id: int | None = field(default=None, init=False)
    """Filled in from the head: the token that stands for "not known yet" in a block."""

    orthrus_drafting_rows: int | None = field(default=None, init=False)
    """Filled in from the head: how many rows of a block were taught to predict."""

    orthrus_selector_revision: str | None = field(default=None, init=False)
    """Filled in: the commit of a selector's own repository, which every worker opens."""

    orthrus_versions: dict[str, str] = field(default_factory=versions_here, init=False)
    """Filled in: what is installed where the engine is configured. Workers compare it with what they find."""

    def __post_init__(self) -> None:
        # vLLM's own __post_init__ resolves a draft model by a closed list of methods. Orthrus has none to resolve.
        self._refuse_foreign_settings()
        self._refuse_parallelism()
        self._check_load_format()
        head = self._find_head()
        self._fit_block(head)
        self._choose_quantization(head)
        self._check_table()
        wanted_form()  # refuses what it does not know before any worker asks
        self._choose_passes()
        self._refuse_to_fuse()
        self._refuse_to_read_once()
        self.cascade_of(None)
        # vLLM wants a draft model's config in several places. The draft's shape is the target's; it must not be the
        # same object, because vLLM takes identity to mean "this is the draft model being loaded".
        self.draft_model_config = copy.copy(self.target_model_config)
        self.draft_parallel_config = self.target_parallel_config
        self.draft_tensor_parallel_size = self.target_parallel_config.tensor_parallel_size

    def _refuse_foreign_settings(self) -> None:
        for one in fields(SpeculativeConfig):
            name, value = one.name, getattr(self, one.name)
            if name in (*_VLLMS, *_GIVEN_BY_VLLM) or value == _default_of(one):
                continue
            if name.startswith("fly_") and self.rejection_sample_method == "fly":
                continue
            advice = _NOT_OURS.get(name, "it belongs to another method; leave it out")
            raise ValueError(f"{name}={value!r} does not apply to method 'orthrus': {advice}.")
        if self.use_local_argmax_reduction and self.draft_sample_method == "probabilistic":
            raise ValueError(
                "use_local_argmax_reduction=True does not go with draft_sample_method='probabilistic', which needs "
                "whole distributions. Leave one of them out."
            )
        for name in ("model", "revision"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='' names nothing. Leave it out, or name a head.")
        if envs.VLLM_USE_V2_MODEL_RUNNER is False:
            raise ValueError(
                "VLLM_USE_V2_MODEL_RUNNER=0 forces Model Runner V1, and method 'orthrus' runs on Model Runner V2 only. "
                "Unset the variable."
            )

    def _refuse_parallelism(self) -> None:
        parallel = self.target_parallel_config
        for name, reason in (
            ("pipeline_parallel_size", "a draft needs every layer's cache on one rank"),
            ("decode_context_parallel_size", "a draft needs the whole prefix on one rank"),
            ("prefill_context_parallel_size", "a draft needs the whole prefix on one rank"),
        ):
            value = getattr(parallel, name, 1)
            if value > 1:
                raise ValueError(
                    f"{name}={value} is not supported with method 'orthrus' ({reason}); it must be 1. "
                    "Use tensor parallelism instead."
                )
        target = parallel.tensor_parallel_size
        if self.draft_tensor_parallel_size not in (None, target):
            raise ValueError(
                f"draft_tensor_parallel_size={self.draft_tensor_parallel_size} differs from the target's {target}. "
                "The head shares the target's layers and is split as they are; leave it out."
            )

    def _find_head(self) -> HeadConfig:
        target = self.target_model_config
        base_config = target.hf_text_config
        if target.runner_type != "generate":
            raise ValueError(
                f"runner={target.runner_type!r} does not go with method 'orthrus', which drafts what is generated, and "
                "here nothing is. Serve this model without speculation, or with --runner generate."
            )
        if target.use_mla:
            raise ValueError(
                f"{target.model} uses multi-head latent attention, which has no keys and values for an Orthrus head to "
                "read. Use a Qwen3-class model."
            )
        source: str | None = self.model or resolve_head(target.model)
        if source is None:
            raise ValueError(
                f"no Orthrus head is known for {target.model}. Name one with speculative_config['model'] (a folder or "
                "a repository), add it to the head map, or train one with `vllm-orthrus train`."
            )
        if source == target.model and self.revision is None and not is_folder(source):
            self.revision = target.revision
        self.model = source
        if self.made_up:
            head, self.revision = read_head_config(source, self.revision, self.head_cache)
            self._choose_selector(head.selector is not None)
            return head
        # Workers open the head by this revision, which is a commit now.
        checkpoint = open_head(source, self.revision, self.head_cache)
        self.revision = checkpoint.revision
        for warning in checkpoint.config.check_fits(base_config, target.model):
            _logger().warning("%s", warning)
        checkpoint.check_complete()
        self._choose_selector(checkpoint.selector is not None)
        if self.orthrus_selector not in ("auto", "off"):  # the head's own has been checked with it
            selector = open_selector(self.orthrus_selector, None, self.head_cache)
            for warning in selector.check_fits(base_config, base_config.hidden_size, target.model):
                _logger().warning("%s", warning)
            self.orthrus_selector_revision = selector.revision
        return checkpoint.config

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a new process vLLM loads plugins when its engine is half made, which is too late for what they patch."""
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        self.__dict__.update(state)

    @property
    def has_selector(self) -> bool:
        return self.orthrus_selector != "off"

    def _choose_selector(self, of_head: bool) -> None:
        """of_head: there is one beside the head."""
        asked = self.orthrus_selector
        if asked == "":
            raise ValueError("orthrus_selector='' names nothing. Leave it out, or give 'auto', 'off' or a folder.")
        if asked == "off":
            return
        if self.made_up and asked != "auto":
            raise ValueError(
                f"orthrus_selector={asked!r} does not go with draft_load_config.load_format='dummy', which makes up "
                "what a head has. Leave one of them out."
            )
        obstacles = [
            f"{name}=True {reason}"
            for name, reason in (
                ("use_local_argmax_reduction", "hides the drafts' probabilities"),
                ("enable_adaptive_verification", "reads each row by itself"),
            )
            if getattr(self, name)
        ]
        if asked == "auto":
            self.orthrus_selector = "auto" if of_head and not obstacles else "off"
        elif obstacles:
            raise ValueError(
                f"orthrus_selector={asked!r} does not go with {obstacles[0]}. Leave that out, or set orthrus_selector "
                "to 'off'."
            )

    def _choose_quantization(self, head: HeadConfig) -> None:
        asked = self.orthrus_head_quantization
        self.orthrus_head_quantization = chosen = asked or head.quantization
        reason = why_not_here(chosen, self.target_model_config.dtype) if chosen else None
        if reason is None:
            return
        otherwise = "leave it out"
        if head.quantization is not None:
            otherwise = f"give the head unquantized, as `vllm-orthrus head extract {self.model} ... --dtype` writes it"
        raise ValueError(
            f"orthrus_head_quantization={chosen!r} cannot be had here: {reason}. Change that, or {otherwise}."
        )

    @property
    def made_up(self) -> bool:
        """Random weights: of the head only its facts are needed."""
        return self.draft_load_config is not None and self.draft_load_config.load_format == "dummy"

    def _check_load_format(self) -> None:
        allowed = ("auto", "safetensors", "dummy")
        if self.draft_load_config is not None and self.draft_load_config.load_format not in allowed:
            raise ValueError(
                f"draft_load_config.load_format={self.draft_load_config.load_format!r} is no way to load an Orthrus "
                f"head, which is safetensors files: it may be one of {', '.join(allowed)}. Leave it out."
            )

    def _check_table(self) -> None:
        """vLLM asks only in the scheduler, and takes fewer drafts where the table wants more than there are."""
        table, most = self.num_speculative_tokens_per_batch_size, self.num_speculative_tokens or 0
        if table is None:
            return
        wanted = max(drafts for _, _, drafts in validate_and_normalize_dynamic_sd_schedule(table))
        if wanted > most:
            raise ValueError(
                f"num_speculative_tokens_per_batch_size={table} wants {wanted} drafts, and there are no more than "
                f"num_speculative_tokens={most}. Give at most that many, or raise num_speculative_tokens."
            )

    def _choose_passes(self) -> None:
        obstacles = [
            f"{name}={value!r} {reason}"
            for name, value, reason in (
                ("orthrus_attention", self.orthrus_attention, "has room for one block per request"),
                ("use_local_argmax_reduction", self.use_local_argmax_reduction, "hides the drafts' probabilities"),
                ("orthrus_check_attention", self.orthrus_check_attention, "compares draft passes"),
                ("enable_adaptive_verification", self.enable_adaptive_verification, "trims verifications"),
            )
            if value in ("write_through", True)
        ]
        if self.orthrus_rows < (needed := self._rows_of_one_pass()):
            obstacles.append(f"orthrus_rows={self.orthrus_rows}, as one request alone needs {needed}")
        for name, value, otherwise in (
            ("orthrus_passes", self.orthrus_passes, "leave orthrus_passes at 'auto'"),
            ("orthrus_verification", self.orthrus_verification, "set orthrus_verification to 'backend'"),
            ("orthrus_vocabulary", self.orthrus_vocabulary, "leave orthrus_vocabulary at 'auto'"),
        ):
            if obstacles and value in ("one", "fused", "once"):
                raise ValueError(f"{name}={value!r} does not go with {obstacles[0]}. Change that, or {otherwise}.")
        if self.orthrus_passes == "auto":
            # Rows are dear where there is no GPU: hypotheses cost more than they save.
            asked = self.orthrus_verification == "fused" or self.orthrus_vocabulary == "once"
            dear = not _compiles_kernels() and not asked
            self.orthrus_passes = "two" if obstacles or dear else "one"
            if self.orthrus_modes is None and self._may_change_modes():
                self.orthrus_modes = self._default_modes()
        if self.orthrus_modes:
            self._check_modes(self.orthrus_modes)

    def _rows_of_one_pass(self) -> int:
        """The fewest rows of a forward that carries hypotheses: those of one request."""
        assert self.num_speculative_tokens is not None and self.orthrus_block_size is not None
        return 1 + self.num_speculative_tokens + min(2, self.orthrus_hypotheses) * self.orthrus_block_size

    def _default_modes(self) -> list[int]:
        return default_modes(self.num_speculative_tokens or 0, self.orthrus_passes == "one")

    def _may_change_modes(self) -> bool:
        """Nobody else decides the number of drafts, and all ranks of an engine draft as many.

        Data-parallel ranks of the models that have heads are engines of their own.
        """
        parallel = self.target_parallel_config
        # There each rank has a scheduler of its own, which would decide by its own clock.
        by_themselves = parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1
        return (
            self.num_speculative_tokens_per_batch_size is None
            and not self.enable_adaptive_verification
            and not self.orthrus_check_attention  # which is there to see many drafts
            and not by_themselves
        )

    def _check_modes(self, modes: list[int]) -> None:
        most = self.num_speculative_tokens
        if sorted(set(modes)) != sorted(modes) or 0 not in modes or most not in modes or max(modes) > (most or 0):
            raise ValueError(
                f"orthrus_modes={modes} must name different numbers of drafts, among them 0 and "
                f"num_speculative_tokens={most}, which is the most. Leave it out, or give for example "
                f"{self._default_modes()}."
            )
        if not self._may_change_modes():
            raise ValueError(
                f"orthrus_modes={modes} needs one scheduler for all ranks, which external_launcher has not, no "
                "orthrus_check_attention, and neither num_speculative_tokens_per_batch_size nor "
                "enable_adaptive_verification, which decide the same. Leave one of them out."
            )

    def _refuse_to_fuse(self) -> None:
        if self.orthrus_verification == "backend":
            return
        if self.orthrus_passes == "two":
            raise ValueError(
                "orthrus_verification='fused' does not go with orthrus_passes='two', where a verification carries no "
                "hypotheses to share a launch with. Set orthrus_passes to 'one', or orthrus_verification to 'backend'."
            )
        if self.orthrus_attention == "gather" or (self.orthrus_attention == "auto" and not _compiles_kernels()):
            raise ValueError(
                "orthrus_verification='fused' does not go with orthrus_attention='gather' (on CPUs 'auto' means that): "
                "only the kernel takes both kinds of rows. Set orthrus_attention to 'kernel', or orthrus_verification "
                "to 'backend'."
            )

    def _refuse_to_read_once(self) -> None:
        if self.orthrus_vocabulary != "once":
            return
        sharded = self.target_parallel_config.enable_batch_sharded_sampling
        for name, value, reason, applies in (
            ("orthrus_passes", "two", "drafts there have a forward of their own", self.orthrus_passes == "two"),
            ("enable_batch_sharded_sampling", True, "each rank computes the logits of some requests alone", sharded),
        ):
            if applies:
                raise ValueError(
                    f"orthrus_vocabulary='once' does not go with {name}={value!r}: {reason}. Change that, or leave "
                    "orthrus_vocabulary at 'auto'."
                )

    def cascade_of(self, extra_args: Mapping[str, Any] | None) -> Cascade | None:
        """What a request with these extra arguments is decoded by; none of them, as the server's setting says."""
        asked = read_request(extra_args, read_server(self.orthrus_cascade))
        if asked is None:
            return None
        if self.orthrus_cascade == REFUSE:
            raise UserError(f"{NAME} is refused by this server, whose text is the model's own. Leave it out.")
        methods = self.draft_sample_method, self.rejection_sample_method
        sharded = self.target_parallel_config.enable_batch_sharded_sampling
        problem = obstacle(asked, *methods, self.enable_adaptive_verification, sharded)
        if problem is not None:
            raise UserError(problem)
        return asked

    @property
    def slots_written_ahead(self) -> int:
        """Cache slots behind each request that a draft may write to."""
        if self.orthrus_check_attention or self.orthrus_attention in ("auto", "write_through"):
            assert self.orthrus_block_size is not None
            return self.orthrus_block_size
        return 0

    @property
    def head_cache(self) -> str | None:
        """Where downloaded heads go: vLLM's `--download-dir`."""
        return self.draft_load_config.download_dir if self.draft_load_config is not None else None

    def _fit_block(self, head: HeadConfig) -> None:
        trained = head.block_size
        # Rows behind the last draft serve tails only, and cost as much as others in each hypothesis.
        enough = max(DEFAULT_DRAFTS, self.num_speculative_tokens or 0) + 1
        block = self.orthrus_block_size or min(trained, enough)
        if block > trained:
            raise ValueError(
                f"orthrus_block_size={block} is wider than the head's block of {trained} rows. Give at most {trained}."
            )
        # Only the last row of a block of the trained width was never taught to predict.
        most = head.num_drafts if block == trained else block
        drafts: int = self.num_speculative_tokens or min(DEFAULT_DRAFTS, most)
        if drafts > most:
            raise ValueError(
                f"num_speculative_tokens={drafts} is more than the {most} drafts that a block of "
                f"orthrus_block_size={block} rows gives with {self.model}. Give at most {most}."
            )
        self.num_speculative_tokens = drafts
        self.orthrus_block_size = block
        self.orthrus_drafting_rows = most
        self.orthrus_mask_token_id = head.mask_token_id


def default_modes(most: int, one_pass: bool = False) -> list[int]:
    """None, a quarter, half and all, as far as they differ.

    In one pass all of them mean just that. One fewer is then the way to draft as far in two, where blocks in the
    verification cost more than they bring.
    """
    fewer = {drafts for drafts in (most // 2, most // 4) if drafts > 1}
    return sorted({0, most} | fewer | ({most - 1} if one_pass else set()))


def known_settings() -> list[str]:
    """The names that `speculative_config` may hold, ours last."""
    ours = [one.name for one in fields(OrthrusSpeculativeConfig) if one.name.startswith("orthrus_") and one.init]
    theirs = {one.name for one in fields(SpeculativeConfig)}
    return [*(name for name in _VLLMS if name in theirs), *ours]


def unknown_settings(names: Iterable[str]) -> list[str]:
    """Those that neither Orthrus nor another method has."""
    known = {one.name for one in fields(SpeculativeConfig)}.union(known_settings()) - {*_GIVEN_BY_VLLM}
    return sorted(set(names) - known)


def _default_of(one: dataclasses.Field[Any]) -> Any:
    """pydantic keeps its defaults in an object of its own."""
    return getattr(one.default, "default", one.default)


def _compiles_kernels() -> bool:
    from vllm.platforms import current_platform

    return runs_triton(torch.device(current_platform.device_type))


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.orthrus")
