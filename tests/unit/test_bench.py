"""`vllm-orthrus bench`, as far as it needs no engine."""

from __future__ import annotations

import csv
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.unit.conftest import TINY
from vllm_orthrus.bench import acceptance, cost, plots, summary, throughput
from vllm_orthrus.bench.calls import FEWEST, call
from vllm_orthrus.bench.environment import environment
from vllm_orthrus.bench.files import write_csv, write_json
from vllm_orthrus.bench.process import AnsweringProcess, ProcessError
from vllm_orthrus.bench.prompts import OWN, SHIPPED, Classes, Prompt, choose, read_questions, render
from vllm_orthrus.bench.settings import Settings, check_options
from vllm_orthrus.bench.texts import Texts, compare, judge
from vllm_orthrus.bench.turns import Decoder, Drafts, Turn
from vllm_orthrus.bench.ways import PLAIN, Way, choose_ways
from vllm_orthrus.cli.main import main
from vllm_orthrus.errors import UserError

# What is called a difference

ratios = st.lists(st.floats(0.05, 20), min_size=1, max_size=9)
ROUNDS = 5


@given(ratios)
def test_the_other_way_round_it_is_the_opposite(found: list[float]) -> None:
    opposite = {"faster": "slower", "slower": "faster", "no difference seen": "no difference seen"}
    mine, other = call(found), call([1 / ratio for ratio in found])
    assert other.times == pytest.approx(1 / mine.times)
    if not math.isclose(mine.times, mine.spread) and not math.isclose(1 / mine.times, mine.spread):
        assert other.verdict == opposite[mine.verdict]


@given(ratios, st.randoms())
def test_the_order_of_rounds_says_nothing(found: list[float], shuffle: random.Random) -> None:
    mixed = list(found)
    shuffle.shuffle(mixed)
    assert call(mixed) == call(found)


@given(ratios)
def test_a_called_difference_is_in_every_round(found: list[float]) -> None:
    made = call(found)
    assert made.least <= made.times <= made.most
    if made.verdict == "faster":
        assert len(found) >= FEWEST and min(found) > 1 and made.times > made.spread
    if made.verdict == "slower":
        assert len(found) >= FEWEST and max(found) < 1 and 1 / made.times > made.spread


@given(st.floats(1.01, 20), st.integers(0, 2**32))
def test_what_is_clear_is_called(times: float, seed: int) -> None:
    """Rounds that stay within a tenth of the difference."""
    choose = random.Random(seed)
    found = [times ** choose.uniform(0.9, 1.1) for _ in range(ROUNDS)]
    assert call(found).verdict == "faster"
    assert call([1 / ratio for ratio in found]).verdict == "slower"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([1.5, 1.4, 1.6, 1.5, 1.5], "faster"),
        ([0.5, 0.6, 0.7, 0.6, 0.5], "slower"),
        ([1.5, 1.4, 0.99, 1.5, 1.5], "no difference seen"),  # a round disagrees
        ([1.01, 1.02, 1.02, 1.02, 1.6], "no difference seen"),  # one round makes all of it
        ([2.0, 2.0], "no difference seen"),  # too few to tell
        ([1.0, 1.0, 1.0], "no difference seen"),
    ],
)
def test_differences(found: list[float], verdict: str) -> None:
    assert call(found).verdict == verdict


# What is compared


