"""What is served, on which base, and how many values of it a GPU holds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import soka_serve
from soka_serve.adapter.format import write_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.modules import modules_from_config
from soka_serve.builtin import base_directory
from soka_serve.errors import SokaError
from soka_serve.io import workspace
from soka_serve.io.files import sha256_file
from soka_serve.io.json_files import read_json
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape, balanced_shape
from soka_serve.kron.sharding import Heads, LayerShards, column_parallel, cut, qkv_parallel, row_parallel
from soka_serve.serving import command as serving_command
from soka_serve.serving import doctor
from soka_serve.serving import targets as serving_targets
from soka_serve.serving.command import ServeOptions
from soka_serve.serving.serve import plan_launch
from soka_serve.serving.slots import slot_values
from tests.support.builds import write_manifest
from tests.support.launches import options_of, refused, run_serve, write_small_adapter


def test_what_is_not_built_or_out_of_date(tmp_path: Path, built: Path) -> None:
    manifest = write_manifest(tmp_path, steps=2)
    said = refused(manifest, "--out", tmp_path / "build")
    assert "not built" in said
    assert f"soka-serve build {manifest} --out {tmp_path / 'build'}" in said

    shutil.copytree(built / "build", tmp_path / "build")
    assert run_serve(manifest, "--out", tmp_path / "build", "--dry-run").exit_code == 0
    write_manifest(tmp_path, steps=3)
    said = refused(manifest, "--out", tmp_path / "build")
    assert "earlier manifest" in said
    assert "soka-serve build" in said

    write_manifest(tmp_path, steps=2)
    weights = tmp_path / "build/small/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = refused(manifest, "--out", tmp_path / "build")
    assert "adapter_model.safetensors" in said
    assert "--force" in said


def test_a_base_that_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build, move the base, serve: the build is up to date; building again relabels it and trains nothing."""
    base = shutil.copytree(base_directory(), tmp_path / "base")
    manifest = write_manifest(tmp_path, steps=1, replace=('builtin = "tiny"', 'path = "base"'))
    soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    base.rename(tmp_path / "moved")
    manifest.write_text(manifest.read_text().replace('path = "base"', 'path = "moved"'))
    done = run_serve(manifest, "--out", tmp_path / "build", "--dry-run")
    assert done.exit_code == 0, done.output
    assert f"vllm_command {(tmp_path / 'moved').resolve()}" in done.output
    with monkeypatch.context() as patch:  # a base too large to be hashed for a look
        patch.setattr("soka_serve.compiler.status._QUICK_BYTES", 0)
        patch.setattr("soka_serve.io.workspace.HashCache.knows", lambda *a: False)
        assert run_serve(manifest, "--out", tmp_path / "build", "--dry-run").exit_code == 0

    weights = sha256_file(tmp_path / "build/small/adapter/adapter_model.safetensors")
    again = soka_serve.build(manifest, out=tmp_path / "build", progress=False)
    assert again.ran == ("report",)
    adapter = tmp_path / "build/small/adapter"
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == str((tmp_path / "moved").resolve())
    assert sha256_file(adapter / "adapter_model.safetensors") == weights

    other = Checkpoint.open(tmp_path / "moved").files[0]
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    (tmp_path / "moved").rename(tmp_path / "third")
    manifest.write_text(manifest.read_text().replace('path = "moved"', 'path = "third"'))
    said = refused(manifest, "--out", tmp_path / "build")
    assert "is of other weights of the base" in said
    assert "earlier manifest" not in said
    for place in ("moved", "third"):
        assert str((tmp_path / place).resolve()) in said


