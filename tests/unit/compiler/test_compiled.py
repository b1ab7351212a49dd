"""Training through torch.compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from soka_serve.base.decoder import decoder_layers
from soka_serve.base.model import load_base
from soka_serve.compiler.history import read_history
from soka_serve.compiler.train.compiled import compiled_layers, plain_layers
from soka_serve.errors import BuildError, PlanError
from tests.support.training import make_base, make_factors, run_training, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about its insides


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("compiled") / "base")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow_matrix)])
def test_training_compiled_takes_the_same_steps(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """The first backend traces alone, in seconds; the second is the one that training has."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, **options | {"backend": backend})
    )
    factors = make_factors(base, modules=[f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)])
    runs = {
        name: run_training(base, tmp_path / name, factors=factors, compile=name == "compiled")
        for name in ("compiled", "plain")
    }
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in range(2, 9)  # beyond 8, torch stops compiling
    assert not torch._dynamo.utils.counters["graph_break"]
    losses = [[line["loss"] for line in read_history(run.history)] for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] != losses[0][0]
    trained = [tensors_of(run) for run in runs.values()]
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-2, atol=1e-3)


def test_layers_run_as_before_afterwards(base: Path) -> None:
    model = load_base(base, "float32")
    layers = decoder_layers(model)[2]
    with compiled_layers(model):
        assert all(layer._compiled_call_impl is not None for layer in layers)
    assert all(layer._compiled_call_impl is None for layer in layers)


def test_layers_can_run_plainly_meanwhile(base: Path) -> None:
    model = load_base(base, "float32")
    layers = decoder_layers(model)[2]
    with compiled_layers(model):
        with plain_layers(model):
            assert all(layer._compiled_call_impl is None for layer in layers)
        assert all(layer._compiled_call_impl is not None for layer in layers)


def test_a_model_without_decoder_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(PlanError, match=r"train\.compile does not go with this model"), compiled_layers(model):
        pass


def test_without_a_compiler_it_says_what_is_missing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend))
    torch._dynamo.reset()
    model = load_base(base, "float32").requires_grad_(False)
    with (
        pytest.raises(BuildError, match=r"train\.compile: torch cannot compile here: .*No working C\+\+") as caught,
        compiled_layers(model),
    ):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert "g++" in (caught.value.hint or "")