def test_where_texts_part() -> None:
    same = compare([[1, 2, 3], [1, 9, 3], [1, 2]], [[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    assert (same.equal, same.asked, same.parts_at) == (1, 3, [1, 2])
    assert "1 of 3" in str(same) and "token 1, 2" in str(same)


def test_only_float32_must_be_equal_and_only_of_who_claims_it() -> None:
    ways = choose_ways(
        ["two"], ['{"method": "ngram", "rejection_sample_method": "synthetic"}', '{"method": "suffix"}'], "head"
    )
    said = {PLAIN: [[1, 2]], "two": [[1, 3]], "ngram": [[4, 4]], "suffix": [[1, 2]]}
    same, red = judge(said, ways, exact=True)
    assert [problem.partition(":")[0] for problem in red] == ["two"]
    assert same["ngram"].equal == 0 and same["suffix"].equal == 1
    assert judge(said, ways, exact=False)[1] == []


def test_ways() -> None:
    ways = choose_ways(["auto", "auto"], ['{"method": "orthrus", "name": "few", "num_speculative_tokens": 3}'], "head")
    assert ways == [
        Way("plain", None),
        Way("auto", {"method": "orthrus", "model": "head"}),
        Way("few", {"method": "orthrus", "model": "head", "num_speculative_tokens": 3}),
    ]
    assert [bool(way.variables) for way in ways] == [True, False, False]
    assert choose_ways([], ['{"method": "ngram"}'])[1].variables == {"VLLM_PLUGINS": "none"}


@pytest.mark.parametrize(
    "wrong", ["ngram", '"ngram"', '{"model": "x"}', '{"method": "suffix"}', '{"method": "orthrus", "name": "auto"}']
)
def test_a_wrong_way_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="--against"):
        choose_ways(["auto"], ['{"method": "suffix"}', wrong])


@pytest.mark.parametrize("option", ["--dtype", "--dtype=half", "--speculative-config", "--port", "--spec-model"])
def test_options_of_the_benchmark_are_not_taken_twice(option: str) -> None:
    with pytest.raises(UserError, match=option):
        check_options(["--max-model-len", "512", option])


# What is asked


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_lines_with_classes(tmp_path: Path) -> None:
    lines = '{"prompt": "a", "class": "x"}\n\n{"prompt": "b"}\n{"messages": [{"role": "user", "content": "c"}]}\n'
    assert read_questions(write(tmp_path / "a.jsonl", lines)) == [("x", "a"), ("all", "b"), ("all", "c")]


def test_sharegpt(tmp_path: Path) -> None:
    chats: list[list[dict[str, str]]] = [
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [],
        [{"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}],
    ]
    text = json.dumps([{"id": "1", "conversations": chat} for chat in chats])
    assert read_questions(write(tmp_path / "a.json", text)) == [("all", "a"), ("all", "c")]


@pytest.mark.parametrize(
    "record",
    [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},  # Spec-Bench, MT-Bench
        {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["", ""]},
        {"prompt_id": 81, "category": "writing", "prompt": ["a", "b"], "reference": []},  # MT-Bench by a hub's name
        {"question_id": "q", "category": "writing", "sub_category": "poem", "turns": ["a"], "multiturn": False},
        {"question_id": "q", "category": "writing", "messages": [{"role": "user", "content": "a"}]},  # SPEED-Bench
        {"class": "writing", "category": "other", "prompt": "a", "turns": ["b"]},
    ],
)
def test_question_files_keep_their_categories(record: dict[str, object], tmp_path: Path) -> None:
    lines = json.dumps(record) + '\n{"question_id": 82, "turns": ["c"]}\n'
    assert read_questions(write(tmp_path / "question.jsonl", lines)) == [("writing", "a"), ("all", "c")]


def test_a_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the hub is not there."""
    asked = []

    def load_dataset(name: str, subset: str | None, split: str, streaming: bool) -> list[dict[str, object]]:
        asked.append((name, subset, split, streaming))
        return [{"question_id": "q", "category": "coding", "turns": ["a", "b"]}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_questions("nvidia/SPEED-Bench:qualitative:test") == [("coding", "a")]
    assert read_questions("philschmid/mt-bench") == [("coding", "a")]
    assert asked == [
        ("nvidia/SPEED-Bench", "qualitative", "test", True),
        ("philschmid/mt-bench", None, "train", True),
    ]


def test_the_packages_own_questions() -> None:
    """In the form of Spec-Bench's, so that what reads those reads them."""
    lines = [json.loads(line) for line in OWN.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(set(line) == {"question_id", "category", "turns"} and line["turns"] for line in lines)
    assert read_questions(SHIPPED) == [(line["category"], line["turns"][0]) for line in lines]
    counts = Counter(line["category"] for line in lines)
    assert len(counts) == 8 and set(counts.values()) == {3}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"question_id": 1, "turns": [3]}\n', "record 1"),
        ("a.jsonl", '{"question_id": 1, "turns": []}\n', "no prompts"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2"),
        ("a.jsonl", '{"prompt": "a"}\n{"question": "b"}\n', "record 2.*question.*--prompt-column"),
        ("a.jsonl", '{"prompt": 3}\n', "record 1"),
        ("a.jsonl", "", "no prompts"),
        ("a.jsonl", '{"prompt": ""}', "no prompts"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "not JSON.*jsonl"),
        ("a.json", '{"prompt": "a"}', "list of objects"),
        ("a.txt", "a", "ends in .jsonl"),
    ],
)
def test_a_damaged_dataset_is_named(name: str, text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        read_questions(write(tmp_path / name, text))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"there-is-none\.jsonl.*ends in"):
        read_questions("there-is-none.jsonl")


def test_prompts_are_what_a_server_would_make_of_them() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    chat = [{"role": "user", "content": "Count."}]
    served = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert render([("x", "Count.")], tokenizer, raw=False)["x"][0].tokens == served["input_ids"]
    assert render([("x", "Count.")], tokenizer, raw=True)["x"][0].text == "Count."


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 4))
def test_turns_ask_something_else_while_they_can(available: int, count: int, turn: int) -> None:
    prompts = [Prompt(str(number), [number]) for number in range(available)]
    asked = [one for place in range(turn + 1) for one in choose(prompts, count, place)]
    assert len(asked) == count * (turn + 1)
    assert len(set(map(str, asked))) == min(available, len(asked))


