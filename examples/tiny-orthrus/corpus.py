"""A deterministic corpus of short chats: templated tasks with one right answer, and Python code.

The answers of the templated classes (arithmetic, counting, json, log) are a function of their prompt, so a model of
a few million parameters can be certain of them. `code` and `prose` are cut from the Python standard library.
"""

import ast
import hashlib
import json
import random
import string
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

LOW_ENTROPY = ("arithmetic", "counting", "json", "log")
CLASSES = (*LOW_ENTROPY, "code", "prose")

# `class` is a keyword, hence the functional form.
Sample = TypedDict("Sample", {"class": str, "prompt": str, "answer": str})
Turn = tuple[str, str]
Template = Callable[[random.Random], Turn]


def words(text: str) -> list[str]:
    return text.split()


FIRST = words(
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Mona Nina Oscar Paula Quinn Rosa Sam Tina"
)
LAST = words("Reed Stone Hall Young King Moore Bell Cook Ward Price Long Fox Lane Marsh Webb Cole Hart Nash Page Rice")
CITIES = words("Oslo Paris Rome Lima Cairo Delhi Tokyo Berlin Madrid Vienna Lisbon Dublin Prague Athens Boston Sydney")
ITEMS = words("pens cups books lamps chairs apples bags plates maps coins shirts boxes tickets bottles stamps cards")
COLORS = words("red blue green black white yellow orange purple brown grey")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
SERVICES = words("auth billing cache gateway mailer metrics queue scheduler search storage sync worker")
SYLLABLES = words("ba be bo da de do ka ke ko la le lo ma me mo na ne no ra re ro sa se so ta te to va ve vo")


