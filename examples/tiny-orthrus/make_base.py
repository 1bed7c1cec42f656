"""Make the tiny base model: corpus, tokenizer, about twenty minutes of training on two CPU cores, and a check.

    python make_base.py --work WORK

leaves `base/` and `heldout.jsonl` beside this file, and the training chats in WORK/train.jsonl.

    python make_base.py --work WORK --chats-only

writes the training chats of the base that is there, and nothing else.
"""

import argparse
import math
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from chat_tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE, chat_parts, train_tokenizer
from corpus import CLASSES, LOW_ENTROPY, Sample, held_out_samples, train_samples, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
SEED = 0
COUNTS = {"arithmetic": 12500, "counting": 5000, "json": 6500, "log": 5500, "code": 12500, "prose": 3000}
HELD_OUT_PER_CLASS = 40
MAX_PROMPT_TOKENS = 100
MAX_POSITIONS = 2048

ROW, BATCH = 384, 6
FINAL_LR_SHARE, WARM_UP_SHARE, WEIGHT_DECAY = 0.03, 0.05, 0.05
# Packed chats are kept from seeing each other, except that this share carries on as a further turn.
FURTHER_TURN_SHARE = 0.3
IGNORED = -100


class Chat(NamedTuple):
    """The tokens of one chat and how many of them, from the left, carry no loss."""

    tokens: list[int]
    unlearned: int


class Rows(NamedTuple):
    """Packed chats; positions start anew where a chat must not see the one before it."""

    tokens: torch.Tensor  # [rows, ROW]
    labels: torch.Tensor  # [rows, ROW], the token itself or IGNORED
    positions: torch.Tensor  # [rows, ROW]


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )


def encode(samples: list[Sample], tokenizer: PreTrainedTokenizerBase, everything: bool) -> list[Chat]:
    """Chats with loss on the answer; with `everything`, also on the prompts that are text worth modelling."""
    parts = [chat_parts(sample["prompt"], sample["answer"]) for sample in samples]
    prompts = tokenizer([prompt for prompt, _ in parts])["input_ids"]
    answers = tokenizer([answer for _, answer in parts])["input_ids"]
    chats = []
    for sample, prompt, answer in zip(samples, prompts, answers, strict=True):
        text_prompt = everything and sample["class"] not in LOW_ENTROPY
        chats.append(Chat(prompt + answer, 0 if text_prompt else len(prompt)))
    return chats


def pack(chats: list[Chat], pad: int) -> Rows:
    """Whole chats into rows: each into the fullest open row that still has room for it."""
    rng = random.Random(SEED)
    done: list[list[Chat]] = []
    open_rows: list[tuple[int, list[Chat]]] = []
    for chat in chats:
        if len(chat.tokens) > ROW:
            continue
        open_rows.sort(key=lambda row: -row[0])
        fitting = next((i for i, (used, _) in enumerate(open_rows) if used + len(chat.tokens) <= ROW), None)
        if fitting is None:
            if len(open_rows) == 64:
                done.append(open_rows.pop(0)[1])
            open_rows.append((len(chat.tokens), [chat]))
        else:
            used, row = open_rows[fitting]
            open_rows[fitting] = (used + len(chat.tokens), [*row, chat])
    done.extend(row for _, row in open_rows)

    tokens = torch.full((len(done), ROW), pad)
    labels = torch.full((len(done), ROW), IGNORED)
    positions = torch.arange(ROW).repeat(len(done), 1)
    for i, row in enumerate(done):
        at = 0
        for chat in row:
            end = at + len(chat.tokens)
            tokens[i, at:end] = torch.tensor(chat.tokens)
            labels[i, at + chat.unlearned : end] = tokens[i, at + chat.unlearned : end]
            if at and rng.random() >= FURTHER_TURN_SHARE:
                positions[i, at:] = torch.arange(ROW - at)
                labels[i, at] = IGNORED  # its predecessor is not its context
            at = end
    return Rows(tokens, labels, positions)


def next_token_loss(model: Qwen3ForCausalLM, rows: Rows) -> torch.Tensor:
    # Transformers reads the chat boundaries off the positions and masks attention across them.
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows.tokens, position_ids=rows.positions, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows.labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def held_out_losses(model: Qwen3ForCausalLM, held_out: dict[str, Rows]) -> str:
    return "  ".join(f"{name} {next_token_loss(model, rows).item():.3f}" for name, rows in held_out.items())


def learning_rate(done: float, peak: float) -> float:
    """The rate when the share `done` of the training lies behind."""
    if done < WARM_UP_SHARE:
        return peak * max(done, 0.002) / WARM_UP_SHARE
    cosine = 0.5 * (1 + math.cos(math.pi * (done - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)))
    return peak * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


class Length(NamedTuple):
    """How long to train: until either has passed."""

    epochs: float
    minutes: float


