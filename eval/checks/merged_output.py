"""Merged output for other engines: FP8 weights by llm-compressor, and a GGUF of a LoRA export by llama.cpp's converter.

    python -m eval.checks.merged_output --llama-cpp path/to/llama.cpp --out eval/results/merged_output.json

An adapter of random factors on the embedded base is merged. The merged model is quantised to FP8 (compressed-tensors,
scheme FP8_DYNAMIC) and loaded by transformers; each weight has to be within FP8's rounding of the merged one, and the
model nearer to the merged one than the base is. The adapter is exported as a LoRA and converted; the products of the
factors in the GGUF have to be those of the LoRA.
Needs llm-compressor and a checkout of llama.cpp, which are no requirements of soka-serve.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eval.record import make_parser, write_record
from soka_serve.adapter.export import export
from soka_serve.adapter.format import write_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.pretrained import open_model
from soka_serve.builtin import base_directory
from soka_serve.compiler.merge.merge import merge
from soka_serve.kron import Factors

_KEY = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
_LORA_RANK = 8
_MANTISSA = 2.0**-4  # E4M3 has three bits after the point: it rounds by at most half of an eighth
_SMALLEST = 2.0**-10  # half of its smallest step, in units of a channel's scale


def main() -> None:
    parser = make_parser("eval.checks.merged_output", __doc__)
    parser.add_argument("--llama-cpp", type=Path, help="checkout of llama.cpp; without it no GGUF is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_adapter(folder / "adapter")
        merge([(folder / "adapter", 1.0)], base=str(base_directory()), out=folder / "merged")
        found: dict[str, Any] = {"fp8": _fp8(folder / "merged", folder / "fp8")}
        if options.llama_cpp is not None:
            found["gguf"] = _gguf(folder, options.llama_cpp)
    packages = {name: version(name) for name in ("llmcompressor", "compressed-tensors")}
    print(write_record(options, found, packages=packages))


def _write_adapter(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = Checkpoint.open(base_directory()).tensors
    factors = {}
    for name in (f"model.layers.{layer}.self_attn.{part}" for layer in range(4) for part in ("q_proj", "o_proj")):
        rows, columns = tensors[f"{name}.weight"].shape
        left = torch.randn(1, rows // 8, columns // 8, generator=generator)
        factors[name] = Factors(left, torch.randn(1, 8, 8, generator=generator), torch.full((1,), 0.01))
    write_adapter(folder, factors, base_model=str(base_directory()))


def _fp8(merged: Path, out: Path) -> dict[str, float]:
    from llmcompressor import model_free_ptq  # type: ignore[import-not-found, unused-ignore]

    model_free_ptq(merged, out, scheme="FP8_DYNAMIC", ignore=["re:.*lm_head", "re:.*embed_tokens"], device="cpu")
    base, full, quantised = (_load(place) for place in (base_directory(), merged, out))
    weights, stored = dict(full.named_parameters()), load_file(out / "model.safetensors")
    scales = {key: scale.float() for key, scale in stored.items() if key.endswith("weight_scale")}
    worst = 0.0
    for key, scale in scales.items():
        name = key.removesuffix("_scale")
        got, want = stored[name].float() * scale, weights[name].detach()
        worst = max(worst, float(((got - want).abs() / (_MANTISSA * want.abs() + _SMALLEST * scale.abs())).max()))
    if not scales or worst > 1.01:
        raise SystemExit(f"{len(scales)} weights, off by up to {worst:.3f} times FP8's rounding")
    ids = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(1))
    plain, want, got = (_logprobs(model, ids) for model in (base, full, quantised))
    if not _kl(want, got) < 0.5 * _kl(want, plain):
        raise SystemExit(f"the quantised model is {_kl(want, got):.3f} nats from the merged one")
    return {
        "weights": len(scales),
        "largest_error_in_roundings": worst,
        "kl_nats_fp8_from_merged": _kl(want, got),
        "kl_nats_base_from_merged": _kl(want, plain),
        "bytes_merged": sum(file.stat().st_size for file in merged.glob("*.safetensors")),
        "bytes_fp8": sum(file.stat().st_size for file in out.glob("*.safetensors")),
    }


def _load(folder: Path) -> nn.Module:
    model: nn.Module = open_model(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def _logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.log_softmax(model(ids).logits.double(), -1)


def _kl(want: Tensor, got: Tensor) -> float:
    return float((want.exp() * (want - got)).sum(-1).mean())


def _gguf(folder: Path, llama_cpp: Path) -> dict[str, float]:
    lora, out = folder / "lora", folder / "lora.gguf"
    result = export(folder / "adapter", lora, to="lora", rank=_LORA_RANK)
    script = [sys.executable, str(llama_cpp / "convert_lora_to_gguf.py"), str(lora), "--base", str(base_directory())]
    subprocess.run([*script, "--outfile", str(out), "--outtype", "f32"], check=True, env=dict(os.environ))
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    from gguf import GGUFReader  # type: ignore[import-not-found, unused-ignore]

    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(out).tensors}
    weights = load_file(lora / "adapter_model.safetensors")
    want = weights[_KEY.format("B")] @ weights[_KEY.format("A")]
    name = "blk.0.attn_output.weight.lora_{}"
    got = tensors[name.format("b")] @ tensors[name.format("a")]
    error = float((got - want).abs().max() / want.abs().max())
    if error > 1e-6 or len(tensors) != 2 * result.modules:
        raise SystemExit(f"{len(tensors)} tensors in the GGUF; its delta is off by {error:.2e} of the largest value")
    return {
        "tensors": len(tensors),
        "relative_error_of_a_delta": error,
        "energy_lost_by_the_lora_frac": result.dropped_energy_frac,
        "lora_rank": _LORA_RANK,
    }


if __name__ == "__main__":
    main()
