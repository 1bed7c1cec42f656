"""Whatever is done to a head's files: it is read, or refused in words of ours. Nothing else happens."""

from __future__ import annotations

import json
import math
import random
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
from vllm_orthrus.heads import HeadConfig, HeadError, open_head, resolve_head, save_head
from vllm_orthrus.heads.convert import extract_head, merge_head

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


@settings(MANY, max_examples=200)
@given(data=st.data())
def test_configs_with_something_else_somewhere(data: st.DataObject, sound: Path, head: Path) -> None:
    config = json.loads((sound / "head" / "config.json").read_text())
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


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda head: (head / name).write_bytes(content) and None


def change(**facts: Any) -> Callable[[Path], None]:
    def damage(head: Path) -> None:
        config = json.loads((head / "config.json").read_text())
        base = {name: facts.pop(name) for name in list(facts) if name in config["transformer_layer_config"]}
        config["transformer_layer_config"] |= base
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
    "truths": (weights(lambda tensor: tensor.bool()), "is stored as BOOL"),
    "an index elsewhere": (index("../base/model.safetensors"), "are .safetensors files beside their index"),
    "an absolute index": (index("/etc/passwd"), "are .safetensors files beside their index"),
    "a pickle": (index("weights.bin"), "are .safetensors files beside their index"),
    "an index of nothing": (write("model.safetensors.index.json", b"{}"), "no `weight_map`"),
}


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


@pytest.mark.parametrize("damage", DAMAGE)
def test_refused_by_all(damage: str, sound: Path, head: Path, tmp_path: Path) -> None:
    """Serving, conversion and extraction say the same of it."""
    hurt, message = DAMAGE[damage]
    hurt(head)
    with pytest.raises(HeadError, match=message):
        open_head(head).check_complete()
    with pytest.raises(HeadError, match=message):
        merge_head(open_head(head), sound / "base", tmp_path / "merged")
    with pytest.raises(HeadError, match=message):
        extract_head(open_head(head), tmp_path / "extracted", "test/base", None)


def test_settings_are_not_read_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm-orthrus").mkdir()
    (tmp_path / "vllm-orthrus" / "heads.json").write_text('{"some/base": "somebody/elses-head"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_head("some/base") is None
