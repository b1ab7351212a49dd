"""What a merged directory holds, and which folders a merge replaces."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from soka_serve.adapter import source as adapter_source
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.compiler.merge import merge as merging
from soka_serve.compiler.merge.merge import merge
from soka_serve.errors import BuildError
from soka_serve.io import files
from soka_serve.io.lockfile import read_lock, write_lock
from tests.support.tiny_models import all_factors, random_factors, write_base, write_test_adapter
from tests.support.tiny_models import merge_quietly as run

Q = "model.layers.0.self_attn.q_proj"


def test_what_a_merged_directory_holds(
    tmp_path: Path, base: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strays = [base / name for name in ("pytorch_model.bin", "optimizer.pt", "modeling_custom.py", "notes.parquet")]
    for stray in strays:
        stray.write_text("x")
    try:
        with caplog.at_level(logging.INFO):
            result = merge(adapter, base=base, out=tmp_path / "out", verify="tensors", progress=False)
    finally:
        for stray in strays:
            stray.unlink()
    assert "not copied from the base: modeling_custom.py, notes.parquet, optimizer.pt, pytorch_model.bin" in caplog.text
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in base.iterdir()} | {"soka.lock", "README.md"}
    assert "generation_config.json" in names
    for name in names - {"soka.lock", "README.md"}:
        if not name.endswith(".safetensors") and "index" not in name:
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    opened = Checkpoint.open(tmp_path / "out")
    original = Checkpoint.open(base)
    assert len(opened.files) > 2
    assert [(t.name, t.dtype, t.shape, t.start) for t in opened.tensors.values()] == [
        (t.name, t.dtype, t.shape, t.start) for t in original.tensors.values()
    ]
    lock = read_lock(tmp_path / "out" / "soka.lock")
    assert lock["base"]["sha256"] == original.sha256()
    assert lock["adapters"]["adapter0"]["modules"] == len(all_factors())
    for name in ("soka.lock", "README.md"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    assert result.modules == 14
    assert result.tensors == len(original.tensors)
    assert result.bytes_written == sum(f.stat().st_size for f in opened.files)
    assert "verified    weights within 0." in result.to_text()


def test_the_same_adapter_twice_is_listed_twice(tmp_path: Path, base: Path, adapter: Path) -> None:
    merge([(adapter, 0.5), (adapter, 0.25)], base=base, out=tmp_path / "out", progress=False)
    listed = read_lock(tmp_path / "out" / "soka.lock")["adapters"]
    assert [entry["weight"] for entry in listed.values()] == [0.5, 0.25]


def test_merge_again_gives_the_same_bytes(tmp_path: Path, base: Path, adapter: Path) -> None:
    run(adapter, base, tmp_path / "out")
    before = Checkpoint.open(tmp_path / "out").sha256()
    run(adapter, base, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").sha256() == before != Checkpoint.open(base).sha256()


def test_single_file_without_index(tmp_path: Path, adapter: Path) -> None:
    base = write_base(tmp_path / "one", shard="1GB")
    run(adapter, base, tmp_path / "out", allow_other_base=True)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_untied_head(tmp_path: Path, base: Path) -> None:
    adapter = write_test_adapter(tmp_path / "adapter", {"lm_head": random_factors(96, 64, 1, 0)})
    result = merge(adapter, base=base, out=tmp_path / "out", verify="tensors", progress=False)
    assert result.modules == 1


def test_torch_threads_are_put_back(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = torch.get_num_threads()
    run(adapter, base, tmp_path / "out")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("metadata", ["null", "[]", "absent"])
def test_an_index_without_metadata(tmp_path: Path, metadata: str, caplog: pytest.LogCaptureFixture) -> None:
    """Merged all the same, with an index that transformers reads."""
    base = write_base(tmp_path / "base")
    adapter = write_test_adapter(tmp_path / "adapter", base=base)
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["metadata"]
    index.write_text(json.dumps(content | ({} if metadata == "absent" else {"metadata": json.loads(metadata)})))
    with caplog.at_level(logging.INFO):
        result = merge(adapter, base=base, out=tmp_path / "out", progress=False)
    assert result.verified == ("tensors",)
    assert "which transformers needs" in caplog.text
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_index_of_more_and_less_than_there_is(tmp_path: Path) -> None:
    """Tied heads and buffers that no shard holds, a wrong shard, a tensor that is not named: the new index is right."""
    base = write_base(tmp_path / "base", tied=True)
    index = base / "model.safetensors.index.json"
    right = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(right.values()))
    wrong = {"lm_head.weight": shards[0], "model.layers.0.self_attn.rotary_emb.inv_freq": shards[0], **right}
    wrong[f"{Q}.weight"] = next(shard for shard in shards if shard != right[f"{Q}.weight"])
    del wrong["model.norm.weight"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": wrong}))
    loaded, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"]
    result = merge(write_test_adapter(tmp_path / "adapter"), base=base, out=tmp_path / "out", progress=False)
    assert result.verified == ("tensors", "logits")
    out = tmp_path / "out"
    written = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert written == right
    assert all(name in load_file(out / file) for name, file in written.items())
    tokens = torch.arange(9)[None]
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.allclose(merged(tokens).logits, loaded(tokens).logits)


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    """The single file is read; the index that stays beside it names that one."""
    base = write_base(tmp_path / "base", shard="1GB")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    run(write_test_adapter(tmp_path / "adapter"), base, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(written) == set(Checkpoint.open(base).tensors)
    assert set(written.values()) == {"model.safetensors"}


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_nan_that_no_adapter_touches_is_the_bases(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    base = write_base(tmp_path / "base", shard="1GB")
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[:64] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = merge(write_test_adapter(tmp_path / "adapter"), base=base, out=tmp_path / "out", progress=False)
    assert "tensors" in result.verified
    after = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(after.view(torch.uint8), tensors[name].view(torch.uint8))
    assert f"holds NaN or infinity in {name}" in caplog.text
    assert str(base) in caplog.text
    assert "bug" not in caplog.text


@pytest.mark.parametrize("moment", ["while it is read", "while it is merged"])
def test_the_lock_names_the_adapter_that_was_merged(
    tmp_path: Path, base: Path, adapter: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of another training takes its place, as the end of a build does it."""
    other = write_test_adapter(tmp_path / "other", all_factors(seed=5), base=base)
    shas = {files.sha256_file(folder / "adapter_model.safetensors"): folder.name for folder in (adapter, other)}

    def swap() -> None:
        if other.exists():
            shutil.rmtree(adapter)
            other.rename(adapter)

    if moment == "while it is read":
        read = adapter_source.read_adapter
        monkeypatch.setattr(adapter_source, "read_adapter", lambda path: (read(path), swap())[0])
    else:
        papers = merging.copy_side_files
        monkeypatch.setattr(merging, "copy_side_files", lambda *args: (papers(*args), swap())[0])
    run(adapter, base, tmp_path / "out")
    named = shas[read_lock(tmp_path / "out" / "soka.lock")["adapters"]["adapter0"]["sha256"]]
    monkeypatch.undo()
    write_test_adapter(tmp_path / "own", all_factors(seed=1 if named == "adapter" else 5), base=base)
    run(tmp_path / "own", base, tmp_path / "again")
    assert named == ("other" if moment == "while it is read" else "adapter")
    for file in Checkpoint.open(base).files:
        assert (tmp_path / "out" / file.name).read_bytes() == (tmp_path / "again" / file.name).read_bytes()