# What is measured


class Pretended:
    """A way that says and takes what it is told to; only the clock and the model are not there."""

    def __init__(self, way: Way, said: Mapping[str, int], seconds: Mapping[str, float], log: list[str]) -> None:
        self.way, self.said, self.seconds, self.log = way, said, seconds, log

    def answers(self, prompts: Sequence[Prompt], tokens: int) -> Texts:
        return [[*prompt.tokens, self.said.get(self.way.name, 0)] for prompt in prompts]

    def turn(self, prompts: Sequence[Prompt], at_once: int) -> Turn:
        self.log.append(self.way.name)
        drafts = Drafts(10, 30, 0 if self.way.name == "one" else 20) if self.way.speculative else Drafts()
        return Turn(100 * len(prompts), self.seconds[self.way.name] * len(prompts), drafts, {"median_ttft_ms": 1.0})


CLASSES: Classes = {kind: [Prompt(f"{kind} {n}", [n]) for n in range(20)] for kind in ("log", "prose")}
SECONDS = {"plain": 1.0, "two": 0.5, "one": 2.0}


def measured(
    folder: Path, said: Mapping[str, int] | None = None, dtype: str = "float32", side_by_side: bool = True
) -> tuple[throughput.Findings, list[str], list[list[str]]]:
    """Findings, whose turns they were, and which ways were up together."""
    settings = Settings("base", choose_ways(["two", "one"]), 8, 0.0, dtype, [], False, folder)
    findings = throughput.Findings(folder / "found.json", {"gpu": "none"})
    log: list[str] = []
    up: list[list[str]] = []

    @contextmanager
    def start(ways: Sequence[Way]) -> Iterator[Mapping[str, Decoder]]:
        up.append([way.name for way in ways])
        yield {way.name: Pretended(way, said or {}, SECONDS, log) for way in ways}

    plan = throughput.Plan([1, 4], 3, 2, side_by_side)
    throughput.measure(settings, plan, CLASSES, start, findings)
    findings.summary = summary.summarise(findings.rounds)
    findings.flags = throughput.flags(settings.ways, findings.rounds)
    return findings, log, up


