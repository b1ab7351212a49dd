"""The tuner under the real trainers: transformers' Trainer, with a resume, and TRL's SFTTrainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from soka_serve.adapter.format import read_adapter
from soka_serve.kron import dense_delta
from soka_serve.peft import SokaConfig, get_factors, soka_layers
from tests.support.peft_models import logits, perturb, spread, tiny_llama, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def examples(count: int = 32, length: int = 12) -> Dataset:
    """Rows that count upwards: something to learn."""
    starts = torch.randint(0, 60, (count, 1), generator=torch.Generator().manual_seed(5))
    rows = (starts + torch.arange(length)) % 90
    return Dataset.from_dict(
        {"input_ids": rows.tolist(), "labels": rows.tolist(), "attention_mask": [[1] * length] * count}
    )


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "lr_scheduler_type": "linear",
        **options,
    }


def soka(**options: Any) -> SokaConfig:
    return SokaConfig(
        **{
            **{"target_modules": "all-linear", "soka_modules": spread(tiny_llama()), "task_type": "CAUSAL_LM"},
            **{"init_scale": 1.0, **options},
        }
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class StopCallback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("init", ["weights", "zero"])
def test_trainer_trains_saves_and_resumes_exactly(init: str, tmp_path: Path) -> None:
    def trainer(folder: Path, *callbacks: TrainerCallback) -> Trainer:
        model = get_peft_model(tiny_llama(), soka(init_soka_weights=init))
        return Trainer(
            model, TrainingArguments(**arguments(folder)), train_dataset=examples(), callbacks=list(callbacks)
        )

    straight = trainer(tmp_path / "straight")
    straight.train()
    assert losses(straight)[-1] < losses(straight)[0] - 0.3

    trainer(tmp_path / "broken", StopCallback(3)).train()
    resumed = trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert losses(resumed) == losses(straight)
    for (name, mine), theirs in zip(
        get_factors(resumed.model)[0].items(), get_factors(straight.model)[0].values(), strict=True
    ):
        assert torch.equal(mine.left, theirs.left), name
        assert torch.equal(mine.sigma, theirs.sigma), name

    # The checkpoint is an adapter as any: PEFT and our own reader agree on it, and on what was trained.
    ids = tokens()
    checkpoint = tmp_path / "straight" / "checkpoint-6"
    loaded = PeftModel.from_pretrained(tiny_llama(), str(checkpoint))
    assert torch.equal(logits(loaded, ids), logits(straight.model.eval(), ids))
    assert not torch.equal(logits(loaded, ids), logits(tiny_llama(), ids))
    adapter = read_adapter(checkpoint)
    assert bool(adapter.initial) == (init == "weights")
    for name, layer in soka_layers(straight.model).items():
        expected = layer.get_delta_weight("default")
        assert torch.allclose(dense_delta(adapter.delta_factors(name)), expected, atol=1e-5)


def test_trainer_with_gradient_checkpointing_and_bfloat16(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), soka(init_soka_weights="weights"))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "bf16": True}
    trainer = Trainer(model, TrainingArguments(**arguments(tmp_path, **options)), train_dataset=examples())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def words() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(92)} | {"<pad>": 92, "<eos>": 93, "<unk>": 94}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sentences() -> Dataset:
    return Dataset.from_dict({"text": [" ".join(f"w{(i + j) % 90}" for j in range(12)) for i in range(32)]})


@pytest.mark.parametrize(
    ("prepared", "checkpointing"),
    [
        pytest.param(False, True, id="peft_config, checkpointing"),
        pytest.param(True, False, id="prepared model"),
        pytest.param(False, False, id="peft_config", marks=pytest.mark.slow_matrix),
        pytest.param(True, True, id="prepared model, checkpointing", marks=pytest.mark.slow_matrix),
    ],
)
def test_sft_trainer(prepared: bool, checkpointing: bool, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    model: Any = tiny_llama()
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {}
    if prepared:
        model = get_peft_model(model, soka(init_soka_weights="weights"))
    else:
        options["peft_config"] = soka()
    settings = arguments(tmp_path, max_length=16, gradient_checkpointing=checkpointing, bf16=False)
    trainer = SFTTrainer(
        model, args=SFTConfig(**settings), train_dataset=sentences(), processing_class=words(), **options
    )
    assert isinstance(trainer.model, peft.PeftModel)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    state = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value
        for name, value in trainer.model.state_dict().items()
        if "soka_" not in name
    }
    for name, value in frozen.items():
        assert torch.equal(state[name], value), name

    ids = tokens()
    trainer.save_model(str(tmp_path / "final"))
    ours: Tensor = logits(trainer.model.eval(), ids)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "final")), ids), ours)
    assert not torch.equal(ours, logits(tiny_llama(), ids))


@pytest.mark.parametrize(
    ("init", "loaded"),
    [
        pytest.param("weights", True, id="weights, from disk"),
        pytest.param("zero", False, id="zero, in memory"),
        pytest.param("weights", False, id="weights, in memory", marks=pytest.mark.slow_matrix),
        pytest.param("zero", True, id="zero, from disk", marks=pytest.mark.slow_matrix),
    ],
)
def test_dpo_goes_on_from_an_adapter(init: str, loaded: bool, tmp_path: Path) -> None:
    """Its reference is the adapter as it was, not the base: at step 0 the loss is log 2, and the base is elsewhere."""
    from trl import DPOConfig, DPOTrainer

    model: Any = get_peft_model(tiny_llama(), soka(init_soka_weights=init))
    perturb(model, 0.2)
    if loaded:
        model.save_pretrained(str(tmp_path / "sft"))
        model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "sft"), is_trainable=True)
    words_of = [" ".join(f"w{(i + j) % 90}" for j in range(4)) for i in range(24)]
    pairs = [
        {"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in zip(*[iter(words_of)] * 3, strict=True)
    ]
    settings = arguments(tmp_path / "dpo", bf16=False, gradient_checkpointing=False, max_length=32)
    trainer = DPOTrainer(
        model, args=DPOConfig(**settings), train_dataset=Dataset.from_list(pairs), processing_class=words()
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05
    ids = tokens()
    after = logits(trainer.model.eval(), ids)
    trainer.model.set_adapter("ref")
    reference, base = logits(trainer.model, ids), logits(tiny_llama(), ids)
    assert (reference - base).abs().max() > 1
    assert (reference - after).abs().max() > 1e-2


def test_sft_trainer_on_a_4_bit_base(tmp_path: Path) -> None:
    """TRL casts the trained factors to bfloat16 there; the initial ones follow, so step 0 is still the base."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    tiny_llama(intermediate=128).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    settings = arguments(tmp_path / "run", max_length=16, bf16=False, gradient_checkpointing=False)
    trainer = SFTTrainer(
        base,
        args=SFTConfig(**settings),
        train_dataset=sentences(),
        processing_class=words(),
        peft_config=SokaConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_soka_weights="weights"),
    )
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    trainer.model.train()  # on the CPU, inference in eval mode would repack the 4-bit weights
    with torch.no_grad():
        adapted = trainer.model(input_ids=tokens()).logits
        with trainer.model.disable_adapter():
            assert torch.equal(trainer.model(input_ids=tokens()).logits, adapted)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.2
