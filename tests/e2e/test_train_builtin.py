"""A short run on the embedded base and its own data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from soka_serve.base.base import Base
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.folder import ModelFolder
from soka_serve.base.target_modules import resolve_targets
from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.builtin import base_directory
from soka_serve.compiler.history import read_history
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.train.run import TrainingRun
from soka_serve.compiler.train.train import TrainingData, train
from soka_serve.data.encode import encode_examples
from soka_serve.data.examples import DataReader
from soka_serve.kron import kpsvd
from soka_serve.kron.shapes import balanced_shape
from soka_serve.manifest.schema import Manifest


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_the_embedded_base_learns(tmp_path: Path, packing: bool) -> None:
    recipe = {"data": {"builtin": "math", "limit": 200}, "steps": 15, "batch_size": 4 if packing else 16}
    recipe |= {"learning_rate": 1.0, "log_every": 3, "packing": packing, "max_length": 256}
    manifest = Manifest.model_validate({"schema": 1, "name": "x", "base": {"builtin": "tiny"}, "train": recipe})
    directory = base_directory()
    checkpoint, tokenizer = Checkpoint.open(directory), TextTokenizer.from_folder(ModelFolder(directory))
    examples = DataReader(manifest.train.data, tmp_path).examples("train")
    rules = SimpleNamespace(max_length=256, overlong="drop", completion_only=True)
    encoded = encode_examples(examples, tokenizer, rules)
    factors = {}
    for target in resolve_targets(manifest, Base(directory).layout.modules):
        module = target.module
        shape = balanced_shape(module.out_features, module.in_features)
        factors[module.name] = kpsvd(checkpoint.read(f"{module.name}.weight"), shape, 1).factors
    run = TrainingRun(
        model_dir=directory,
        manifest=manifest,
        method=METHODS["soka"],
        targets=[],
        work_dir=tmp_path / "run",
        factors=factors,
        initial=frozenset(factors),
    )
    result = train(run, TrainingData(encoded, None, tokenizer.pad_id), progress=False)
    losses = [line["loss"] for line in read_history(result.history)]
    assert len(losses) == 5
    assert losses[-1] < 0.75 * losses[0]