def test_nothing_is_timed_that_says_something_else(tmp_path: Path) -> None:
    for side_by_side in (True, False):
        findings, log, _ = measured(tmp_path, {"two": 7}, side_by_side=side_by_side)
        assert len(findings.red) == 1 and findings.red[0].startswith("two:")
        assert not log and not findings.rounds
        assert json.loads((tmp_path / "found.json").read_text())["red"] == findings.red


def test_other_dtypes_are_timed_and_tell_what_parted(tmp_path: Path) -> None:
    findings, log, _ = measured(tmp_path, {"two": 7}, dtype="bfloat16")
    assert log and not findings.red
    assert findings.same_text["two"].startswith("0 of 8 answers") and findings.same_text["one"].startswith("all 8")


@pytest.mark.parametrize("side_by_side", [True, False])
def test_ways_take_turns(side_by_side: bool, tmp_path: Path) -> None:
    findings, _, up = measured(tmp_path, side_by_side=side_by_side)
    assert len(findings.rounds) == 3 * 2 * 2 * 3
    if side_by_side:
        assert up == [["plain", "two", "one"]]
        first = [[one["way"] for one in findings.rounds if one["round"] == number][:3] for number in range(3)]
        assert first == [["plain", "two", "one"], ["two", "one", "plain"], ["one", "plain", "two"]]
    else:
        assert up[3:] == [[way] for way in ["plain", "two", "one", "two", "one", "plain", "one", "plain", "two"]]
    for at_once in ("1", "4"):
        found = findings.summary[at_once]
        assert list(found) == ["log", "prose", "all"]
        assert found["all"]["two"]["times_plain"] == pytest.approx(2) and found["all"]["two"]["verdict"] == "faster"
        assert found["log"]["one"]["times_plain"] == pytest.approx(0.5) and found["log"]["one"]["verdict"] == "slower"
        assert found["log"]["plain"]["verdict"] == "no difference seen"
        assert found["all"]["two"]["tokens_per_cycle"] == pytest.approx(3)
    assert findings.flags == ["one: none of 360 drafts was accepted"]


def test_all_classes_count_with_their_seconds() -> None:
    """A ratio of sums: the mean of 4x and 0.5x would be faster, and the time is longer."""
    place = {"round": 0, "at_once": 1, "requests": 1, "tokens": 100, "cycles": 0, "drafted": 0, "accepted": 0}
    seconds = {("log", PLAIN): 1.0, ("log", "two"): 0.25, ("prose", PLAIN): 1.0, ("prose", "two"): 2.0}
    rounds = [place | {"class": kind, "way": way, "seconds": took} for (kind, way), took in seconds.items()]
    assert summary.summarise(rounds)["1"]["all"]["two"]["times_plain"] == pytest.approx(2 / 2.25)


def test_acceptance_counts_draft_passes() -> None:
    """Two passes: one before each cycle. One pass: as many as the engine says."""
    counted = {
        "prompts": 2,
        "tokens": 30,
        "steps": 12,
        "vllm:spec_decode_num_drafts": 10,
        "vllm:spec_decode_num_accepted_tokens": 18,
        **{f"accepted at {place}": count for place, count in enumerate((8, 6, 4, 0, 0))},
    }
    two = acceptance.figures(counted)
    assert two["tokens_per_cycle"] == pytest.approx(2.8) and two["tokens_per_forward"] == pytest.approx(30 / 22)
    assert two["accepted_at"] == pytest.approx([0.8, 0.6, 0.4])
    assert acceptance.figures(counted | {"vllm:orthrus_draft_passes": 2})["tokens_per_forward"] == pytest.approx(
        30 / 14
    )


# What is written


