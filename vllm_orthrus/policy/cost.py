"""What forwards and steps cost: a roofline over the parts that a forward is made of.

    part    = (memory^s + arithmetic^s)^(1/s)      memory = bytes / rate, arithmetic = operations / rate
    forward = sum of its parts + launches * launch
    step    = its forwards + what the engine does beside them
    logits  = a product for the verification's and one for the drafts', or one for all rows that may come to draft
    views   = products of each with weights of its own, or one of both, in which each weight meets as many rows

s says how well a device reads and computes at a time: 1 is one after the other, as a CPU does; large s is whichever
takes longer. A matrix is read once per forward however many rows meet it, so rows are free until arithmetic takes as
long as reading: the knee. Attention over a long context is arithmetic, too, and grows with every row.
"""

from __future__ import annotations

from typing import NamedTuple

# Launches that one after the other cost time inside a graph; docs/one-pass.md has the counted ones.
PLAIN_LAYER, ONE_PASS_LAYER, DRAFT_LAYER = 11, 13, 10
FP8 = 2  # more in a layer, where the head is in fp8: two inputs are rounded
OUTCOME, AROUND_DRAFTS = 19, 6
JOINED = 2  # more, where one product gives all logits
SELECTED = 2  # more, where a selector chooses drafts: their gates, and the walk from one to the next
WALKED = 2  # launches' worth of time that such a walk waits at each draft: it reads what depends on the draft before
PAIRED = 2  # fewer in a layer, where one product serves both views: of queries, keys and values, and of results
LOGIT_BYTES = 12  # written in 2, made 4, and read by the sampler
CARRIED_BYTES, TAKEN_BYTES = 6, 8  # of such a product: moved to where they stay, and those that draft taken from there