def train(model: Qwen3ForCausalLM, rows: Rows, held_out: dict[str, Rows], peak_lr: float, length: Length) -> int:
    """Train for `length`, the rate following whichever is nearer its end. Returns tokens."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), fused=True)
    per_epoch = len(rows.tokens) // BATCH
    steps = int(length.epochs * per_epoch)
    started, recent, reports = time.monotonic(), 0.0, 0
    for step in range(steps):
        spent = time.monotonic() - started
        done = max(step / steps, spent / 60 / length.minutes)
        if done >= 1:
            return step * BATCH * ROW
        if step % per_epoch == 0:
            order = torch.randperm(len(rows.tokens))
        picked = order[step % per_epoch * BATCH :][:BATCH]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, peak_lr)
        loss = next_token_loss(model, Rows(*(field[picked] for field in rows)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 0:
            speed = step * BATCH * ROW / spent
            left = spent / max(done, 1e-6) * (1 - done) / 60
            print(f"step {step}  {done:.1%}  loss {recent:.3f}  {speed:.0f} tokens/s  {left:.1f} min left", flush=True)
        if done * 8 >= reports + 1:
            reports += 1
            print(f"held-out answers: {held_out_losses(model, held_out)}", flush=True)
    return steps * BATCH * ROW


@torch.no_grad()
def greedy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**batch, max_new_tokens=256, do_sample=False)
    return tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def check(folder: Path, tokenizer: PreTrainedTokenizerBase, held_out: list[Sample], per_class: int) -> None:
    """Greedy answers of the saved model: how many are right to the letter, and a few continuations of code."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    for name in LOW_ENTROPY:
        asked = [sample for sample in held_out if sample["class"] == name][:per_class]
        written = greedy(model, tokenizer, [sample["prompt"] for sample in asked])
        pairs = list(zip(asked, written, strict=True))
        right = sum(sample["answer"] == text for sample, text in pairs)
        print(f"{name}: {right} of {len(asked)} greedy answers are exact")
        for sample, text in [pair for pair in pairs if pair[0]["answer"] != pair[1]][:1]:
            print(f"  a wrong one, to {sample['prompt']!r}:\n  {text!r}")
    for sample in [sample for sample in held_out if sample["class"] in ("code", "prose")][37:43]:
        print(f"--- {sample['prompt']}\n>>>\n{greedy(model, tokenizer, [sample['prompt']])[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the training chats")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for base/ and heldout.jsonl")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after this long, if sooner")
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--resume", action="store_true", help="train the base in --out further, on the rows reshuffled")
    parser.add_argument("--chats-only", action="store_true", help="write WORK/train.jsonl for the base in --out")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.out / "base"
    torch.manual_seed(SEED + args.resume)

    # The tokenizer learns from chats that no prompt of the held-out set has been removed from yet: the limit on
    # held-out prompts is in tokens. Its source is the training side only, so nothing held out is seen.
    chats = train_samples(COUNTS, [])
    if args.chats_only:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        texts = (text for sample in chats[::4] for text in (sample["prompt"], sample["answer"]))
        tokenizer = train_tokenizer(texts, folder, MAX_POSITIONS)

    def short_enough(sample: Sample) -> bool:
        return len(tokenizer(chat_parts(sample["prompt"], "")[0])["input_ids"]) <= MAX_PROMPT_TOKENS

    held_out = held_out_samples(HELD_OUT_PER_CLASS, short_enough)
    asked = {sample["prompt"] for sample in held_out}
    chats = [sample for sample in chats if sample["prompt"] not in asked]
    write_jsonl(args.work / "train.jsonl", chats)
    if args.chats_only:
        return
    write_jsonl(args.out / "heldout.jsonl", held_out)

    pad = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    rows = pack(encode(chats, tokenizer, everything=True), pad)
    by_class = {name: [sample for sample in held_out if sample["class"] == name] for name in CLASSES}
    held_out_rows = {name: pack(encode(by_class[name], tokenizer, everything=False), pad) for name in CLASSES}
    for name in CLASSES:
        encoded = encode([sample for sample in chats if sample["class"] == name], tokenizer, everything=True)
        print(f"{name}: {len(encoded)} chats, {sum(len(chat.tokens) for chat in encoded)} tokens")

    if args.resume:
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = Qwen3ForCausalLM(tiny_config(tokenizer))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {rows.tokens.numel()} tokens in {len(rows.tokens)} rows", flush=True)
    started = time.monotonic()
    seen = train(model, rows, held_out_rows, args.peak_lr, Length(args.epochs, args.minutes))
    print(f"trained on {seen} tokens in {(time.monotonic() - started) / 60:.1f} minutes")

    model.generation_config = GenerationConfig(
        eos_token_id=[model.config.eos_token_id, pad], pad_token_id=pad, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    print(f"held-out answers, bfloat16 weights: {held_out_losses(model, held_out_rows)}")
    check(folder, tokenizer, held_out, per_class=20)


if __name__ == "__main__":
    main()