def made_up_word(rng: random.Random) -> str:
    """A word that cannot be remembered, so that the model learns to copy from the prompt."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def long_addition(rng: random.Random) -> Turn:
    width = rng.choice((3, 3, 4))
    a, b = (rng.randrange(10 ** (width - 1), 10**width) for _ in range(2))
    prompt = rng.choice(("Add {} and {} step by step.", "What is {} + {}? Show the carries.")).format(a, b)
    lines, carry = [f"{a} + {b}"], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    lines.append(f"The answer is {a + b}.")
    return prompt, "\n".join(lines)


def long_multiplication(rng: random.Random) -> Turn:
    a, b = rng.randrange(100, 1000), rng.randint(2, 9)
    prompt = rng.choice(("Multiply {} by {} step by step.", "What is {} x {}? Show the carries.")).format(a, b)
    lines, carry = [f"{a} x {b}"], 0
    for x in reversed(str(a)):
        product = int(x) * b
        total = product + carry
        lines.append(f"{x} x {b} = {product}, {product} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    lines.append(f"The answer is {a * b}.")
    return prompt, "\n".join(lines)


def running_sum(rng: random.Random) -> Turn:
    terms = [rng.randint(1, 9) for _ in range(rng.randint(6, 11))]
    prompt = rng.choice(("Add up these numbers one by one: {}", "Show the running sum of {}"))
    lines, total = [], 0
    for term in terms:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    lines.append(f"The sum is {total}.")
    return prompt.format(", ".join(map(str, terms))), "\n".join(lines)


def shopping(rng: random.Random) -> Turn:
    name, goods = rng.choice(FIRST), rng.sample(ITEMS, rng.randint(2, 3))
    basket = [(item, rng.randint(2, 9), rng.randint(2, 9)) for item in goods]
    listed = ", ".join(f"{count} {item} at {price} dollars each" for item, count, price in basket)
    lines, total = [], 0
    for item, count, price in basket:
        cost = count * price
        lines.append(f"The {item} cost {count} x {price} = {cost} dollars.")
        if total:
            lines.append(f"Together that is {total} + {cost} = {total + cost} dollars.")
        total += cost
    lines.append(f"{name} pays {total} dollars.")
    return f"{name} buys {listed}. How much does {name} pay?", "\n".join(lines)


def times_table(rng: random.Random) -> Turn:
    factor, first = rng.randint(2, 25), rng.randint(1, 5)
    last = first + rng.randint(5, 9)
    lines = [f"{factor} x {i} = {factor * i}" for i in range(first, last + 1)]
    return f"Write the times table of {factor} from {first} to {last}.", "\n".join(lines)


def count_up(rng: random.Random) -> Turn:
    start, step, count = rng.randint(0, 300), rng.choice((1, 2, 3, 4, 5, 10)), rng.randint(12, 25)
    stop = start + step * (count - 1)
    numbers = ", ".join(map(str, range(start, stop + 1, step)))
    return f"Count from {start} to {stop} in steps of {step}.", numbers


def count_down(rng: random.Random) -> Turn:
    stop, step, count = rng.randint(0, 200), rng.choice((1, 2, 5, 10)), rng.randint(12, 22)
    start = stop + step * (count - 1)
    numbers = ", ".join(map(str, range(start, stop - 1, -step)))
    return f"Count down from {start} to {stop} in steps of {step}.", numbers


def numbered_list(rng: random.Random) -> Turn:
    word, first, count = made_up_word(rng), rng.randint(1, 40), rng.randint(8, 15)
    lines = [f"{i}. {word}" for i in range(first, first + count)]
    return f"Write the word {word} {count} times, numbered from {first}.", "\n".join(lines)


def letters(rng: random.Random) -> Turn:
    first, count, start = rng.randint(0, 13), rng.randint(8, 13), rng.randint(1, 60)
    chosen = string.ascii_lowercase[first : first + count]
    pairs = ", ".join(f"{letter} {i}" for i, letter in enumerate(chosen, start))
    return f"Number the letters from {chosen[0]} to {chosen[-1]}, starting at {start}.", pairs


def calendar(rng: random.Random) -> Turn:
    kind, cycle = rng.choice((("day", DAYS), ("month", MONTHS)))
    first, count, start = rng.randrange(len(cycle)), rng.randint(8, 14), rng.randint(1, 30)
    lines = [f"{start + i}: {cycle[(first + i) % len(cycle)]}" for i in range(count)]
    return f"List {count} {kind}s from {cycle[first]}, numbered from {start}.", "\n".join(lines)


def json_person(rng: random.Random) -> Turn:
    record = {
        "name": f"{rng.choice(FIRST)} {rng.choice(LAST)}",
        "age": rng.randint(18, 90),
        "city": rng.choice(CITIES),
        "email": f"{made_up_word(rng)}@{made_up_word(rng)}.com",
        "color": rng.choice(COLORS),
        "active": rng.random() < 0.5,
    }
    fields = rng.sample(list(record), rng.randint(4, 6))
    listed = ", ".join(f"{field} {json.dumps(record[field]).strip(chr(34))}" for field in fields)
    return f"Write a JSON record with {listed}.", json.dumps({field: record[field] for field in fields}, indent=2)


def json_table(rng: random.Random) -> Turn:
    rows = [
        {
            "id": rng.randint(100, 999),
            "item": rng.choice(ITEMS),
            "count": rng.randint(1, 99),
            "color": rng.choice(COLORS),
        }
        for _ in range(rng.randint(2, 3))
    ]
    listed = "\n".join(" ".join(str(value) for value in row.values()) for row in rows)
    answer = "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]"
    return f"Turn these rows (id item count color) into JSON:\n{listed}", answer


def json_config(rng: random.Random) -> Turn:
    keys = [made_up_word(rng) for _ in range(rng.randint(4, 6))]
    config = {key: rng.choice((rng.randint(1, 999), made_up_word(rng), True, False)) for key in keys}
    listed = "\n".join(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in config.items())
    return f"Convert to JSON:\n{listed}", json.dumps(config, indent=2)


def clock(seconds: int) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def log_requests(rng: random.Random) -> Turn:
    start, step, count = rng.randrange(70000), rng.choice((1, 2, 5, 10, 15, 30)), rng.randint(4, 6)
    service, request = rng.choice(SERVICES), rng.randint(100, 9900)
    level, status = rng.choice((("INFO", "done"), ("WARNING", "slow"), ("ERROR", "failed")))
    lines = [f"{clock(start + i * step)} {level} {service}: request {request + i} {status}" for i in range(count)]
    prompt = (
        f"Write {count} {level} log lines of {service} from {clock(start)}, one every {step} seconds, "
        f"for requests {status} from {request}."
    )
    return prompt, "\n".join(lines)


def log_access(rng: random.Random) -> Turn:
    start, step, count = rng.randrange(70000), rng.choice((1, 2, 3, 5, 10)), rng.randint(4, 6)
    path, user, size = f"/{made_up_word(rng)}/{made_up_word(rng)}", rng.choice(FIRST).lower(), rng.randint(1, 90) * 10
    lines = [f"[{clock(start + i * step)}] user={user} GET {path} 200 {size}" for i in range(count)]
    prompt = f"Write {count} access log lines: user {user}, path {path}, size {size}, from {clock(start)}, step {step}."
    return prompt, "\n".join(lines)


def log_jobs(rng: random.Random) -> Turn:
    start, step = rng.randrange(70000), rng.choice((1, 2, 5, 10, 20))
    worker, jobs = rng.randint(1, 40), [made_up_word(rng) for _ in range(rng.randint(2, 3))]
    lines = []
    for i, job in enumerate(jobs):
        lines.append(f"{clock(start + 2 * i * step)} worker-{worker} started job {job}")
        lines.append(f"{clock(start + (2 * i + 1) * step)} worker-{worker} finished job {job}")
    prompt = f"Write the log of worker {worker} running {', '.join(jobs)} from {clock(start)}, {step} seconds per line."
    return prompt, "\n".join(lines)


# Each template with its share of its class.
TEMPLATES: dict[str, dict[Template, float]] = {
    "arithmetic": {long_addition: 3, long_multiplication: 3, running_sum: 2, shopping: 2, times_table: 1},
    "counting": {count_up: 3, count_down: 2, numbered_list: 1, letters: 1, calendar: 1},
    "json": {json_person: 1, json_table: 1, json_config: 1},
    "log": {log_requests: 1, log_access: 1, log_jobs: 1},
}


def templated(name: str, seed: str) -> Iterator[Sample]:
    """Endless samples of one templated class."""
    rng = random.Random(f"{name}/{seed}")
    templates, shares = list(TEMPLATES[name]), list(TEMPLATES[name].values())
    while True:
        prompt, answer = rng.choices(templates, shares)[0](rng)
        yield {"class": name, "prompt": prompt, "answer": answer}


def library_sources(held_out: bool) -> Iterator[str]:
    """Sources of the standard library, without tests and tables; one file in sixteen is held out, by its name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # The build settings differ from machine to machine.
        if skipped & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        if (hashlib.sha256(name.as_posix().encode()).digest()[0] % 16 == 0) == held_out:
            yield path.read_text(encoding="utf-8", errors="ignore")