# --- which folders are replaced ---------------------------------------------------------------------------------------


def test_inputs_are_safe(tmp_path: Path, base: Path, adapter: Path) -> None:
    for out in (base, adapter, adapter.parent):
        with pytest.raises(BuildError, match="would destroy"):
            run(adapter, base, out)


def _everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize(
    "fill",
    [
        lambda out, base, adapter: [shutil.copytree(base, out / name) for name in "ab"],
        lambda out, base, adapter: shutil.copytree(base, out, dirs_exist_ok=True),
        lambda out, base, adapter: shutil.copytree(adapter, out / "one"),
        lambda out, base, adapter: [(out / name).write_text("{}") for name in ("notes.md", "results.json")],
        lambda out, base, adapter: (out / "config.json").write_text("{}"),
        lambda out, base, adapter: (out / "model.safetensors").symlink_to(base / "config.json"),
        lambda out, base, adapter: write_lock(out / "soka.lock", {"soka": 1, "stages": {}, "files": {}}),
    ],
    ids=["models", "a model", "adapters", "notes", "results", "a link", "a lock of a build"],
)
def test_what_is_no_merged_model_is_refused_before_any_work(
    tmp_path: Path, base: Path, adapter: Path, fill: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with a merged model's endings, and even with its names, are not a merged model."""
    out = tmp_path / "mine"
    out.mkdir()
    fill(out, base, adapter)
    before = _everything(out)
    monkeypatch.setattr(merging, "read_source", lambda _: pytest.fail("work was begun"))
    first = sorted(p.name for p in out.iterdir())[0]
    with pytest.raises(BuildError, match=r"no soka\.lock in it says that it is a merged model") as caught:
        run(adapter, base, out)
    assert first in caught.value.message
    assert _everything(out) == before


@pytest.mark.parametrize(
    "added", ["notes.md", "vocabulary.json", "a/config.json", "adapter_config.json", "extra.safetensors", "empty/"]
)
def test_what_was_put_into_a_merged_model_is_not_lost(tmp_path: Path, base: Path, adapter: Path, added: str) -> None:
    out = tmp_path / "out"
    run(adapter, base, out)
    run(adapter, base, out)  # an earlier output of the same kind is replaced
    (out / ".DS_Store").touch()
    run(adapter, base, out)
    (out / added).parent.mkdir(exist_ok=True)
    (out / added).mkdir() if added.endswith("/") else (out / added).write_text("mine")
    before = _everything(out)
    with pytest.raises(BuildError, match=f"not part of a merged model: {added.split('/')[0]}"):
        run(adapter, base, out)
    assert _everything(out) == before


@pytest.mark.parametrize("named", ["*", "notes.*", "notes.md", "[n]otes.md", "../out/notes.md", "*.safetensors"])
def test_an_index_does_not_make_files_a_merged_models_own(
    tmp_path: Path, base: Path, adapter: Path, named: str
) -> None:
    out = tmp_path / "out"
    run(adapter, base, out)
    mine = out / ("mine.safetensors" if named == "*.safetensors" else "notes.md")
    mine.write_text("mine")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = named
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BuildError, match=f"not part of a merged model: {mine.name}"):
        run(adapter, base, out)
    assert mine.read_text() == "mine"


