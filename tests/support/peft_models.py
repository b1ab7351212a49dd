"""Tiny models and an oracle for the PEFT tests. The oracle knows torch.kron and nothing of the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from soka_serve.peft import SokaConfig
from tests.support.tiny_models import small_config
from tests.support.tolerances import TOLERANCE

VOCABULARY = 96

# Under torch.kron's eyes: no shape here is square, so no dimension can be mistaken for another.
SHAPES = {
    "q_proj": [4, 16, 16, 4],
    "k_proj": [16, 4, 2, 16],
    "v_proj": [8, 16, 4, 4],
    "o_proj": [32, 4, 2, 16],
    "gate_proj": [14, 4, 8, 16],
    "up_proj": [7, 8, 16, 8],
    "down_proj": [4, 28, 16, 4],
}
RANKS = {"q_proj": 2, "k_proj": 1, "v_proj": 3, "o_proj": 2, "gate_proj": 1, "up_proj": 4, "down_proj": 2}


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, intermediate: int = 112) -> LlamaForCausalLM:
    """Two layers, hidden 64, grouped-query attention (2 heads of 32, one key-value head), MLP 112 unless told."""
    torch.manual_seed(seed)
    config = small_config(vocab_size=VOCABULARY, intermediate_size=intermediate, initializer_range=0.1)
    model: LlamaForCausalLM = LlamaForCausalLM(config).to(dtype).eval()
    return model


def tokens(seed: int = 1, rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def spread(model: nn.Module) -> dict[str, dict[str, Any]]:
    """soka_modules for every projection: the shapes and ranks above."""
    return {
        name: {"rank": RANKS[name.rpartition(".")[2]], "shape": SHAPES[name.rpartition(".")[2]]}
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in SHAPES
    }


def perturb(model: nn.Module, scale: float = 0.05, seed: int = 2) -> None:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]) -> list[float]:
    """The loss of each batch of tokens, in a training step of its own."""
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def oracle_weights(base: Mapping[str, Tensor], tensors: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Weights in float64, plus `scale` times the delta of tensors named as on disk; initial factors are subtracted."""
    weights = {name: value.double() for name, value in base.items()}
    for key, left in tensors.items():
        for kind, sign in (("", 1.0), ("_initial", -1.0)):
            if not key.endswith(f".soka_left{kind}"):
                continue
            module = key.removeprefix("base_model.model.").removesuffix(f".soka_left{kind}")
            right = tensors[key.replace("soka_left", "soka_right")].double()
            sigma = tensors[key.replace("soka_left", "soka_sigma")].double()
            for k in range(len(sigma)):
                delta = sign * scale * sigma[k] * torch.kron(left[k].double(), right[k])
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + delta
    return weights


def oracle_sum(base: nn.Module, adapters: Iterable[tuple[float, dict[str, Tensor]]], ids: Tensor) -> Tensor:
    """Logits of a float64 copy of the base with weighted dense deltas added to its weights."""
    model, weights = tiny_llama(torch.float64), base.state_dict()
    for scale, tensors in adapters:
        weights = oracle_weights(weights, tensors, scale)
    model.load_state_dict(weights)
    return logits(model, ids)


def oracle_logits(base: nn.Module, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    return oracle_sum(base, [(1.0, tensors)], ids)


INITS = ("weights", "zero", "random")


def all_projections(init: Any = "weights", **options: Any) -> SokaConfig:
    """A config with awkward ranks and shapes on every projection of the tiny LLaMA, and terms as large as weights."""
    chosen = {"soka_modules": spread(tiny_llama()), "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return SokaConfig(init_soka_weights=init, **{**chosen, "init_scale": 1.0, **options})


def adapted(init: Any = "weights", dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """The tiny LLaMA with such an adapter, as it starts."""
    model: PeftModel = get_peft_model(tiny_llama(dtype), all_projections(init, **options)).eval()
    return model


def trained(init: Any = "weights", seed: int = 2, **options: Any) -> PeftModel:
    """The same, moved as by training."""
    model = adapted(init, **options)
    perturb(model, 0.2, seed)
    return model


def close(ours: Tensor, oracle: Tensor, dtype: torch.dtype = torch.float32, loosen: float = 4.0) -> bool:
    """Whether they agree to the dtype's tolerance, `loosen` times."""
    rtol, atol = TOLERANCE[dtype]
    atol *= loosen * float(oracle.abs().max())
    return torch.allclose(ours.double(), oracle.double(), rtol=rtol * loosen, atol=atol)


def saved(model: PeftModel, folder: Path, adapter: str = "default") -> dict[str, Tensor]:
    """The tensors in an adapter's file."""
    model.save_pretrained(str(folder), selected_adapters=[adapter])
    return load_file((folder if adapter == "default" else folder / adapter) / "adapter_model.safetensors")


def two_adapters() -> PeftModel:
    """Adapters "default" and "other", of which the second leaves most layers alone."""
    model = trained()
    model.add_adapter("other", SokaConfig(r=2, target_modules=["v_proj", "down_proj"], init_soka_weights="random"))
    return model.eval()
