"""The embedded base's tokenizer: byte-level BPE trained on generated text.

Every digit is a token of its own, so that numbers line up; bytes are the alphabet, so any UTF-8 text can be encoded,
at worst a byte at a time. `<s>` is put in front as LLaMA does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from soka_serve.builtin.family_boxed import draw_any_two_steps
from soka_serve.builtin.tasks import FAMILIES, draw_drafts, draw_problems

VOCABULARY = 640
MAX_POSITIONS = 1024
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
TEXTS_PER_FAMILY = 3000

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\nAnswer:' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)
"""A user's message reads as a question of the math family. The assistant's turn begins right after `Answer:`, so
`add_generation_prompt` has nothing to add."""


def _texts(seed: int) -> Iterator[str]:
    for family in FAMILIES:
        problems = draw_problems(family, "train", seed)
        if family == "boxed":
            problems = draw_drafts(draw_any_two_steps, "train", Random(f"{family}/train/{seed}"))
        for problem in islice(problems, TEXTS_PER_FAMILY):
            yield problem.prompt + problem.completion


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """Train the tokenizer on text of all task families; the same one for the same seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer reads."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