def take(lines: list[str], start: int, chars: int) -> int:
    """Where to stop so that `lines[start:stop]` has at most `chars` characters, or is one line."""
    stop, used = start, 0
    while stop < len(lines) and (stop == start or used + len(lines[stop]) <= chars):
        used += len(lines[stop]) + 1
        stop += 1
    return stop


def cut_lines(lines: list[str], rng: random.Random, prompt_chars: int, answer_chars: int) -> Iterator[Turn]:
    """Cut lines into consecutive turns: up to about `prompt_chars` to go on from, and what follows them."""
    start = 0
    while start < len(lines):
        sizes = rng.randint(prompt_chars // 3, prompt_chars), rng.randint(answer_chars // 2, answer_chars)
        middle = take(lines, start, sizes[0])
        stop = take(lines, middle, sizes[1])
        text = textwrap.dedent("\n".join(lines[start:stop])).split("\n")
        prompt, answer = "\n".join(text[: middle - start]), "\n".join(text[middle - start :])
        if answer_chars // 3 <= len(answer) <= 1.2 * answer_chars:
            yield prompt, answer
        start = stop


def is_plain(text: str) -> bool:
    """Whether text is ASCII and not a table of numbers."""
    return text.isascii() and sum(c.isdigit() for c in text) < 0.08 * len(text)


def code(held_out: bool) -> Iterator[Sample]:
    rng = random.Random(f"code/{held_out}")
    for source in library_sources(held_out):
        lines = [line.rstrip() for line in source.expandtabs(4).splitlines() if line.strip()]
        for prompt, answer in cut_lines(lines, rng, prompt_chars=150, answer_chars=480):
            if is_plain(prompt + answer):
                yield {"class": "code", "prompt": f"Continue this Python code:\n{prompt}", "answer": answer}


def prose(held_out: bool) -> Iterator[Sample]:
    rng = random.Random(f"prose/{held_out}")
    for source in library_sources(held_out):
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for text in [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]:
            if any(mark in text for mark in (">>>", "::", "--", "==")):
                continue  # examples and tables rather than sentences
            for prompt, answer in cut_words(words(text), rng):
                if is_plain(prompt + answer):
                    yield {"class": "prose", "prompt": f"Continue this text:\n{prompt}", "answer": answer}


def cut_words(text: list[str], rng: random.Random) -> Iterator[Turn]:
    """Cut words into consecutive turns, each a sentence or so to go on from and what follows it."""
    start = 0
    while len(text) - start >= 25:
        middle, end = start + rng.randint(8, 22), start + rng.randint(50, 90)
        yield " ".join(text[start:middle]), " ".join(text[middle:end])
        start = end


def shuffled(samples: Iterator[Sample], seed: str) -> list[Sample]:
    listed = list(samples)
    random.Random(seed).shuffle(listed)
    return listed


def unique(samples: Iterator[Sample], count: int, taken: set[str], accept: Callable[[Sample], bool]) -> list[Sample]:
    """The first `count` accepted samples whose prompts are not in `taken`, which grows by them."""
    chosen: list[Sample] = []
    for sample in samples:
        if len(chosen) == count:
            break
        if sample["prompt"] not in taken and accept(sample):
            taken.add(sample["prompt"])
            chosen.append(sample)
    return chosen


def source_of(name: str, held_out: bool) -> Iterator[Sample]:
    """All samples of a class; the templated classes never end."""
    if name in TEMPLATES:
        return templated(name, "held-out" if held_out else "train")
    samples = code(held_out) if name == "code" else prose(held_out)
    return iter(shuffled(samples, f"{name}/{held_out}"))


def held_out_samples(per_class: int, accept: Callable[[Sample], bool]) -> list[Sample]:
    taken: set[str] = set()
    return [s for name in CLASSES for s in unique(source_of(name, True), per_class, taken, accept)]


def train_samples(counts: dict[str, int], held_out: list[Sample]) -> list[Sample]:
    """Shuffled training samples, `counts` of each class or all there are, none with a held-out prompt."""
    taken = {sample["prompt"] for sample in held_out}
    chosen = [s for name, n in counts.items() for s in unique(source_of(name, False), n, taken, lambda _: True)]
    return shuffled(iter(chosen), "train")


def write_jsonl(path: Path, samples: list[Sample]) -> None:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