def test_a_merged_model_of_other_files_is_replaced(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Its own index says which weights are its own."""
    single = write_base(tmp_path / "single", shard="1GB")
    run(adapter, base, tmp_path / "out")
    run(adapter, single, tmp_path / "out", allow_other_base=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    run(adapter, base, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("what", ["added", "changed", "a new folder"])
def test_what_comes_while_a_merge_runs_is_kept(
    tmp_path: Path,
    base: Path,
    adapter: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    if what != "a new folder":
        run(adapter, base, out)
    real = merging.write_papers

    def meanwhile(*args: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / {"changed": "README.md"}.get(what, "notes.md")).write_text("mine")
        real(*args)

    monkeypatch.setattr(merging, "write_papers", meanwhile)
    run(adapter, base, out)
    (kept,) = tmp_path.glob("out.earlier-*")
    assert (kept / {"changed": "README.md"}.get(what, "notes.md")).read_text() == "mine"
    assert Checkpoint.open(out).sha256() != Checkpoint.open(base).sha256()
    assert "mine" not in (out / "README.md").read_text()
    assert str(kept) in caplog.text


@pytest.mark.parametrize("place", ["/proc/merged", "."])
def test_places_that_are_never_replaced(base: Path, adapter: Path, place: str) -> None:
    with pytest.raises(BuildError, match=r"lies in /proc, which is the kernel's|current directory"):
        run(adapter, base, Path(place))
