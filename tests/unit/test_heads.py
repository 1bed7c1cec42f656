"""Heads on disk: names, shapes, layouts, refusals, and where a head is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, Qwen2Config, Qwen3Config

from tests.unit.conftest import SHAPES, make_base, make_head
from vllm_orthrus.heads import (
    BaseShape,
    HeadConfig,
    HeadError,
    base_fingerprint,
    expected_tensors,
    open_head,
    read_head_config,
    resolve_head,
    save_head,
    tensor_name,
    tensor_place,
)
from vllm_orthrus.heads.convert import HEAD_SHARD, extract_head, merge_head

QWEN3_8B = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36, "hidden_size": 4096,
    "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip


def saved(tmp_path: Path, shape: str = "qwen3") -> tuple[Path, Path]:
    base = make_base(shape)
    base.save_pretrained(tmp_path / "base")
    config = HeadConfig.for_base(base.config.to_dict(), 8, 127, "test/base", "v1")
    save_head(tmp_path / "head", make_head(base, 0.1).published(), config)
    return tmp_path / "base", tmp_path / "head"


def test_the_published_8b_head_has_the_published_size() -> None:
    tensors = expected_tensors(BaseShape.from_config(QWEN3_8B))
    assert len(tensors) == 36 * 6
    assert tensors["model.layers.35.self_attn.q_proj_diff.weight"] == (4096, 4096)
    assert tensors["model.layers.0.self_attn.k_norm_diff.weight"] == (128,)
    parameters = sum(torch.Size(size).numel() for size in tensors.values())
    assert 2 * parameters / 1e9 == pytest.approx(3.0, abs=0.05), "3.0 GB in bf16"


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_tensors_are_what_a_head_has(shape: str) -> None:
    base = make_base(shape)
    found = {name: tuple(tensor.shape) for name, tensor in make_head(base).published().items()}
    assert found == expected_tensors(BaseShape.from_config(base.config))


def test_every_name_leads_back_to_its_place() -> None:
    for shape in SHAPES:
        for name in expected_tensors(BaseShape.from_config(make_base(shape).config)):
            assert tensor_name(*tensor_place(name)) == name
    for wrong in (
        "layers.0.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_diff.weight",
    ):
        with pytest.raises(HeadError, match=f"'{wrong}' is not the name of a head's tensor"):
            tensor_place(wrong)


def test_fingerprint_is_of_the_config_however_it_is_written() -> None:
    modern = Qwen3Config(**{key: value for key, value in QWEN3_8B.items() if not key.startswith("rope_")})
    modern.rope_parameters = {"rope_type": "default", "rope_theta": 1000000}
    assert base_fingerprint(QWEN3_8B) == base_fingerprint(modern) == base_fingerprint(modern.to_dict())
    for change in ({"rope_theta": 10000}, {"hidden_size": 2048}, {"rms_norm_eps": 1e-5}):
        assert base_fingerprint({**QWEN3_8B, **change}) != base_fingerprint(QWEN3_8B)


@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_open(tmp_path: Path, shape: str) -> None:
    base, head = saved(tmp_path, shape)
    opened = open_head(head)
    opened.check_complete()
    assert opened.layout == "head-only"
    weights, config = ((head / name).stat().st_mode for name in ("model.safetensors", "config.json"))
    assert weights == config, "a server that runs as another user must be able to read the weights"
    assert opened.config.base.name == "test/base" and opened.config.base.revision == "v1"
    assert (opened.config.block_size, opened.config.mask_token_id, opened.config.num_drafts) == (8, 127, 7)
    assert opened.config.check_fits(json.loads((base / "config.json").read_text()), "base") == []
    for name, tensor in opened.tensors():
        assert torch.equal(tensor, load_file(head / "model.safetensors")[name])


def test_config_json_follows_the_speculators_convention(tmp_path: Path) -> None:
    _, head = saved(tmp_path)
    config = json.loads((head / "config.json").read_text())
    assert config["speculators_model_type"] == "orthrus"
    assert config["block_size"] == 8 and config["mask_token_id"] == 127
    verifier = config["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == "test/base" and verifier["architectures"] == ["Qwen3ForCausalLM"]
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    assert config["transformer_layer_config"]["model_type"] == "qwen3"


def test_merged_and_head_only_convert_into_each_other(tmp_path: Path) -> None:
    base, head = saved(tmp_path)
    merge_head(open_head(head), base, tmp_path / "merged")
    merged = open_head(tmp_path / "merged")
    assert merged.layout == "merged" and set(merged.files.values()) == {tmp_path / "merged" / HEAD_SHARD}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["OrthrusLM"] and config["model_type"] == "qwen3"
    extract_head(merged, tmp_path / "again", "test/base", "v1")
    again, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", head))
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["speculators_config"]
        == json.loads((head / "config.json").read_text())["speculators_config"]
    )


def test_only_shards_with_head_tensors_are_opened(tmp_path: Path) -> None:
    """A base shard that cannot be parsed must not matter."""
    base, head = saved(tmp_path)
    merge_head(open_head(head), base, tmp_path / "merged")
    (tmp_path / "merged" / "model.safetensors").unlink()
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"not a safetensors file")
    merged = open_head(tmp_path / "merged")
    merged.check_complete()
    assert len(dict(merged.tensors())) == len(merged.files)


def test_a_repository_gives_up_only_what_holds_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, head = saved(tmp_path)
    merge_head(open_head(head), base, tmp_path / "merged")
    asked: list[str] = []

    def download(repository: str, name: str, **_: object) -> str:
        asked.append(name)
        return str(tmp_path / "merged" / name)

    monkeypatch.setattr("vllm_orthrus.heads.files.hf_hub_download", download)
    opened = open_head("some/repository")
    assert asked == ["config.json", "model.safetensors.index.json", HEAD_SHARD]
    assert opened.layout == "merged"


def test_a_published_head_knows_its_base(tmp_path: Path) -> None:
    config = HeadConfig.from_json(
        {**QWEN3_8B, "architectures": ["OrthrusLM"], "block_size": 32, "mask_token_id": 151669, "auto_map": {}},
        "chiennv/Orthrus-Qwen3-8B",
    )
    assert config.base.name == "Qwen/Qwen3-8B" and config.num_drafts == 31
    assert config.check_fits(QWEN3_8B, "Qwen/Qwen3-8B") == []
    assert config.base_config["architectures"] == ["Qwen3ForCausalLM"]


# Refusals


def test_head_that_does_not_fit_names_what_differs() -> None:
    config = HeadConfig.for_base(QWEN3_8B, 32, 151669, "Qwen/Qwen3-8B")
    with pytest.raises(HeadError, match=r"does not fit other/model: num_layers \(head 36, base 28\); hidden_size"):
        config.check_fits({**QWEN3_8B, "num_hidden_layers": 28, "hidden_size": 2048}, "other/model")


def test_differing_rope_is_a_warning_not_a_refusal() -> None:
    config = HeadConfig.for_base(QWEN3_8B, 32, 151669, "Qwen/Qwen3-8B")
    warnings = config.check_fits({**QWEN3_8B, "rope_theta": 5e6}, "Qwen/long")
    assert len(warnings) == 1 and "rotary" in warnings[0]


def test_incomplete_head_is_refused(tmp_path: Path) -> None:
    _, head = saved(tmp_path)
    tensors = load_file(head / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_proj_diff.weight"]
    tensors["model.layers.0.self_attn.q_norm_diff.weight"] = torch.zeros(5)
    save_file(tensors, head / "model.safetensors")
    with pytest.raises(
        HeadError, match=r"layers\.1\.self_attn\.v_proj_diff\.weight is missing; .*is \(5,\), not \(24,\)"
    ):
        open_head(head).check_complete()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(sliding_window=4096), r"sliding_window=4096"),
        (Qwen2Config(use_sliding_window=True, sliding_window=1024, max_window_layers=0), r"sliding_window=1024"),
        ({**QWEN3_8B, "layer_types": ["full_attention", "sliding_attention"]}, r"sliding_attention"),
        ({**QWEN3_8B, "model_type": "qwen3_moe"}, r"model_type='qwen3_moe' is not supported"),
    ],
)
def test_bases_that_cannot_work_are_refused(config: object, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        BaseShape.from_config(config)


def test_bad_heads_are_refused(tmp_path: Path) -> None:
    base, _ = saved(tmp_path)
    with pytest.raises(HeadError, match="holds no `_diff` tensors"):
        open_head(base)
    with pytest.raises(HeadError, match=r"has no config\.json"):
        (tmp_path / "empty").mkdir()
        open_head(tmp_path / "empty")
    with pytest.raises(HeadError, match="mask_token_id=151936 has no embedding row"):
        HeadConfig.for_base(QWEN3_8B, 32, 151936, None)
    with pytest.raises(HeadError, match="block_size=0"):
        HeadConfig.for_base(QWEN3_8B, 0, 5, None)
    with pytest.raises(HeadError, match="the base my/base is not a folder here"):
        merge_head(open_head(saved(tmp_path / "y")[1]), Path("my/base"), tmp_path / "nowhere")
    with pytest.raises(HeadError, match="Name it with --base"):
        base, head = saved(tmp_path / "x")
        merge_head(open_head(head), base, tmp_path / "merged")
        extract_head(open_head(tmp_path / "merged"), tmp_path / "again", None, None)


def test_unreachable_repository_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("nobody/nothing", "not a name", "x" * 5000, "\0", "\ud800", ""):
        with pytest.raises(HeadError, match="neither a folder here nor a repository that can be reached"):
            open_head(source)


# Commits


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache in which the branch of a published head has moved from "a..." to "b...", on no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base, head = saved(tmp_path)
    repository = tmp_path / "cache" / "models--some--head"
    for commit, block in (("a" * 40, 8), ("b" * 40, 4)):
        merge_head(open_head(head), base, tmp_path / commit)
        config = json.loads((tmp_path / commit / "config.json").read_text()) | {"block_size": block}
        (tmp_path / commit / "config.json").write_text(json.dumps(config))
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / commit).mkdir(parents=True)
        for file in (tmp_path / commit).iterdir():
            blob = file.rename(repository / "blobs" / f"{commit[0]}-{file.name}")
            (repository / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")
    move_branch(tmp_path / "cache", "a")
    return tmp_path / "cache"


def move_branch(cache: Path, commit: str) -> None:
    refs = cache / "models--some--head" / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(commit * 40)


def test_a_commit_is_opened_as_it_was(cached: Path) -> None:
    """Whoever opens a head first resolves its branch, and says to others which commit it was."""
    first = open_head("some/head", cache_dir=cached)
    first.check_complete()
    assert (first.revision, first.config.block_size) == ("a" * 40, 8)
    move_branch(cached, "b")
    again = open_head("some/head", first.revision, cached)
    assert (again.revision, again.config.block_size, again.files) == (first.revision, 8, first.files)
    later, revision = read_head_config("some/head", cache_dir=cached)
    assert (revision, later.block_size) == ("b" * 40, 4)


def test_a_branch_that_moves_while_it_is_read(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_orthrus.heads import files

    download = files.hf_hub_download

    def download_and_move(*asked: object, **named: object) -> str:
        found = download(*asked, **named)
        move_branch(cached, "b")
        return str(found)

    monkeypatch.setattr(files, "hf_hub_download", download_and_move)
    head = open_head("some/head", cache_dir=cached)
    assert head.revision == "a" * 40
    assert {path.parent.name for path in head.files.values()} == {"a" * 40}


@pytest.mark.parametrize("noted", [True, False])
def test_a_cache_without_an_index(noted: bool, cached: Path) -> None:
    """Off the network: a download notes what the repository hasn't, `hf download` doesn't. One file needs no index."""
    repository = cached / "models--some--head"
    files = repository / "snapshots" / ("a" * 40)
    (files / "model.safetensors.index.json").unlink()
    (files / HEAD_SHARD).rename(files / "model.safetensors")
    if noted:
        (repository / ".no_exist" / ("a" * 40)).mkdir(parents=True)
        (repository / ".no_exist" / ("a" * 40) / "model.safetensors.index.json").touch()
    open_head("some/head", cache_dir=cached).check_complete()
    (files / "model.safetensors").unlink()
    with pytest.raises(HeadError, match="neither a folder here nor a repository"):
        open_head("some/head", cache_dir=cached)


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    _, head = saved(tmp_path)
    with pytest.raises(HeadError, match=r"revision='v1' was given for .*, which is a folder here"):
        open_head(head, "v1")


def test_links_of_a_folder_are_followed(tmp_path: Path) -> None:
    """They are its owner's; what an index may name is another matter."""
    _, head = saved(tmp_path)
    (head / "model.safetensors").rename(tmp_path / "elsewhere")
    (head / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    open_head(head).check_complete()


# Finding a head


def test_builtin_map_and_user_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ORTHRUS_HEADS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert resolve_head("Qwen/Qwen3-8B") == "chiennv/Orthrus-Qwen3-8B"
    assert resolve_head("my/base") is None
    (tmp_path / "vllm-orthrus").mkdir()
    (tmp_path / "vllm-orthrus" / "heads.json").write_text('{"my/base": "my/head", "Qwen/Qwen3-8B": "my/better"}')
    assert resolve_head("my/base") == "my/head" and resolve_head("Qwen/Qwen3-8B") == "my/better"
    monkeypatch.setenv("VLLM_ORTHRUS_HEADS", str(tmp_path / "missing.json"))
    with pytest.raises(HeadError, match="names no file"):
        resolve_head("my/base")
    (tmp_path / "missing.json").write_text("[1]")
    with pytest.raises(HeadError, match="must map base names"):
        resolve_head("my/base")


def test_a_merged_checkpoint_is_its_own_head(tmp_path: Path) -> None:
    base, head = saved(tmp_path)
    assert resolve_head(str(base)) is None
    merge_head(open_head(head), base, tmp_path / "merged")
    assert resolve_head(str(tmp_path / "merged")) == str(tmp_path / "merged")
