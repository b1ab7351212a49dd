"""`adapter_terms` as a share: how many terms a build stores, and the loss that it states."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from soka_serve.adapter.format import read_adapter
from soka_serve.adapter.loss import percent
from soka_serve.cli import main
from soka_serve.io.lockfile import read_lock
from tests.support.builds import write_manifest
from tests.support.kron_oracle import oracle_delta


def _build(folder: Path, output: str) -> Result:
    manifest = write_manifest(
        folder, steps=2, save_every=2, output=f"report = false\n{output}", replace=("rank = 1 ", "rank = 3 ")
    )
    text = manifest.read_text().replace('["adapter", "merged"]', '["adapter"]').replace("limit = 4\n", "limit = 0\n")
    manifest.write_text(text)
    return CliRunner().invoke(main, ["build", str(manifest), "--out", str(folder / "out")])


def test_a_share_of_the_energy_is_kept_and_the_rest_stated(tmp_path: Path) -> None:
    """Against dense deltas in float64 of the same training, exported whole."""
    whole = _build(tmp_path, "")
    assert whole.exit_code == 0, whole.output
    assert "export: lost" not in whole.output
    build = tmp_path / "out" / "small"
    exact = read_adapter(build / "adapter").factors
    before = {name: (terms.rank, oracle_delta(terms)) for name, terms in exact.items()}
    cut = _build(tmp_path, "adapter_terms = 0.9")
    assert cut.exit_code == 0, cut.output
    after = read_adapter(build / "adapter").factors
    assert after.keys() == before.keys()
    energy = lost = 0.0
    for name, terms in after.items():
        rank, delta = before[name]
        assert rank == 6
        missing = float((delta - oracle_delta(terms)).square().sum())
        assert missing <= (0.1 + 1e-6) * float(delta.square().sum())
        energy, lost = energy + float(delta.square().sum()), lost + missing
    assert sum(terms.rank for terms in after.values()) < sum(rank for rank, _ in before.values())
    assert 1e-4 < lost / energy < 0.1
    assert read_lock(build / "soka.lock")["result"]["dropped_energy_frac"] == pytest.approx(lost / energy, rel=1e-4)
    assert f"export: lost {percent(lost / energy)} of the deltas' energy\n" in cut.output


@pytest.mark.parametrize("value", ["0", "-0.1", "1.5", "inf", "nan", "'x'", "''", "true", "[0.9]"])
def test_values_that_are_no_share(tmp_path: Path, value: str) -> None:
    done = _build(tmp_path, f"adapter_terms = {value}")
    assert done.exit_code == 2
    assert done.output.count("small.toml:") == 1
    assert "output.adapter_terms: expected 'all', 'trained', or a share of the energy above 0, at most 1" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()