def test_everything_that_is_wrong_is_said_at_once(built: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "ia3").mkdir()
    (tmp_path / "ia3/adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    said = refused("nowhere", tmp_path / "empty", tmp_path / "ia3", "nowhere.toml")
    for word in ("nowhere: no such", "neither an adapter", "IA3", "nowhere.toml"):
        assert word in said
    assert "Traceback" not in said


def test_names(built: Path) -> None:
    build = built / "build/small"
    assert "would all be served as 'small'" in refused(built / "small.toml", build, "--out", built / "build")
    assert "its name is the base's" in refused(f"tiny={build}")
    assert "cannot name" in refused(f"a,b={build}")
    assert "NAME=TARGET" in refused("=x")
    assert "served alone" in refused(f"a={build}", build / "merged")
    assert "nothing to serve" in refused()


def test_modules_that_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    names = [f"base_model.model.lm_head.lora_{part}.weight" for part in "AB"]
    save_file({name: torch.ones(1, 1) for name in names}, tmp_path / "lora/adapter_model.safetensors")
    assert "lm_head" in refused(tmp_path / "lora")


@pytest.mark.parametrize("module", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
def test_fused_projections_can_be_served(tmp_path: Path, module: str) -> None:
    (target,) = serving_targets.read_targets(
        [str(write_small_adapter(tmp_path / "a", module=f"model.layers.0.{module}"))]
    )
    assert list(target.factors) == [f"model.layers.0.{module}"]


def test_a_bare_model_is_no_base_to_serve(tmp_path: Path) -> None:
    """Transformers adds the names' 'model.' and ties the head; vLLM would serve an embedder, or stop while loading."""
    base = tmp_path / "base"
    shutil.copytree(base_directory(), base)
    config = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    adapter = write_small_adapter(tmp_path / "adapter", base=str(base))
    for target in (adapter, base):
        assert "a bare model (architectures = ['LlamaModel'] in its config.json)" in refused(target)
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, base / "model.safetensors")
    for target in (adapter, base):
        assert "a bare model (with tensors such as 'layers.0." in refused(target)


def test_one_base(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Checkpoint.open(base_directory()).sha256()
    moved = tmp_path / "moved"
    shutil.copytree(base_directory(), moved)
    # The same weights under another name are the same base; a name that is not here is passed over.
    for base in (str(moved), str(tmp_path / "gone")):
        other = write_small_adapter(tmp_path / "other", base=base, sha256=right)
        assert len(plan_launch([str(built / "build/small"), str(other)], ServeOptions())[0]) == 2
    with pytest.raises(SokaError, match="is not here"):
        plan_launch([str(other)], ServeOptions())
    assert plan_launch([str(other)], ServeOptions(), base="tiny")

    wrong = write_small_adapter(tmp_path / "wrong", sha256="0" * 64)
    with pytest.raises(SokaError, match="other than needed"):
        plan_launch([str(wrong)], ServeOptions())
    monkeypatch.setenv("SOKA_ALLOW_OTHER_BASE", "1")
    assert plan_launch([str(wrong)], ServeOptions())
    without = write_small_adapter(tmp_path / "without", base=str(moved))
    with pytest.raises(SokaError, match="different bases"):
        plan_launch([str(built / "build/small"), str(without)], ServeOptions())
    unfit = write_small_adapter(tmp_path / "unfit", module="model.layers.99.self_attn.q_proj")
    with pytest.raises(SokaError, match=r"layers\.99"):
        plan_launch([str(unfit)], ServeOptions())


def test_what_a_build_has_hashed_is_not_hashed_again(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The operator has named the build; but not where others could have written, and not what is malformed."""
    build = shutil.copytree(built / "build", tmp_path / "build")
    hashes, cache = build / ".cache" / "hashes.json", tmp_path / "cache" / "soka-serve" / "hashes.json"
    known = json.loads(hashes.read_text())
    hashed: list[str] = []
    monkeypatch.setattr(workspace, "sha256_file", lambda path: hashed.append(str(path)) or sha256_file(path))
    plan_launch([str(build / "small")], ServeOptions())
    assert hashed == []
    weights = str((base_directory() / "model.safetensors").resolve())
    assert json.loads(cache.read_text())[weights] == known[weights]
    for folder in (hashes, hashes.parent, build):
        cache.unlink()
        before = folder.stat().st_mode
        folder.chmod(0o777)
        plan_launch([str(build / "small")], ServeOptions())
        folder.chmod(before)
        assert hashed == [weights]
        hashed.clear()
    cache.unlink()
    hashes.unlink()
    os.mkfifo(hashes)
    (build / "small" / "check.json").unlink(missing_ok=True)
    os.mkfifo(build / "small" / "check.json")
    plan_launch([str(build / "small")], ServeOptions())
    assert hashed == [weights]


def test_a_base_whose_hub_id_stands_for_another_tokenizer_class(tmp_path: Path) -> None:
    """vLLM is told where the tokenizer is that the adapter was trained with, also where --base gives a directory."""
    base = shutil.copytree(base_directory(), tmp_path / "base")
    settings = read_json(base / "tokenizer_config.json") | {"tokenizer_class": "LlamaTokenizerFast"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for hub, told in (("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", True), ("someone/else", False)):
        adapter = write_small_adapter(tmp_path / hub / "adapter", base=hub)
        launch = plan_launch([str(adapter)], ServeOptions(), base=str(base))[1]
        options = options_of(launch)
        assert launch.command[3] == str(base.resolve())
        assert ("--tokenizer" in options) == told
        if told:
            made = read_json(Path(options["--tokenizer"][0]) / "tokenizer_config.json")
            assert made == settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
            own = ServeOptions(vllm=("--tokenizer", "x"))
            assert options_of(plan_launch([str(adapter)], own, base=str(base))[1])["--tokenizer"] == ["x"]


# --- how many values of an adapter a GPU holds, and what the server is told of it -------------------------------------


# By layer of the embedded base as vLLM packs them: factor shapes that 2 ranks cannot share out evenly, nor 4.
LAYERS = [
    {"self_attn.q_proj": (8, 16, 16, 8), "self_attn.k_proj": (4, 128, 16, 1), "self_attn.v_proj": (64, 128, 1, 1)},
    {"mlp.gate_proj": (11, 8, 32, 16), "mlp.up_proj": (176, 128, 2, 1)},
    {"self_attn.o_proj": (128, 1, 1, 128)},
    {"mlp.down_proj": (8, 11, 16, 32)},
]


def _on_ranks(ranks: int) -> list[int]:
    """Values of one term of LAYERS that each rank holds, by the plugin's cuts of tensors."""

    def layers(rank: int) -> list[LayerShards]:
        return [
            qkv_parallel(Heads(4, 2, 32), 128, rank, ranks),
            column_parallel([352, 352], 128, rank, ranks),
            row_parallel(128, 128, rank, ranks),
            row_parallel(128, 352, rank, ranks),
        ]

    found = []
    for rank in range(ranks):
        values = 0
        for layer, modules in zip(layers(rank), LAYERS, strict=True):
            shapes = list(modules.values())
            for part in layer.slices:
                m, n, p, q = shapes[part.source]
                small = cut(torch.zeros(1, m, n), torch.zeros(1, p, q), part.rows, part.columns)
                values += small.left.numel() + small.right.numel()
        found.append(values)
    return found


@pytest.mark.parametrize(
    ("vllm", "ranks"),
    [
        ((), 1),
        (("--tensor-parallel-size", "1"), 1),
        (("--tensor_parallel_size=2",), 2),
        (("-tp", "4", "--pipeline-parallel-size", "2"), 4),  # more than there are key/value heads
        (("-tp", "4", "--tensor-parallel-size", "2"), 1),  # vLLM takes the last one; the whole adapter fits anyway
    ],
)
def test_slots_hold_what_the_fullest_gpu_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm: tuple[str, ...], ranks: int
) -> None:
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.InstalledVllm("vllm", "0.32.0", False))
    factors = {
        f"model.layers.{i}.{name}": Factors(torch.ones(3, m, n), torch.ones(3, p, q), torch.ones(3))
        for i in (0, 2)
        for modules in LAYERS
        for name, (m, n, p, q) in modules.items()
    }
    write_adapter(tmp_path / "large", factors, base_model=str(base_directory()))
    given = [str(write_small_adapter(tmp_path / "small")), str(tmp_path / "large")]
    values = _on_ranks(ranks)
    _, launch = plan_launch(given, ServeOptions(vllm=vllm))
    assert launch.environment["SOKA_SLOT_PARAMETERS"] == str(3 * 2 * max(values))
    assert (max(values) > values[0]) == (ranks == 4)


def test_a_tensor_parallel_size_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.InstalledVllm("vllm", "0.32.0", False))
    with pytest.raises(SokaError, match="--tensor-parallel-size two: expected a number"):
        plan_launch([str(write_small_adapter(tmp_path / "a"))], ServeOptions(vllm=("--tensor-parallel-size", "two")))


