"""The adapter directory: written, read back, and refused when anything in it is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from soka_serve.adapter import format as adapter_module
from soka_serve.adapter.format import (
    CONFIG_FILE,
    LOCK_FILE,
    WEIGHTS_FILE,
    Adapter,
    check_against,
    read_adapter,
    write_adapter,
)
from soka_serve.base.weight_map import WeightMap
from soka_serve.errors import CheckpointError
from soka_serve.io.lockfile import read_lock, write_lock
from soka_serve.io.safetensors import TensorInfo, read_header
from soka_serve.kron import Factors, dense_delta
from soka_serve.kron.shapes import FactorShape
from tests.support.kron_oracle import draw_factors

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
SHAPES = {Q: FactorShape(2, 4, 3, 2), DOWN: FactorShape(5, 1, 2, 6)}
PREFIX = "base_model.model."


def made() -> dict[str, Factors]:
    return {name: draw_factors(shape, 2, dtype=torch.float32) for name, shape in SHAPES.items()}


def write(folder: Path, **options: Any) -> Path:
    write_adapter(folder, made(), base_model="some/base", lock={"seed": 3}, card="# Card\n", **options)
    return folder


def info(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, "F32", shape, Path("x"), 0, 0)


# --- round trip ------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    folder = write(tmp_path / "new" / "adapter")
    adapter = read_adapter(folder)
    assert set(adapter.factors) == set(SHAPES)
    assert adapter.initial == {}
    assert adapter.base_model == "some/base"
    assert adapter.parameters == sum(f.parameters for f in made().values())
    for name, factors in made().items():
        for part in ("left", "right", "sigma"):
            assert torch.equal(getattr(adapter.factors[name], part), getattr(factors, part))
        assert adapter.delta_factors(name) is adapter.factors[name]
    assert adapter.config["target_modules"] == sorted(SHAPES)
    assert adapter.config["soka_modules"][Q] == {"rank": 2, "shape": [2, 4, 3, 2]}
    assert (folder / "README.md").read_text() == "# Card\n"
    assert read_lock(folder / "soka.lock") == {"seed": 3}
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "soka.lock",
    ]
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        f"{PREFIX}{name}.soka_{part}" for name in SHAPES for part in ("left", "right", "sigma")
    }


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors", "soka.lock"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_factors_are_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write(tmp_path, dtype=dtype)
    assert {i.torch_dtype for i in read_header(folder / "adapter_model.safetensors").values()} == {dtype}
    adapter = read_adapter(folder)
    assert adapter.factors[Q].left.dtype == torch.float32
    assert torch.equal(adapter.factors[Q].left, made()[Q].left.to(dtype).float())


def test_a_training_checkpoint_is_trained_minus_initial(tmp_path: Path) -> None:
    folder = write(tmp_path)
    _with_initial(folder)
    adapter = read_adapter(folder)
    assert set(adapter.initial) == set(SHAPES)
    theta, initial = adapter.factors[Q], adapter.initial[Q]
    expected = dense_delta(theta) - dense_delta(initial)
    assert torch.allclose(dense_delta(adapter.delta_factors(Q)), expected, atol=1e-6)
    assert not torch.allclose(dense_delta(theta), expected, atol=1e-2)


def _with_initial(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {**tensors, **{f"{k}_initial": v + 0.5 for k, v in tensors.items()}}, folder / "adapter_model.safetensors"
    )
    _edit_config(folder, soka_initial=True)


def _edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_the_config_s_fields_are_those_of_the_peft_config() -> None:
    from soka_serve.peft import SokaConfig
    from soka_serve.peft.config import OPTIONAL

    optional = adapter_module._ONLY_TRAINING | set(adapter_module._NOT_HERE) | {adapter_module.QUANTIZE_KEY}
    assert optional == set(OPTIONAL), "older readers refuse these: a finished adapter has none, but of a base in bits"
    assert set(adapter_module._CONFIG) | optional == {f.name for f in fields(SokaConfig)}


def test_keys_of_a_newer_peft_are_named_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path)
    _edit_config(folder, new_in_peft_0_22=None)
    assert set(read_adapter(folder).factors) == set(SHAPES)
    assert "unknown keys ['new_in_peft_0_22'] are ignored" in caplog.text


def test_an_adapter_on_transposed_weights_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    _edit_config(folder, fan_in_fan_out=True)
    with pytest.raises(CheckpointError, match="fan_in_fan_out: weights stored"):
        read_adapter(folder)


def test_peft_loads_what_is_written(tmp_path: Path) -> None:
    from peft import PeftConfig

    from soka_serve.peft import SokaConfig

    config = PeftConfig.from_pretrained(str(write(tmp_path)))
    assert isinstance(config, SokaConfig)
    assert config.soka_modules[DOWN] == {"rank": 2, "shape": [5, 1, 2, 6]}
    assert config.init_soka_weights is False
    assert not config.soka_initial


def test_modules_may_share_their_factors(tmp_path: Path) -> None:
    same = made()[Q]
    write_adapter(tmp_path, {"a.q_proj": same, "b.q_proj": same}, base_model="b")
    found = read_adapter(tmp_path).factors
    assert all(torch.equal(found[name].left, same.left) for name in ("a.q_proj", "b.q_proj"))


# --- what is not written ---------------------------------------------------------------------------------------------


def test_what_cannot_be_written(tmp_path: Path) -> None:
    bad = made()
    bad[Q] = Factors(left=bad[Q].left, right=bad[Q].right * 1e6, sigma=bad[Q].sigma)
    with pytest.raises(CheckpointError, match=r"q_proj\.soka_right: values are not finite in torch\.float16"):
        write_adapter(tmp_path / "a", bad, base_model="b", dtype=torch.float16)
    empty = {Q: made()[Q].terms(slice(0, 0))}
    with pytest.raises(CheckpointError, match="q_proj: no terms"):
        write_adapter(tmp_path / "a", empty, base_model="b")
    with pytest.raises(CheckpointError, match="at least one module"):
        write_adapter(tmp_path / "a", {}, base_model="b")
    with pytest.raises(ValueError, match="base_model is empty"):
        write_adapter(tmp_path / "a", made(), base_model="")
    assert not (tmp_path / "a").exists()


# --- what is not read ------------------------------------------------------------------------------------------------


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def _config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: _edit_config(folder, **values)


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


LEFT = f"{PREFIX}{Q}.soka_left"

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json: no such file"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: no such file"),
    "config not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json:1:2: not JSON"),
    "truncated": (_truncate, r"adapter_model\.safetensors: truncated: expected \d+ bytes, found \d+"),
    "another method": (_config(peft_type="LORA"), "peft_type is 'LORA', expected 'SOKA'"),
    "another format": (_config(soka_format=2), "soka_format is 2; this version reads 1"),
    "unknown key": (_config(alpha=16), r"unknown keys \['alpha'\]"),
    "whole modules": (_config(modules_to_save=["lm_head"]), "modules_to_save .*cannot be part of the delta"),
    "initial unclear": (_config(soka_initial="yes"), "soka_initial must be true or false"),
    "odd base": (_config(base_model_name_or_path=True), "base_model_name_or_path must be a string or null, not True"),
    "odd revision": (_config(revision=3), "revision must be a string or null, not 3"),
    "no modules": (_config(soka_modules={}), "soka_modules must map at least one module"),
    "odd module": (_config(soka_modules={Q: {"rank": 2}}), "q_proj: expected rank and shape"),
    "odd rank": (_config(soka_modules={Q: {"rank": 0, "shape": [1, 1, 1, 1]}}), "rank must be at least 1, not 0"),
    "odd shape": (_config(soka_modules={Q: {"rank": 1, "shape": [1, 1]}}), r"shape must be \[m, n, p, q\]"),
    "another rank": (
        _config(soka_modules={n: {"rank": 3, "shape": list(s)} for n, s in SHAPES.items()}),
        r"q_proj\.soka_sigma is \(2,\), adapter_config\.json makes it \(3,\)",
    ),
    # Refused by the sizes that the file states, before anything of the size that the config states is made.
    "giant rank": (_config(soka_modules={Q: {"rank": 10**30, "shape": [1, 1, 1, 1]}}), r"makes it \(10{30},\)"),
    "giant shape": (
        _config(soka_modules={Q: {"rank": 1, "shape": [1 << 20] * 4}}),
        r"makes it \(1, 1048576, 1048576\)",
    ),
    "endless number": (lambda f: (f / "adapter_config.json").write_text("9" * 9999), "not JSON that can be read"),
    "nested without end": (lambda f: (f / "adapter_config.json").write_text("[" * 99999), "not JSON that can be read"),
    "missing tensor": (_tensors(lambda t: t.pop(LEFT)), rf"missing {LEFT}"),
    "unknown tensor": (_tensors(lambda t: t.update(stray=torch.ones(1))), "does not name: stray"),
    "wrong shape": (_tensors(lambda t: t.update({LEFT: torch.ones(2, 4, 2)})), r"\(2, 4, 2\), .*\(2, 2, 4\)"),
    "NaN": (_tensors(lambda t: t[LEFT].view(-1)[3].fill_(float("nan"))), f"{LEFT} has values that are not finite"),
    "integers": (_tensors(lambda t: t.update({LEFT: torch.ones(2, 2, 4, dtype=torch.int64)})), f"{LEFT} is I64"),
    "initial missing": (_config(soka_initial=True), r"missing .*soka_left_initial"),
    "initial not named": (lambda f: (_with_initial(f), _edit_config(f, soka_initial=False)), "not name:.*_initial"),
    "pickle": (lambda f: (f / "adapter_model.bin").write_bytes(b"x"), r"pickles.*adapter_model\.bin"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    folder = write(tmp_path)
    read_adapter(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(folder)
    assert str(folder) in caught.value.message
    assert caught.value.hint


def test_all_damage_comes_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path)
    _tensors(lambda t: (t.pop(LEFT), t.update(stray=torch.ones(1)), t[f"{PREFIX}{DOWN}.soka_right"].fill_(torch.inf)))(
        folder
    )
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder)
    lines = caught.value.message.splitlines()
    assert len(lines) == 3
    assert all(part in caught.value.message for part in ("missing", "stray", "down_proj.soka_right has values"))


def test_a_missing_directory_and_a_resume_point(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        read_adapter(tmp_path / "nowhere")
    folder = write(tmp_path)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"never opened")
    assert set(read_adapter(folder).factors) == set(SHAPES)


# --- against a base --------------------------------------------------------------------------------------------------


def test_check_against_a_base(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path))
    base = {f"{Q}.weight": info(f"{Q}.weight", 6, 8), f"{DOWN}.weight": info(f"{DOWN}.weight", 10, 6)}
    check_against(adapter, WeightMap(base))
    other = {f"{Q}.weight": info(f"{Q}.weight", 8, 6), f"{DOWN}s.weight": info(f"{DOWN}s.weight", 10, 6)}
    with pytest.raises(CheckpointError) as caught:
        check_against(adapter, WeightMap(other))
    assert "q_proj: the adapter's factors [2, 4, 3, 2] make a (6, 8) delta, the base's weight is (8, 6)" in str(
        caught.value
    )
    assert f"{DOWN}: the base has no such weight; it has {DOWN}s" in str(caught.value)
    assert caught.value.hint == "the adapter was made for some/base"
    assert isinstance(adapter, Adapter)


# --- soka.lock -------------------------------------------------------------------------------------------------------

_SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)
_VALUES = _SCALARS | st.lists(_SCALARS, max_size=3)
_TABLES = st.recursive(
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), _VALUES, max_size=4),
    lambda tables: st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), _VALUES | tables, max_size=4),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(lock=_TABLES)
def test_lock_round_trip(lock: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "round.lock"
    write_lock(file, lock)
    assert read_lock(file) == lock


@settings(max_examples=100, deadline=None)
@given(lock=_TABLES, base=_TABLES)
def test_one_table_of_a_lock(
    lock: dict[str, Any], base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "one.lock"
    write_lock(file, lock | {"base": base})
    values = {key: value for key, value in base.items() if not isinstance(value, dict)}
    assert read_lock(file, only="base") == {"base": values}


def test_a_lock_whose_tables_are_inline_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("base = { sha256 = '1' }\nother = 2\n")
    assert read_lock(tmp_path / "l", only="base") == {"base": {"sha256": "1"}, "other": 2}


def test_lock_is_readable(tmp_path: Path) -> None:
    write_lock(tmp_path / "l", {"seed": 1, "base": {"name": "a/b", "files": {"model.safetensors": "ab"}}, "ok": True})
    assert (tmp_path / "l").read_text() == (
        'seed = 1\nok = true\n\n[base]\nname = "a/b"\n\n[base.files]\n"model.safetensors" = "ab"\n'
    )


def test_lock_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"soka\.lock: a\.b: TOML has no form for NoneType"):
        write_lock(tmp_path / "l", {"a": {"b": None}})
    with pytest.raises(CheckpointError, match="no such file"):
        read_lock(tmp_path / "l")
    (tmp_path / "l").write_text("a = \n")
    with pytest.raises(CheckpointError, match=r"not TOML: .*line 1"):
        read_lock(tmp_path / "l")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, LOCK_FILE])
def test_what_is_no_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for without end, and a device read until memory is full."""
    folder = write(tmp_path)
    (folder / name).unlink(missing_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(folder / name)
        with pytest.raises(CheckpointError, match="not a file but a device, a pipe"):
            read_lock(folder / name) if name == LOCK_FILE else read_adapter(folder)
        (folder / name).unlink()