def test_files(tmp_path: Path) -> None:
    findings, _, _ = measured(tmp_path)
    found = json.loads(findings.path.read_text())
    assert found["environment"] == {"gpu": "none"} and found["rounds"] == findings.rounds
    write_csv(tmp_path / "found.csv", summary.COLUMNS, summary.with_rates(findings.rounds))
    with (tmp_path / "found.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == len(findings.rounds)
    assert {float(row["times_plain"]) for row in rows if row["way"] == "two"} == {2.0}
    assert "2.00x " in summary.table(findings.summary) and "0.50x " in summary.table(findings.summary)
    assert not list(tmp_path.glob("*.tmp"))


def test_numbers_stand_in_one_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"numbers": [1, 2.5], "path": Path("a")})
    assert '"numbers": [1, 2.5]' in (tmp_path / "a.json").read_text()


def test_the_environment_is_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", environment())
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["cores"] > 0 and found["packages"]["vllm-orthrus"] and len(found["sources"]) == 16


def is_picture(path: Path) -> bool:
    from matplotlib import image

    pixels = image.imread(path)
    return bool(pixels.shape[0] > 300 and pixels.shape[1] > 600 and len({*map(tuple, pixels.reshape(-1, 4))}) > 50)


def test_pictures_of_throughput(tmp_path: Path) -> None:
    several = measured(tmp_path)[0].summary
    for found in (several, {"4": several["4"]}):
        plots.draw_throughput(found, "tiny", tmp_path / "a.png")
        assert is_picture(tmp_path / "a.png")


def test_picture_of_acceptance(tmp_path: Path) -> None:
    one = {"tokens_per_cycle": 4.0, "tokens_per_forward": 2.0, "accepted_at": [0.9, 0.5]}
    nothing = {"tokens_per_cycle": 1.0, "tokens_per_forward": 1.0, "accepted_at": []}
    plots.draw_acceptance({"two": {"log": one, "prose": nothing}}, "tiny", tmp_path / "a.png")
    assert is_picture(tmp_path / "a.png")


# What a user got wrong

ASKED = ["bench", "throughput", "--model", str(TINY / "base"), "--dataset", str(TINY / "heldout.jsonl")]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["--concurrency", "4", "0"], "--concurrency [4, 0]"),
        (["--out", "found.txt"], "--out found.txt: must end in .json"),
        (["--against", "{"], "--against {: not JSON"),
        (["--", "--dtype", "half"], "--dtype: not among the further options"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    more: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vllm_orthrus.bench.asked.find_spec", lambda _: True)  # these tests run where vLLM is not
    assert main([*ASKED, *more]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("vllm_orthrus.bench.asked.find_spec", lambda _: True)
    assert main(ASKED) == 2
    assert "pip install 'vllm-orthrus[bench]'" in capsys.readouterr().err


def test_without_vllm_the_doctor_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_orthrus.bench.asked.find_spec", lambda _: None)
    assert main(ASKED) == 2
    assert "vllm-orthrus doctor" in capsys.readouterr().err


def test_a_process_that_ends_tells_its_last_words(tmp_path: Path) -> None:
    process = AnsweringProcess("vllm_orthrus.bench.there_is_none", {}, log=tmp_path / "log")
    with pytest.raises(ProcessError, match="there_is_none"):
        process.ready()
    process.close()


def test_cost_tells_errors_apart_and_draws_them(tmp_path: Path) -> None:
    steps = [
        {"requests": n, "context": context, "drafting": drafts, "seconds": 0.01, "roofline": 0.02}
        | {"foretold": 0.01 if n == 1 else 0.012, "timed_before": n == 1}
        for n in (1, 2)
        for context in (49.0, 57.3, 513.0)
        for drafts in (0, 3)
    ]
    found = cost.errors(steps)
    assert found["timed before"] == {"median": 0.0, "worst": 0.0, "steps": 6}
    assert found["foretold, and not timed before"]["worst"] == pytest.approx(0.2)
    assert cost.table(steps).count("not timed before") == 6
    plots.draw_cost(steps, "a model", tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
