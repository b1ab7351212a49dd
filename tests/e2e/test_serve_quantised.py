"""Kronecker adapters on a base with 4-bit weights, in GPTQ's format: the delta acts on activations as elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.io.lockfile import write_lock
from soka_serve.kron import Factors
from soka_serve.kron.cpu import has_amx
from tests.support.quantised import METHODS, write_copy
from tests.support.serve_adapters import ALPHA, BETA, LORA, PROMPTS, write_peft, write_soka
from tests.support.serving import ONE_PROCESS, Server, base_model, greedy_logprobs, random_factors, serve, with_delta
from tests.support.tolerances import rms

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "avx512f" not in Path("/proc/cpuinfo").read_text(), reason="vLLM's CPU builds have its 4-bit kernel for AVX-512"
    ),
]

GROUP = 32


def quantise(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight (out, in) as GPTQ stores it, symmetric, and what it then is in float32."""
    out_features, in_features = weight.shape
    groups = weight.reshape(out_features, -1, GROUP)
    scales = (groups.abs().amax(-1) / 7).half()
    codes = (groups / scales[..., None].float()).round().clamp(-8, 7)
    read = (codes * scales[..., None].float()).reshape(out_features, in_features)
    nibbles = (codes + 8).long().reshape(out_features, in_features).T.reshape(in_features // 8, 8, out_features)
    packed = sum(nibbles[:, i] << 4 * i for i in range(8))
    zeros = torch.full((in_features // GROUP, out_features // 8), 0x77777777)  # GPTQ stores the zero point less one
    tensors = {
        "qweight": as_int32(packed),
        "qzeros": as_int32(zeros),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(in_features) // GROUP).int(),
    }
    return tensors, read


def as_int32(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values >= 2**31, values - 2**32, values).int().contiguous()


def write_quantised(folder: Path) -> dict[str, torch.Tensor]:
    """The embedded base with 4-bit attention and MLP weights; returns the weights as they are then read."""
    read = {name: tensor.float() for name, tensor in load_file(base_directory() / "model.safetensors").items()}

    def change(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        parts, read[name] = quantise(weight.float())
        return {f"{name.removesuffix('.weight')}.{key}": part for key, part in parts.items()}

    write_copy(folder, change, {"quantization_config": {**METHODS["gptq"][1], "checkpoint_format": "gptq"}})
    return read


def with_weights(read: dict[str, torch.Tensor], factors: dict[str, Factors]) -> Any:
    model = base_model()
    model.load_state_dict(read, strict=False)  # the head is tied to the embedding
    return with_delta(factors, model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Any]:
    read = write_quantised(folder / "model")
    adapters = {
        "base": {},
        "alpha": random_factors(ALPHA, 1, seed=1, scale=0.01),
        "beta": random_factors(BETA, 4, seed=2, scale=0.02),
    }
    for name in ("alpha", "beta"):
        write_soka(folder / name, adapters[name])
        # Made for the original weights: a quantised base is another by nature.
        write_lock(
            folder / name / "soka.lock", {"base": {"name": "x", "sha256": Checkpoint.open(base_directory()).sha256()}}
        )
    return {name: with_weights(read, factors) for name, factors in adapters.items()}


@pytest.fixture(scope="module")
def server(folder: Path, references: dict[str, Any]) -> Iterator[Server]:
    options = ["--model", str(folder / "model"), "--max-loras", "2"]
    options += ["--lora-modules", *(f"{name}={folder / name}" for name in ("alpha", "beta"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOKA_LORA", "0")
        with serve(folder, options, "bfloat16", ONE_PROCESS) as server:
            yield server


def in_eight_bits(layer: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """What goes into a layer, each token's values rounded to one of 255 even steps."""
    (values,) = inputs
    step = values.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return ((values.float() / step).round() * step).to(values.dtype)


def rounded_model(model: Any) -> Any:
    """A model in the precision in which it is served: bfloat16; with AMX, vLLM rounds what goes into 4-bit layers."""
    low = type(model)(model.config).eval()
    low.load_state_dict(model.state_dict())
    low = low.bfloat16()
    for name, layer in low.named_modules():
        if has_amx() and name.endswith("_proj"):
            layer.register_forward_pre_hook(in_eight_bits)
    return low


def test_answers(server: Server, references: dict[str, Any]) -> None:
    """As near to the dequantised weights with the dense delta as the served precision lets transformers itself be."""
    jobs = [(name, prompt) for prompt in PROMPTS for name in references]
    answers = [*(server.ask(*job) for job in jobs), *server.ask_at_once(jobs)]
    for name, model in references.items():
        want, got, plain, rounded = [], [], [], []
        low = rounded_model(model)
        for (asked, prompt), (tokens, logprobs) in zip(jobs + jobs, answers, strict=True):
            if asked == name:
                chosen = torch.tensor(tokens)[:, None]
                want.append(greedy_logprobs(model, prompt, tokens).gather(1, chosen))
                plain.append(greedy_logprobs(references["base"], prompt, tokens).gather(1, chosen))
                rounded.append(greedy_logprobs(low, prompt, tokens).gather(1, chosen))
                got.append(torch.tensor(logprobs, dtype=torch.float64)[:, None])
        expected = torch.cat(want)
        error, allowed = rms(torch.cat(got) - expected), rms(torch.cat(rounded) - expected)
        effect = rms(torch.cat(plain) - expected)
        assert error < 2 * allowed, (name, error, allowed)
        assert name == "base" or effect > 10 * error, (name, error, effect)


def test_the_kernel_is_one_for_4_bits(server: Server) -> None:
    """Or the test above would show nothing."""
    log = server.log.read_text()
    assert "CPUWNA16LinearKernel" in log
    assert "which is quantised; served all the same" in log


def test_lora_is_refused_where_it_has_no_part(server: Server, folder: Path) -> None:
    """SOKA_LORA=0, which saves a GPU the memory of LoRA's slots."""
    write_peft(folder / "lora", LORA, seed=3)
    status, reply = server.load("lora", folder / "lora")
    assert (status, "started with SOKA_LORA=0" in str(reply)) == (400, True), reply