class Model(NamedTuple):
    """Qwen3-8B in bf16 with a head in bf16, unless told. A head in fp8 has 1 byte per weight."""

    layers: int = 36
    hidden: int = 4096
    intermediate: int = 12288
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151936
    weight_bytes: float = 2
    head_weight_bytes: float = 2
    cache_bytes: float = 2
    selector: bool = False

    def share(self, ranks: int) -> Model:
        """What one of so many tensor-parallel ranks computes. Their talk is left out."""
        return self._replace(
            intermediate=self.intermediate // ranks,
            heads=self.heads // ranks,
            kv_heads=max(1, self.kv_heads // ranks),
            vocab=self.vocab // ranks,
        )

    @property
    def mlp(self) -> float:
        """Weights that both views pass through."""
        return self.layers * 3.0 * self.hidden * self.intermediate

    @property
    def attention(self) -> float:
        """Weights that each view has of its own."""
        return self.layers * 2.0 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def bytes_per_position(self) -> float:
        """Of the cache."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * self.cache_bytes

    @property
    def resident_bytes(self) -> float:
        """Base and head. Embeddings count once: many models tie them, and others look few of them up."""
        base = self.mlp + self.attention + float(self.hidden) * self.vocab
        return base * self.weight_bytes + self.attention * self.head_weight_bytes


class Device(NamedTuple):
    """What it attains, not what it is sold with."""

    name: str
    memory: float  # bytes per second
    products: float  # operations per second, of a matrix product
    attention: float  # the same, of attention
    launch: float  # seconds
    step: float  # seconds beside the forwards of a step
    sharpness: float  # s
    capacity: float = 0.0  # bytes
    fp8: float = 1.0  # products of fp8, as a multiple of others


class Forward(NamedTuple):
    requests: int
    context: float  # positions of a request that are cached, on average
    verified: int = 0  # rows of each request in the autoregressive view
    drafted: int = 0  # rows of each request in the diffusion view
    predicting: int = 0  # rows of the latter whose logits are wanted


class Mode(NamedTuple):
    """How a step drafts. No drafts: plain. No hypotheses: two passes."""

    drafts: int
    block: int = 0
    hypotheses: int = 0


def blocks_beside(requests: int, rows: int, verified: int, block: int, most: int) -> int:
    """Hypotheses of each request that a forward of so many rows has room for, beside its verification.

    One alone foresees hardly any outcome, and is not worth a ride unless no more are wanted.
    """
    room = (rows // requests - verified) // block
    return min(room, most) if room >= min(2, most) else 0


class Part(NamedTuple):
    read: float  # bytes
    products: float  # operations
    attention: float  # operations
    fp8: float = 0.0  # operations, of products of fp8


def parts(model: Model, forward: Forward, joined: bool = False, paired: bool = False) -> list[Part]:
    """The two views' attention reads the cache apart.

    joined: the vocabulary is not read twice; paired: both views' projections are one product.
    """
    rows = forward.requests * (forward.verified + forward.drafted)
    found = [Part(model.mlp * model.weight_bytes, 2 * model.mlp * rows, 0.0)]
    for rows in (forward.requests * each for each in (forward.verified, forward.drafted) if each):
        cached = model.bytes_per_position * forward.context * forward.requests
        scores = 4.0 * model.layers * model.heads * model.head_dim * forward.context * rows
        found.append(Part(cached, 0.0, scores))
    return found + projections(model, forward, paired) + vocabulary(model, forward, joined)


def projections(model: Model, forward: Forward, paired: bool) -> list[Part]:
    """paired: one product, in which either view's weights meet as many rows as the larger view has."""
    views = (forward.verified, model.weight_bytes), (forward.drafted, model.head_weight_bytes)
    if paired:
        operations = 2 * 2 * model.attention * forward.requests * max(forward.verified, forward.drafted)
        return [Part(model.attention * sum(size for _, size in views), operations, 0.0)]
    return [
        Part(model.attention * size, *_by_bytes(size, 2 * model.attention * forward.requests * rows))
        for rows, size in views
        if rows
    ]


def _by_bytes(size: float, operations: float) -> tuple[float, float, float]:
    """products, attention and fp8 of a part whose weights have that many bytes."""
    return (0.0, 0.0, operations) if size == 1 else (operations, 0.0, 0.0)


def vocabulary(model: Model, forward: Forward, joined: bool) -> list[Part]:
    """joined: one product for all rows that may come to draft, beside those of the verification; else drafts wait."""
    verified, drafted, predicting = (
        float(forward.requests * rows) for rows in (forward.verified, forward.drafted, forward.predicting)
    )
    if joined:
        moved = LOGIT_BYTES * verified + CARRIED_BYTES * drafted + (LOGIT_BYTES + TAKEN_BYTES) * predicting
        products = [(verified + drafted, moved)]
    else:
        wanted = ((forward.verified, verified), (forward.drafted, predicting))
        products = [(rows, LOGIT_BYTES * rows) for there_are, rows in wanted if there_are]
    weights = float(model.hidden) * model.vocab
    return [
        Part(weights * model.weight_bytes + moved * model.vocab, 2 * weights * rows, 0.0) for rows, moved in products
    ]


def joins(device: Device, model: Model, forward: Forward) -> bool:
    """Whether one product gives the logits of this verification and of its blocks sooner than two.

    It reads the vocabulary once, and multiplies it with rows that mostly draft nothing: free, up to the knee.
    """
    if not (forward.verified and forward.drafted):
        return False
    apart, joined = (vocabulary_seconds(device, model, forward, way) for way in (False, True))
    return joined < apart


def pairs(device: Device, model: Model, forward: Forward) -> bool:
    """Whether both views' projections take less time as one product than as two, if their weights are alike.

    It saves launches, and multiplies either view's weights with more rows: free, up to the knee.
    """
    alike = model.weight_bytes == model.head_weight_bytes > 1
    if not (alike and forward.verified and forward.drafted):
        return False
    apart, paired = (projections_seconds(device, model, forward, way) for way in (False, True))
    return paired < apart


def projections_seconds(device: Device, model: Model, forward: Forward, paired: bool) -> float:
    products = sum(part_seconds(device, part) for part in projections(model, forward, paired))
    return products - model.layers * PAIRED * paired * device.launch


def vocabulary_seconds(device: Device, model: Model, forward: Forward, joined: bool) -> float:
    products = sum(part_seconds(device, part) for part in vocabulary(model, forward, joined))
    return products + JOINED * joined * device.launch


def launches(model: Model, forward: Forward, joined: bool = False, paired: bool = False) -> int:
    if not forward.drafted:
        return model.layers * PLAIN_LAYER
    fp8, chosen = model.head_weight_bytes == 1, SELECTED * model.selector
    if forward.verified:
        layer = ONE_PASS_LAYER + fp8 * FP8 - paired * PAIRED
        return model.layers * layer + OUTCOME + JOINED * joined + chosen
    return model.layers * (DRAFT_LAYER + fp8 * FP8) + AROUND_DRAFTS + chosen


def part_seconds(device: Device, part: Part) -> float:
    products = part.products + part.fp8 / device.fp8
    arithmetic = products / device.products + part.attention / device.attention
    memory, s = part.read / device.memory, device.sharpness
    most = max(memory, arithmetic)
    return most * ((memory / most) ** s + (arithmetic / most) ** s) ** (1 / s) if most else 0.0


def forward_seconds(device: Device, model: Model, forward: Forward) -> float:
    """With as many products for its logits, and for both views' projections, as are quicker."""
    joined, paired = joins(device, model, forward), pairs(device, model, forward)
    seconds = sum(part_seconds(device, part) for part in parts(model, forward, joined, paired))
    walk = WALKED * model.selector * forward.predicting
    return seconds + (launches(model, forward, joined, paired) + walk) * device.launch


def forwards(mode: Mode, requests: int, context: float) -> list[Forward]:
    """Those of one step."""
    if mode.drafts == 0:
        return [Forward(requests, context, verified=1)]
    verified = mode.drafts + 1
    if mode.hypotheses:
        return [Forward(requests, context, verified, mode.hypotheses * mode.block, verified)]
    return [Forward(requests, context, verified), Forward(requests, context, 0, mode.block, mode.drafts)]


def step_seconds(device: Device, model: Model, mode: Mode, requests: int, context: float) -> float:
    return device.step + sum(forward_seconds(device, model, one) for one in forwards(mode, requests, context))


def knee(device: Device, model: Model) -> float:
    """Rows of a forward at which arithmetic takes as long as reading the weights."""
    return device.products * model.weight_bytes / (2 * device.memory)
