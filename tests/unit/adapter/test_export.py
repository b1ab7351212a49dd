"""Exports that must fail whole, and what an exported directory says about itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch.linalg import svdvals

from soka_serve.adapter import export as exporting
from soka_serve.adapter.export import Form, export
from soka_serve.adapter.format import read_adapter
from soka_serve.adapter.loss import percent
from soka_serve.cli import main
from soka_serve.errors import BuildError, CheckpointError, SokaError
from soka_serve.io.files import sha256_file
from soka_serve.io.lockfile import read_lock
from tests.support.kron_oracle import oracle_delta, oracle_rearrangement
from tests.support.tiny_models import random_factors, write_test_adapter

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_test_adapter(tmp_path / "source", {NAME: random_factors(64, 64, 3, 0)})


def test_provenance_goes_along(tmp_path: Path, source: Path) -> None:
    export(source, tmp_path / "out", rank=1)
    lock = read_lock(tmp_path / "out" / "soka.lock")
    assert lock["seed"] == 0
    assert lock["export"]["form"] == "soka"
    assert lock["export"]["dropped_energy_frac"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of the delta's energy" in card
    assert read_adapter(tmp_path / "out").base_model == "tiny-test-base"
    export(source, tmp_path / "lora", to="lora", rank=2)
    assert read_lock(tmp_path / "lora" / "soka.lock")["export"]["form"] == "lora"


def test_again_gives_the_same_bytes(tmp_path: Path, source: Path) -> None:
    file = tmp_path / "out" / "adapter_model.safetensors"
    export(source, tmp_path / "out")
    before = file.read_bytes()
    export(source, tmp_path / "out")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "lora"}, "a LoRA needs a rank"),
        ({"to": "lokr"}, "expected 'soka' or 'lora'; got 'lokr'"),
        ({"rank": 0}, "rank: expected at least 1; got 0"),
        ({"energy": 1.5}, "energy: expected a share above 0, at most 1; got 1.5"),
        ({"to": "lora", "rank": 1, "energy": 0.9}, "energy chooses the terms of each module"),
    ],
)
def test_wrong_options(tmp_path: Path, source: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(SokaError, match=message):
        export(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_share_of_energy_on_the_command_line(tmp_path: Path) -> None:
    """Of each module as few terms as hold it; the loss is that of dense deltas in float64."""
    factors = {f"{NAME}{i}": random_factors(64, 64, 6, i) for i in range(2)}
    source, out = write_test_adapter(tmp_path / "source", factors), tmp_path / "out"
    done = CliRunner().invoke(main, ["export", str(source), "--energy", "0.8", "--out", str(out)])
    assert done.exit_code == 0, done.output
    written = read_adapter(out).factors
    wanted, energies, losses = {}, [], []
    for name, terms in factors.items():
        delta = oracle_delta(terms)
        shares = svdvals(oracle_rearrangement(delta, terms.shape)).square().cumsum(0) / delta.square().sum()
        wanted[name] = int((shares < 0.8).sum()) + 1
        energies.append(float(delta.square().sum()))
        losses.append(float((delta - oracle_delta(written[name])).square().sum()))
        assert losses[-1] / energies[-1] == pytest.approx(1 - float(shares[wanted[name] - 1]), abs=1e-6)
    assert {name: terms.rank for name, terms in written.items()} == wanted
    assert all(0 < rank < 6 for rank in wanted.values())
    assert f"lost        {percent(sum(losses) / sum(energies))} of the deltas' energy\n" in done.output
    for name, energy, lost in zip(factors, energies, losses, strict=True):
        assert f" {percent(lost / energy)}  {name}" in done.output


@pytest.mark.parametrize("value", ["0", "-0.1", "1.5", "inf", "nan", "x", ""])
def test_energies_that_are_no_share(tmp_path: Path, source: Path, value: str) -> None:
    out = tmp_path / "out"
    for command in (["export", str(source)], ["extract", "tiny", "--base", "tiny"]):
        done = CliRunner().invoke(main, [*command, "--energy", value, "--out", str(out)])
        assert done.exit_code == 2
        assert done.output.lower().count("error: ") == 1
        assert "energy" in done.output
        assert (value or "''") in done.output
        assert "Traceback" not in done.output
        assert not out.exists()


def test_damaged_source_leaves_the_last_export(tmp_path: Path, source: Path) -> None:
    export(source, tmp_path / "out")
    file = source / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        export(source, tmp_path / "out")
    read_adapter(tmp_path / "out")


def test_inputs_are_safe(tmp_path: Path, source: Path) -> None:
    with pytest.raises(BuildError, match="would destroy"):
        export(source, source)


@pytest.mark.parametrize("to", ["soka", "lora"])
def test_only_an_earlier_export_is_replaced(tmp_path: Path, source: Path, to: Form) -> None:
    """Not an adapter that something else made, though its files have the same names; not a folder of adapters."""
    other = write_test_adapter(tmp_path / "other", {NAME: random_factors(64, 64, 2, 1)})
    kept = (other / "adapter_model.safetensors").read_bytes()
    with pytest.raises(BuildError, match=r"no soka\.lock in it says that it is an exported adapter"):
        export(source, other, to=to, rank=1)
    assert (other / "adapter_model.safetensors").read_bytes() == kept
    shutil.copytree(source, tmp_path / "loras" / "one")
    with pytest.raises(BuildError, match=r"it holds one/"):
        export(source, tmp_path / "loras", to=to, rank=1)
    for form in ("soka", "lora", "soka"):
        export(source, tmp_path / "out", to=form, rank=1)  # either form in place of either
    (tmp_path / "out" / "adapter_model.bin").touch()
    with pytest.raises(BuildError, match=r"not part of an exported adapter: adapter_model\.bin"):
        export(source, tmp_path / "out", to=to, rank=1)


def test_the_lock_names_the_adapter_that_was_exported(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_test_adapter(tmp_path / "other", {NAME: random_factors(64, 64, 2, 9)})
    expected = sha256_file(source / "adapter_model.safetensors")
    real = exporting._to_soka

    def swapped(*args: Any) -> Any:
        shutil.rmtree(source)
        other.rename(source)
        return real(*args)

    monkeypatch.setattr(exporting, "_to_soka", swapped)
    export(source, tmp_path / "out")
    assert read_lock(tmp_path / "out" / "soka.lock")["export"]["source_sha256"] == expected


def test_a_card_without_end_is_refused(tmp_path: Path, source: Path) -> None:
    """It goes into the export; GiBs of nothing are no card."""
    with (source / "README.md").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(CheckpointError, match=r"README.md: 8589934592 bytes, too large"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dates_in_a_lock_go_along(tmp_path: Path, source: Path) -> None:
    (source / "soka.lock").write_text("day = 2026-01-31\nat = 2026-01-31T10:00:00Z\n")
    export(source, tmp_path / "out")
    lock = read_lock(tmp_path / "out" / "soka.lock")
    assert (str(lock["day"]), str(lock["at"])) == ("2026-01-31", "2026-01-31 10:00:00+00:00")