@pytest.mark.parametrize(("ranks", "values"), [(1, 10_977_280), (2, 8_192_000), (4, 6_799_360), (8, 6_103_040)])
def test_slots_of_a_70b(ranks: int, values: int) -> None:
    """What vLLM's own layers allocate for one term on each projection, from eval/results/fleet.json."""
    config = read_json(base_directory().parent / "configs/meta-llama--Llama-2-70b-hf/config.json")
    modules = modules_from_config(config)
    factors = {module.name: (1, balanced_shape(module.out_features, module.in_features)) for module in modules}
    assert slot_values(factors, ranks, config["num_key_value_heads"]) == values


def test_what_may_not_be_cut_counts_as_whole() -> None:
    """Shared experts always; k and v where the number of heads is not known, or there are fewer than ranks."""
    shape = FactorShape(8, 8, 8, 8)
    shared, key = ({f"model.layers.0.{name}": (2, shape)} for name in ("mlp.shared_expert.up_proj", "self_attn.k_proj"))
    whole = 2 * (64 + 64)
    assert slot_values(shared, 4, 8) == whole
    assert slot_values({"model.layers.0.mlp.up_proj": (2, shape)}, 4, 8) == 2 * (2 * 8 + 64)
    assert slot_values(key, 4, None) == slot_values(key, 4, 1) == whole
    assert slot_values(key, 4, 2) == 2 * (4 * 8 + 64)
    assert slot_values(key, 4, 8) == 2 * (2 * 8 + 64)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_projections_take_a_slot_for_each_part(ranks: int) -> None:
    """As the plugin cuts them: the parts of Left's rows, each with a Right of its own."""
    shape = FactorShape(16, 8, 8, 8)  # 128 rows: 8 heads and 4 key/value heads of 8, or gate and up of 64
    qkv = {"model.layers.0.self_attn.qkv_proj": (2, shape)}
    both = {"model.layers.0.mlp.gate_up_proj": (2, shape)}
    for factors, layer in (
        (qkv, qkv_parallel(Heads(8, 4, 8), 64, 0, ranks, fused=True)),
        (both, column_parallel([64, 64], 64, 0, ranks, fused=True)),
    ):
        left, right = torch.zeros(2, 16, 8), torch.zeros(2, 8, 8)
        cuts = [cut(left, right, part.rows, part.columns) for part in layer.slices]
        assert slot_values(factors, ranks, 4, 8) == sum(c.left.numel() + c.right.numel() for c in cuts)
    assert slot_values(qkv, ranks, 4) == 3 * 2 * (16 * 8 + 64)
