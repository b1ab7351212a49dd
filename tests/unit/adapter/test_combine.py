"""Adapters that do not go together, what a combination says of itself, and what it may replace."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from soka_serve.adapter.combine import combine
from soka_serve.adapter.export import export
from soka_serve.adapter.format import read_adapter, write_adapter
from soka_serve.cli import main
from soka_serve.errors import BuildError, CheckpointError, SokaError
from soka_serve.io.files import sha256_file
from soka_serve.io.lockfile import read_lock
from soka_serve.kron.shapes import FactorShape
from tests.support.kron_oracle import draw_factors
from tests.support.tiny_models import random_factors, write_test_adapter

NAME = "model.layers.0.self_attn.q_proj"


def one(folder: Path, seed: int = 0, sha256: str | None = "aa", base: str = "org/base", size: int = 64) -> Path:
    lock = {"soka": 1, "seed": seed} | ({"base": {"name": base, "sha256": sha256}} if sha256 else {})
    write_adapter(folder, {NAME: random_factors(size, 64, 2, seed)}, base_model=base, lock=lock)
    return folder


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    a, b = one(tmp_path / "build" / "adapter"), one(tmp_path / "b|c", 1)
    combine([(a, 0.25), (b, 0.75)], tmp_path / "out", rank=1)
    lock = read_lock(tmp_path / "out" / "soka.lock")
    assert lock["base"] == {"name": "org/base", "sha256": "aa"}
    assert "seed" not in lock
    said = lock["combine"]
    assert (said["rank"], said["adapters"]["adapter0"]["name"]) == (1, "build")
    assert said["adapters"]["adapter1"] == {
        **{"name": "b|c", "weight": 0.75, "modules": 1},
        "sha256": sha256_file(b / "adapter_model.safetensors"),
    }
    assert 0 < said["dropped_energy_frac"] == said["most_dropped_energy_frac"] < 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| b/c | 0.75 | 1 | 258 |" in card
    assert "of its energy (squared Frobenius norm) is lost" in card
    assert str(tmp_path) not in card + str(lock)


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    a = one(tmp_path / "a")
    b = one(tmp_path / "b", sha256="bb")
    c = one(tmp_path / "c", size=32)
    d = tmp_path / "d"
    write_adapter(d, {NAME: draw_factors(FactorShape(4, 8, 16, 8), 1).to()}, base_model="org/base", lock=None)
    with pytest.raises(CheckpointError) as caught:
        combine([(a, 1.0), (b, float("nan")), (c, 1.0), (d, 1.0)], tmp_path / "out")
    message = caught.value.message
    assert f"{b}: weight nan is not a finite number" in message
    assert f"{b}: made for base weights with sha256 bb, {a} for aa" in message
    assert f"{c}: {NAME}: its delta is (32, 64), that of {a} (64, 64)" in message
    assert f"{d}: {NAME}: factor shape [4, 8, 16, 8], {a} has [8, 8, 8, 8]" in message
    assert "give --rank" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_without_a_hash_the_base_s_name_counts(tmp_path: Path) -> None:
    a, same = one(tmp_path / "a"), one(tmp_path / "same", 1, sha256=None)
    combine([(a, 1.0), (same, 1.0)], tmp_path / "out")
    other = one(tmp_path / "other", 2, sha256=None, base="org/other")
    with pytest.raises(CheckpointError, match=r"other: made for base org/other, .* for org/base"):
        combine([(a, 1.0), (other, 1.0)], tmp_path / "out")
    combine([(a, 1.0), (other, 1.0)], tmp_path / "out", allow_other_base=True)
    assert read_adapter(tmp_path / "out").base_model == "org/base"


@pytest.mark.parametrize("rank", [0, 1.5])
def test_a_rank_is_a_count(tmp_path: Path, rank: float) -> None:
    with pytest.raises(SokaError, match="rank: expected at least 1"):
        combine([(one(tmp_path / "a"), 1.0)], tmp_path / "out", rank=rank)  # type: ignore[arg-type]
    with pytest.raises(SokaError, match="no adapter to combine"):
        combine([], tmp_path / "out")


def test_only_an_earlier_combination_is_replaced(tmp_path: Path) -> None:
    a, b = one(tmp_path / "a"), one(tmp_path / "b", 1)
    both = [(a, 1.0), (b, 1.0)]
    with pytest.raises(BuildError, match="would destroy"):
        combine(both, a)
    exported = tmp_path / "exported"
    combine(both, tmp_path / "out")
    export(tmp_path / "out", exported)
    with pytest.raises(BuildError, match=r"no soka\.lock in it says that it is a combined adapter"):
        combine(both, exported)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    combine(both, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    (a / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a/adapter_model\.safetensors"):
        combine(both, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_the_command(tmp_path: Path) -> None:
    a, b = write_test_adapter(tmp_path / "a"), write_test_adapter(tmp_path / "b")
    out = str(tmp_path / "out")
    done = CliRunner().invoke(main, ["combine", f"{a}=0.5", f"{b}=0.5", "--out", out, "--rank", "2"])
    assert done.exit_code == 0, done.output
    assert "of 2\n" in done.output
    assert "of the deltas' energy" in done.output
    done = CliRunner().invoke(main, ["combine", f"{a}=half", "--out", out])
    assert (done.exit_code, "weight 'half'" in done.output) == (2, True)


@pytest.mark.parametrize("rank", [None, 1])
def test_a_weight_that_float32_cannot_hold_is_refused(tmp_path: Path, rank: int | None) -> None:
    a = one(tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"{NAME}: weight -1e\\+300 makes its terms larger than float32"):
        combine([(a, 1.0), (a, -1e300)], tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()
