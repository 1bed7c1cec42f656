"""Whatever is done to a head's files: it is read, or refused in words of ours. Nothing else happens."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.unit.conftest import make_base, make_head
from vllm_orthrus.cli.main import main
from vllm_orthrus.heads import HeadConfig, HeadError, find_nonsense, open_head, resolve_head, save_head
from vllm_orthrus.heads.convert import merge_head
from vllm_orthrus.heads.widen import read_config, read_tensors
from vllm_orthrus.training.reference import load_base, read_base_config

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, folder = make_base("qwen3"), tmp_path_factory.mktemp("sound")
    base.save_pretrained(folder / "base")
    config = HeadConfig.for_base(base.config.to_dict(), 8, 127, "test/base", "v1")
    save_head(folder / "head", make_head(base, 0.1).published(), config)
    merge_head(open_head(folder / "head"), folder / "base", folder / "merged")
    return folder


@pytest.fixture
def head(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound / "head", tmp_path / "head"))


def read(head: Path) -> bool:
    """All that serving reads. Whether it was accepted; any other error than ours is the test's failure."""
    try:
        checkpoint = open_head(head)
        checkpoint.check_complete()
        for _ in checkpoint.tensors():
            pass
    except HeadError as error:
        assert str(error)
        return False
    return True


def test_a_sound_head_is_read(head: Path) -> None:
    assert read(head)


@MANY
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated(share: float, sound: Path, head: Path) -> None:
    whole = (sound / "head" / "model.safetensors").read_bytes()
    (head / "model.safetensors").write_bytes(whole[: math.floor(share * len(whole))])
    assert not read(head)


@MANY
@given(seed=st.integers(0, 2**32), bits=st.integers(1, 20))
def test_flipped_bits_in_the_header(seed: int, bits: int, sound: Path, head: Path) -> None:
    content, choose = bytearray((sound / "head" / "model.safetensors").read_bytes()), random.Random(seed)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(bits):
        content[choose.randrange(header)] ^= 1 << choose.randrange(8)
    (head / "model.safetensors").write_bytes(content)
    read(head)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, part in inner for place in places(part, (*path, key))]


@settings(MANY, max_examples=100)
@pytest.mark.parametrize("layout", ["head", "merged"])
@given(data=st.data())
def test_configs_with_something_else_somewhere(layout: str, data: st.DataObject, sound: Path, tmp_path: Path) -> None:
    head = Path(shutil.copytree(sound / layout, tmp_path / "any", dirs_exist_ok=True))
    config = json.loads((sound / layout / "config.json").read_text())
    *path, last = data.draw(st.sampled_from(places(config)))
    owner = config
    for key in path:
        owner = owner[key]
    if data.draw(st.booleans()) or not isinstance(owner, dict):
        owner[last] = data.draw(JSON)
    else:
        del owner[last]
    (head / "config.json").write_text(json.dumps(config))
    read(head)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64])
SIZES = st.lists(st.integers(0, 50), max_size=3)


@MANY
@given(data=st.data())
def test_tensors_missing_added_renamed_or_of_another_kind(data: st.DataObject, sound: Path, head: Path) -> None:
    """It is read if all are there, each in its shape, as floats; else one of them is named."""
    whole = load_file(sound / "head" / "model.safetensors")
    tensors, harmless = dict(whole), True
    for name in data.draw(st.lists(st.sampled_from(sorted(whole)), max_size=3, unique=True)):
        tensor = tensors.pop(name)
        if data.draw(st.booleans()):
            size, dtype = data.draw(SIZES | st.just(list(tensor.shape))), data.draw(DTYPES)
            tensors[name] = torch.zeros(size, dtype=dtype)
            harmless &= size == list(tensor.shape) and dtype.is_floating_point
        else:
            harmless = False
    for name in data.draw(st.lists(st.text(max_size=12).map("model.layers.0.{}_diff.weight".format), max_size=1)):
        tensors[name], harmless = torch.zeros(2), False
    save_file(tensors, head / "model.safetensors")
    assert read(head) == harmless


ELSEWHERE = (
    *("../base/model.safetensors", "../head/model.safetensors", "./model.safetensors", "/model.safetensors"),
    *(
        "a/../model.safetensors",
        "..",
        ".",
        "",
        "/",
        "\0.safetensors",
        "~/model.safetensors",
        "x" * 300 + ".safetensors",
    ),
)


