"""Adapters of every kind for the embedded base, and how answers of a server are held against their references."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model

from soka_serve.adapter.format import write_adapter
from soka_serve.kron import Factors
from tests.support.hostile_adapters import module
from tests.support.serving import Server, base_model, greedy_logprobs, random_factors, with_delta

PROMPTS = [[1, *range(40, 60)], [1, *range(100, 107)], [1, *range(300, 333)]]
# vLLM's attention sums in another order; it is what the independent server check allows in float32.
ATOL_NATS = 1e-4

ALL_SHAPES = {
    "q": (16, 8, 8, 16),
    "k": (8, 16, 8, 8),
    "v": (64, 1, 1, 128),
    "o": (2, 64, 64, 2),
    "gate": (22, 16, 16, 8),
    "up": (16, 8, 22, 16),
    "down": (8, 22, 16, 16),
}
ALPHA = {module(layer, name): shape for layer in range(4) for name, shape in ALL_SHAPES.items()}
# Other shapes; no k, no gate, no o, and only two layers.
BETA = {
    module(layer, name): shape
    for layer in (1, 3)
    for name, shape in {"q": (8, 8, 16, 16), "v": (8, 8, 8, 16), "up": (32, 4, 11, 32), "down": (16, 32, 8, 11)}.items()
}


@dataclass
class AdapterServer:
    """The server, the reference model of each name, and a folder for more adapters."""

    server: Server
    references: dict[str, Any]
    folder: Path

    def check(self, names: list[str], answers: list[tuple[list[int], list[float]]], prompts: list[list[int]]) -> None:
        """Hold answers against the references: tokens, log-probabilities, and an effect of each adapter."""
        effects: dict[str, float] = {}
        for name, (tokens, logprobs), prompt in zip(names, answers, prompts, strict=True):
            want = greedy_logprobs(self.references[name], prompt, tokens)
            assert want.argmax(-1).tolist() == tokens, name
            chosen = torch.tensor(tokens)[:, None]
            got = torch.tensor(logprobs, dtype=torch.float64)[:, None]
            error = float((want.gather(1, chosen) - got).abs().max())
            assert error < ATOL_NATS, (name, error)
            plain = greedy_logprobs(self.references["base"], prompt, tokens).gather(1, chosen)
            effects[name] = max(effects.get(name, 0.0), float((plain - got).abs().max()))
        assert all(effect > 0.1 for name, effect in effects.items() if name != "base"), effects

    def check_alone(self, name: str, prompt: list[int]) -> None:
        self.check([name], [self.server.ask(name, prompt)], [prompt])

    def check_at_once(self, names: list[str]) -> None:
        jobs = [(name, prompt) for prompt in PROMPTS for name in names]
        self.check([name for name, _ in jobs], self.server.ask_at_once(jobs), [prompt for _, prompt in jobs])


def write_soka(folder: Path, factors: dict[str, Factors]) -> Any:
    """Write an adapter; returns its reference."""
    write_adapter(folder, factors, base_model="builtin")
    return with_delta(factors)


TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
LOKR = LoKrConfig(
    r=4, alpha=2, target_modules=TARGETS, decompose_both=True, rank_pattern={"q_proj": 40}, init_weights=False
)


def write_peft(folder: Path, config: LoraConfig | LoKrConfig, seed: int) -> Any:
    """Write an adapter with an effect by means of PEFT; returns its reference."""
    torch.manual_seed(seed)
    get_peft_model(base_model(), config).save_pretrained(folder)
    return PeftModel.from_pretrained(base_model(), folder).eval()


def summed(references: dict[str, Any], *terms: tuple[float, str]) -> Any:
    """The base with the scaled sum of the references' dense deltas, added up in float64."""
    base = {name: weight.double() for name, weight in references["base"].named_parameters()}
    total = dict(base)
    for scale, member in terms:
        for name, weight in _merged(references[member]).named_parameters():
            total[name] = total[name] + scale * (weight.double() - base[name])
    model = base_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(total[name].float())
    return model


def _merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model


# lm_head takes no adapters here: stock vLLM wraps it on CPUs, and then fails on prompt log-probabilities.
TARGET_OPTIONS = ["--lora-target-modules", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def write_many(folder: Path, count: int) -> dict[str, Any]:
    """Adapters a0, a1, ... of different kinds, shapes and ranks; returns the reference of each, and the base's."""
    references = {"base": base_model()}
    for i in range(count):
        name = f"a{i}"
        if i % 5 == 3:
            references[name] = write_peft(folder / name, LORA, seed=100 + i)
        elif i % 5 == 4:
            references[name] = write_peft(folder / name, LOKR, seed=100 + i)
        else:
            shapes, scale = ((ALPHA, 0.04), (BETA, 0.08))[i % 2]
            references[name] = write_soka(folder / name, random_factors(shapes, 1 + i % 4, seed=100 + i, scale=scale))
    return references


def expected_answers(model: Any, prompts: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model answers greedily, and how clearly.

    Args:
        model: a reference in float32.
        prompts: (prompts, length) of one length.
        tokens: length of the answers; the end-of-sequence token ends none.

    Returns:
        The answers (prompts, tokens), and (prompts,): by how many nats the best token leads the second best where it
        leads least. An answer with a lead of more than twice ATOL_NATS has to be met token by token.
    """
    lead = torch.full((len(prompts),), float("inf"))
    cache = None
    ids, new = prompts, prompts
    with torch.no_grad():
        for _ in range(tokens):
            reply = model(new, past_key_values=cache, use_cache=True)
            cache = reply.past_key_values
            best = torch.log_softmax(reply.logits[:, -1].double(), -1).topk(2)
            lead = torch.minimum(lead, best.values[:, 0] - best.values[:, 1])
            new = best.indices[:, :1]
            ids = torch.cat([ids, new], 1)
    return ids[:, prompts.shape[1] :], lead


def clear_jobs(
    references: dict[str, Any], names: Sequence[str], lengths: Sequence[int], each: int, tokens: int, seed: int
) -> list[tuple[str, list[int], list[int]]]:
    """`each` jobs per name: (name, prompt, greedy answer), the answer one that rounding cannot change.

    Args:
        lengths: of the prompts, in turn.
        seed: of the prompts, which differ from name to name.
    """
    generator = torch.Generator().manual_seed(seed)
    jobs = []
    for i, name in enumerate(names):
        prompts = torch.randint(3, 600, (3 * each, lengths[i % len(lengths)]), generator=generator)
        answers, lead = expected_answers(references[name], prompts, tokens)
        good = (lead > 10 * ATOL_NATS).nonzero().flatten().tolist()[:each]
        assert len(good) == each, (name, lead)
        jobs += [(name, prompts[at].tolist(), answers[at].tolist()) for at in good]
    return jobs
