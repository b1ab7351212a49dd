"""Train the embedded base model from generated text: `python -m eval.tiny_base.train --out DIR`.

The result is a LLaMA of 0.8M parameters that does the easy task families and fails the target ones, whose problems it
never sees. One process, one core; `--evaluate DIR` prints the accuracies of a checkpoint as JSON.

A step takes one batch from each of four sources: the three easy families, and bare sums ("23 + 14 = 37", several per
row), which show the model far more arithmetic per token than word problems do. The loss is taken over prompts too,
with a small weight: this is pre-training, and the embeddings of all words must be learnt.

A plain loop rather than the Trainer that fine-tuning uses: data is drawn endlessly while it runs, each step sums the
gradients of four batches of different lengths, and the loss is weighted by token. Under the Trainer each of these is
an override, and the loop is shorter than the three together.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from eval.tiny_base.tokenizer import BOS, EOS, MAX_POSITIONS, PAD, save_tokenizer, train_tokenizer
from soka_serve.base.base import Base
from soka_serve.base.pretrained import open_model
from soka_serve.builtin.problem import draw_difference, draw_product, draw_sum
from soka_serve.builtin.tasks import EASY_FAMILIES, FAMILIES, draw_problems
from soka_serve.compiler.answers import measure

_LOG = logging.getLogger(__name__)

PROMPT_WEIGHT = 0.1
DRILLS_PER_ROW = 4
WARMUP_STEPS = 100

Row = list[tuple[str, str]]
"""Prompts and what is to be learnt after each, one after the other in a row."""


def make_config(tokenizer: Tokenizer) -> LlamaConfig:
    """LLaMA architecture, small: grouped-query attention, heads of 32, an MLP that is no power of two."""
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        dtype="float32",
    )


def _family_rows(family: str, seed: int) -> Iterator[Row]:
    for problem in draw_problems(family, "train", seed):
        yield [(problem.prompt, problem.completion)]


def _drill_rows(seed: int) -> Iterator[Row]:
    """Rows of bare sums, differences and products; the signs of multiplication of both families."""
    rng = Random(f"drills/{seed}")
    while True:
        steps = (rng.choice((draw_sum, draw_difference, draw_product))(rng) for _ in range(DRILLS_PER_ROW))
        times = rng.choice(("*", r"\cdot"))
        halves = (step.render(times).split(" =") for step in steps)
        yield [(f"{sum_} =", f"{result}\n") for sum_, result in halves]


def make_batch(rows: Sequence[Row], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights, both (rows, tokens): `<s> prompt completion ... </s>`, padded on the right."""
    bos, eos, pad = (tokenizer.token_to_id(token) for token in (BOS, EOS, PAD))
    ids, weights = [], []
    for row in rows:
        tokens, counts = [bos], [0.0]
        for prompt, completion in row:
            before = tokenizer.encode(prompt, add_special_tokens=False).ids
            after = tokenizer.encode(completion, add_special_tokens=False).ids
            tokens += [*before, *after]
            counts += [PROMPT_WEIGHT] * len(before) + [1.0] * len(after)
        ids.append([*tokens, eos])
        weights.append([*counts, 1.0])
    width = max(map(len, ids))
    padded = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens in ids])
    return padded, torch.tensor([counts + [0.0] * (width - len(counts)) for counts in weights])


def weighted_loss(model: Any, ids: Tensor, weights: Tensor) -> Tensor:
    """Mean next-token cross-entropy, in nats, each token counted with its weight; a scalar."""
    # Padding is on the right, behind everything that counts: causal attention needs no mask for it.
    logits = model(input_ids=ids[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (losses * counted).sum() / counted.sum()


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(tokenizer: Tokenizer, *, steps: int, batch_size: int, peak: float, seed: int, out: Path) -> LlamaForCausalLM:
    """Train a model from random weights; `batch_size` rows from each of the four sources per step.

    Every 500 steps the model is written to `out`, where it can be measured while training goes on.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config(tokenizer))
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    sources = {family: _family_rows(family, seed) for family in EASY_FAMILIES}
    sources["drills"] = _drill_rows(seed)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, peak)
        losses = {}
        for name, rows in sources.items():
            ids, weights = make_batch(list(islice(rows, batch_size)), tokenizer)
            loss = weighted_loss(model, ids, weights)
            torch.autograd.backward(loss)
            losses[name] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0 * len(sources))
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            shown = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            _LOG.info("step %d of %d, %.0f s: loss %s", step, steps, time.monotonic() - started, shown)
        if step % 500 == 499:
            write_base(model, tokenizer, out)
    return model


def evaluate(directory: Path, limit: int) -> dict[str, float]:
    """Greedy accuracy, from 0 to 1, on the first `limit` test problems of every family."""
    model, tokenizer = open_model(directory, dtype=torch.float32), Base(directory).tokenizer
    accuracy = {}
    for family in FAMILIES:
        result = measure(model, family, limit, max_new_tokens=64, tokenizer=tokenizer, batch_size=128)
        accuracy[family] = result.correct / result.total
        _LOG.info("%s: %d of %d", family, result.correct, result.total)
    return accuracy


def write_base(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint as transformers lays it out: config, generation config, weights, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(str(directory))
    save_tokenizer(tokenizer, directory)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m eval.tiny_base.train", description=__doc__.split("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="directory to write the trained checkpoint to")
    action.add_argument("--evaluate", type=Path, help="directory of a checkpoint to measure; prints JSON")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=16, help="rows from each of the four sources per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--limit", type=int, default=500, help="test problems per family when measuring")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    if args.evaluate is not None:
        print(json.dumps(evaluate(args.evaluate, args.limit), indent=2))
        return
    started = time.monotonic()
    tokenizer = train_tokenizer(args.seed)
    model = train(
        tokenizer, steps=args.steps, batch_size=args.batch_size, peak=args.learning_rate, seed=args.seed, out=args.out
    )
    train_s = time.monotonic() - started
    write_base(model, tokenizer, args.out)
    record = {
        "command": "python -m eval.tiny_base.train",
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "threads": args.threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_s": round(train_s, 1),
        "cpu": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        "test_problems_per_family": args.limit,
        "accuracy": evaluate(args.out, args.limit),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["accuracy"], indent=2))


if __name__ == "__main__":
    main()
