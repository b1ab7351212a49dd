"""Greedy answers from a causal language model in batches, and their accuracy on a task family."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.builtin.problem import Problem
from soka_serve.builtin.tasks import check_answer, generate


class ScoredAnswer(NamedTuple):
    """One answered problem."""

    problem: Problem
    text: str
    correct: bool


class Measurement(NamedTuple):
    """How many of `total` problems were answered right, and every answer in the order of the problems."""

    correct: int
    total: int
    samples: list[ScoredAnswer]


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    batch_size: int = 64,
    *,
    templated: bool = False,
) -> list[str]:
    """What the model writes after each prompt: greedy, up to where a server ends it, or `max_new_tokens`.

    Prompts are padded on the left with their attention masked, sorted by length so that little is padded; the answers
    come in the order of the prompts. The model is put in evaluation mode meanwhile.

    Args:
        model: a causal language model of transformers, or one wrapped by PEFT.
        tokenizer: of the base.
        prompts: each at least one token long.
        max_new_tokens: longest answer, tokens.
        batch_size: prompts per forward.
        templated: the prompts are rendered chats, which bring their own special tokens.
    """
    encoded = tokenizer.encode_prompts(prompts, add_special_tokens=not templated)
    order = sorted(range(len(prompts)), key=lambda at: len(encoded[at]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(encoded[at]) for at in chosen)
            ids, mask = torch.full((len(chosen), width), tokenizer.pad_id), torch.zeros(len(chosen), width).long()
            for row, at in enumerate(chosen):
                ids[row, width - len(encoded[at]) :] = torch.tensor(encoded[at])
                mask[row, width - len(encoded[at]) :] = 1
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                # Sampling options of a checkpoint's generation config mean nothing in a greedy run, and are warned of.
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=list(tokenizer.stop_ids),
                pad_token_id=tokenizer.pad_id,
            )
            for at, written in zip(chosen, output[:, width:].tolist(), strict=True):
                answer = list(takewhile(lambda number: number not in tokenizer.stop_ids, written))
                answers[at] = tokenizer.decode_after(encoded[at] + answer, len(encoded[at]), skip_special_tokens=True)
    finally:
        model.train(was_training)
    return answers


def measure(
    model: Any,
    family: str,
    limit: int = 200,
    max_new_tokens: int = 128,
    *,
    tokenizer: TextTokenizer,
    batch_size: int = 64,
    prompts: Sequence[str] | None = None,
) -> Measurement:
    """Accuracy on the first `limit` held-out problems of a family.

    Args:
        model: a causal language model of transformers, or one wrapped by PEFT.
        family: of built-in problems.
        limit: how many.
        max_new_tokens: longest answer, tokens.
        tokenizer: of the base.
        batch_size: problems per forward.
        prompts: how the problems are asked; default: as the family has them.
    """
    problems = generate(family, "test", limit)
    asked = [problem.prompt for problem in problems] if prompts is None else prompts
    texts = generate_answers(model, tokenizer, asked, max_new_tokens, batch_size)
    samples = [ScoredAnswer(p, text, check_answer(p, text)) for p, text in zip(problems, texts, strict=True)]
    return Measurement(sum(sample.correct for sample in samples), len(samples), samples)