@MANY
@given(file=st.sampled_from(ELSEWHERE) | st.text(max_size=12).map("{}.safetensors".format))
def test_an_index_leads_nowhere_else(file: str, sound: Path, head: Path) -> None:
    for named in (file, str(sound / "head" / file), f"{head.name}/{file}", f"../{head.name}/{file}"):
        index(named)(head)
        if read(head):
            assert named == "model.safetensors"
            assert set(open_head(head).files.values()) == {head / named}


class Payload:
    """What a pickle does when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model-diff.safetensors"])
@pytest.mark.parametrize("layout", ["head", "merged"])
def test_nothing_is_run(layout: str, file: str, sound: Path, tmp_path: Path) -> None:
    """Neither pickles nor a checkpoint's own Python."""
    head, mark = Path(shutil.copytree(sound / layout, tmp_path / "head")), tmp_path / "was run"
    pickled = pickle.dumps(Payload(mark))
    pickle.loads(pickled)
    mark.unlink()  # may raise: then the payload does nothing
    (head / file).unlink(missing_ok=True)
    (head / file).write_bytes(pickled)
    (head / "modeling_orthrus.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    change(auto_map={"AutoConfig": "modeling_orthrus.Any", "AutoModelForCausalLM": "modeling_orthrus.Any"})(head)
    read(head)
    for tool in tools(head, sound / "base", tmp_path / "out"):
        main(tool)
    assert not mark.exists()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda head: (head / name).write_bytes(content) and None


def change(**facts: Any) -> Callable[[Path], None]:
    def damage(head: Path) -> None:
        config = json.loads((head / "config.json").read_text())
        inner = config.get("transformer_layer_config", {})
        inner |= {name: facts.pop(name) for name in list(facts) if name in inner}
        (head / "config.json").write_text(json.dumps(config | facts))

    return damage


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(head: Path) -> None:
        tensors = load_file(head / "model.safetensors")
        save_file({name: change(tensor) for name, tensor in tensors.items()}, head / "model.safetensors")

    return damage


def index(file: str) -> Callable[[Path], None]:
    def damage(head: Path) -> None:
        names = load_file(head / "model.safetensors")
        listed = {"weight_map": dict.fromkeys(names, file)}
        (head / "model.safetensors.index.json").write_text(json.dumps(listed))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "config is empty": (write("config.json", b""), r"config\.json is not JSON"),
    "config is not UTF-8": (write("config.json", b"\xff\xfe{"), r"config\.json is not JSON"),
    "config is null": (write("config.json", b"null"), "holds NoneType, not a JSON object"),
    "config nests without end": (write("config.json", b"[" * 100_000), r"config\.json is not JSON"),
    "block size is text": (change(block_size="8"), "block_size='8', which must be a whole number"),
    "block size is half a row": (change(block_size=16.5), "block_size=16.5, which must be a whole number"),
    "block size is true": (change(block_size=True), "block_size=True"),
    "mask token is none": (change(mask_token_id=None), "mask_token_id=None"),
    "mask token is 3.5": (change(mask_token_id=3.5), r"mask_token_id=3\.5"),
    "no verifier": (change(speculators_config={}), "`speculators_config`, `verifier`"),
    "layers without end": (change(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "no hidden values": (change(hidden_size=0), "hidden_size=0, which must be a whole number"),
    "trailing bytes": (lambda head: _append(head / "model.safetensors"), r"model\.safetensors is damaged"),
    "whole numbers": (weights(lambda tensor: tensor.to(torch.int8)), "is stored as I8"),
    "complex numbers": (weights(lambda tensor: tensor.to(torch.complex64)), "is stored as C64"),
    "truths": (weights(lambda tensor: tensor.bool()), "is stored as BOOL"),
    "an index elsewhere": (index("../base/model.safetensors"), "are .safetensors files beside their index"),
    "an absolute index": (index("/etc/passwd"), "are .safetensors files beside their index"),
    "a pickle": (index("weights.bin"), "are .safetensors files beside their index"),
    "an index to a name too long": (index("x" * 300 + ".safetensors"), "cannot be read"),
    "an index to what is not there": (index("weights.safetensors"), r"has no weights\.safetensors"),
    "a pickle by another name": (write("model.safetensors", pickle.dumps([1])), r"model\.safetensors is damaged"),
    "an index of nothing": (write("model.safetensors.index.json", b"{}"), "no `weight_map`"),
}


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


def tools(head: Path, base: Path, out: Path) -> list[list[str]]:
    """Every tool that reads a head."""
    return [
        ["head", "inspect", str(head)],
        ["head", "verify", str(head), "--base", str(base)],
        ["head", "convert", str(head), str(out / "merged"), "--base", str(base)],
        ["head", "extract", str(head), str(out / "extracted"), "--base", "test/base"],
    ]


@pytest.mark.parametrize("damage", DAMAGE)
def test_refused_by_all(
    damage: str, sound: Path, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Serving and every tool say the same of it, and write nothing."""
    hurt, message = DAMAGE[damage]
    hurt(head)
    with pytest.raises(HeadError, match=message):
        open_head(head).check_complete()
    for tool in tools(head, sound / "base", tmp_path / "out"):
        assert main(tool) == 2, tool
        assert re.search(message, capsys.readouterr().err), tool
    assert not (tmp_path / "out").exists()


def test_tools_take_a_sound_head(sound: Path, head: Path, tmp_path: Path) -> None:
    for tool in tools(head, sound / "base", tmp_path / "out"):
        assert main(tool) == 0, tool


def some(value: float, names: str) -> Callable[[Path], None]:
    """One value everywhere in the tensors whose name has this in it."""

    def damage(head: Path) -> None:
        tensors = load_file(head / "model.safetensors")
        filled = {name: torch.full_like(tensor, value) for name, tensor in tensors.items() if names in name}
        save_file(tensors | filled, head / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "said", "useless"),
    [
        (some(math.nan, ""), "values that are not finite in 18 of its 18 tensors", True),
        (some(-math.inf, "1.self_attn.q_norm"), "values that are not finite in 1 of its 18 tensors", True),
        (some(0.0, ""), "nothing but zeros in 12 of its 18 tensors", True),
        (some(0.0, "1.self_attn.o_proj"), "nothing but zeros in 1 of its 18 tensors", False),
        (some(0.0, "norm"), "", False),
    ],
    ids=["NaN", "infinite", "zeros", "some zeros", "zeros where they may be"],
)
def test_nonsense_is_told(
    damage: Callable[[Path], None],
    said: str,
    useless: bool,
    sound: Path,
    head: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By its shapes such a head is complete."""
    damage(head)
    found = find_nonsense(open_head(head).tensors())
    assert found.drafts_nothing == useless
    for tool in tools(head, sound / "base", tmp_path / "out")[:2]:
        assert main(tool) == useless
        printed = capsys.readouterr().out
        assert said in printed and ("warning" in printed) == bool(said)


@pytest.mark.parametrize("configured", ["", ".", "somewhere"])
@pytest.mark.parametrize("home", ["home", "", None])
def test_settings_are_not_read_from_the_working_directory(
    configured: str, home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (".", "somewhere", ".config", "~/.config"):
        (tmp_path / folder / "vllm-orthrus").mkdir(parents=True)
        (tmp_path / folder / "vllm-orthrus" / "heads.json").write_text('{"some/base": "somebody/elses-head"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", configured)
    monkeypatch.setenv("HOME", "")
    if home is None:  # a user of a container that nobody has heard of
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.getuid", lambda: 2**31)
    elif home:
        monkeypatch.setenv("HOME", str(tmp_path / home))
    assert resolve_head("some/base") is None


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"", b"[" * 100_000, b'{"some/base": 1}', b"null"])
def test_damaged_head_map(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heads.json").write_bytes(content)
    monkeypatch.setenv("VLLM_ORTHRUS_HEADS", str(tmp_path / "heads.json"))
    with pytest.raises(HeadError, match=r"heads\.json (is not JSON|must map base names)"):
        resolve_head("some/base")


@pytest.mark.parametrize(
    "damage",
    [
        write("config.json", b"{"),
        write("config.json", b"\xff\xfe{"),
        write("config.json", b"null"),
        change(model_type=["qwen3"]),
        change(rope_parameters=5),
        change(num_hidden_layers=10**9),
        change(layer_types=["full_attention"] * 7),
    ],
)
def test_damaged_base(
    damage: Callable[[Path], None], sound: Path, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(sound / "base", tmp_path / "base"))
    damage(base)
    with pytest.raises(HeadError):
        read_base_config(base)
    assert main(["head", "verify", str(head), "--base", str(base)]) == 2
    assert capsys.readouterr().err.startswith("vllm-orthrus head: ")


def test_damaged_weights_of_a_base(sound: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(sound / "base", tmp_path / "base"))
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(HeadError, match="cannot be loaded"):
        load_base(base, torch.float32)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for missing in (lambda: read_config(tmp_path), lambda: read_tensors(tmp_path / "model.safetensors")):
        with pytest.raises(HeadError, match="cannot be read"):
            missing()
