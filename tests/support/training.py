"""What the training tests share: a small random LLaMA, a task that it learns in a few steps, and a manifest."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from soka_serve.base.base import Base
from soka_serve.base.model import load_base
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.methods.adapter_files import load_adapter
from soka_serve.compiler.train.run import TrainingRun, TrainResult
from soka_serve.compiler.train.train import TrainingData, train
from soka_serve.compiler.train.trainer import SokaTrainer
from soka_serve.data.encode import EncodedExample, EncodedSet
from soka_serve.kron import Factors, dense_delta, kpsvd
from soka_serve.kron.shapes import balanced_shape
from soka_serve.manifest.rules import Adapt
from soka_serve.manifest.schema import Manifest
from soka_serve.trained import Form
from tests.support.tiny_models import small_config

# The Trainer collects garbage in every run; walking the libraries' objects would take most of these tests' time.
gc.freeze()
atexit.register(gc.unfreeze)

VOCABULARY = 48
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_base(directory: Path, *, dtype: torch.dtype = torch.float32, layers: int = 2, **config: Any) -> Path:
    """Write a random LLaMA (hidden 64, grouped-query attention) to `directory`."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = sizes | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1} | config
    LlamaForCausalLM(small_config(**options)).to(dtype).save_pretrained(directory)
    return directory


def target_names(layers: int = 2) -> list[str]:
    """Full names of all projections."""
    return [
        f"model.layers.{i}.{'self_attn' if p in PROJECTIONS[:4] else 'mlp'}.{p}"
        for i in range(layers)
        for p in PROJECTIONS
    ]


def make_examples(count: int = 64, seed: int = 0) -> EncodedSet:
    """Two random tokens, a marker, and the two tokens again; the loss is over the second half."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        a, b = torch.randint(4, 12, (2,), generator=generator).tolist()
        prompt = [1, a, b, 3] if index % 2 else [1, a, 3]
        answer = [a, b, 2] if index % 2 else [a, 2]
        examples.append(EncodedExample(prompt + answer, [-100] * len(prompt) + answer))
    return EncodedSet(examples, total=count, dropped=0, truncated=0)


def make_factors(base: Path, rank: int = 2, modules: list[str] | None = None) -> dict[str, Factors]:
    """Principal Kronecker components of every projection, as stage `init` gives them with `scale = 1`."""
    weights = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    factors = {}
    for name in modules or target_names():
        weight = weights[f"{name}.weight"]
        terms = kpsvd(weight, balanced_shape(*weight.shape), rank).factors.with_unit_rms()
        factors[name] = terms.with_size(float(weight.square().mean().sqrt()))
    return factors


def make_mixed_start(base: Path) -> dict[str, Any]:
    """Options of a run whose modules each train something else of their two terms: a core between them and a term of
    its own, sigma alone, Left beside the fixed Right of `right = "dct"` (where nothing is subtracted), or all. Of one
    in five, terms from zero are trained whole, beside a weight of which others are cut."""
    cosines = Adapt(init="gradient", right="dct")
    choices = [{"core": True, "extra_terms": 1}, {"train_factors": ["sigma"]}, cosines.form.choices, {}]
    factors, forms, subtracted, cut = make_factors(base), {}, set(), {}
    for number, (name, terms) in enumerate(factors.items()):
        if number % 5 == 4:
            factors[name], cut[name] = Factors(terms.left, 0 * terms.right, terms.sigma), terms
            continue
        if choice := choices[number % 4]:
            forms[name] = choice
        if number % 4 != 2:
            subtracted.add(name)
            continue
        found = cosines.start.decompose(dense_delta(terms), terms.shape, terms.rank, 0).factors.with_unit_rms()
        atoms = Factors(torch.zeros_like(found.left), found.right, torch.ones(terms.rank))
        factors[name] = atoms.with_size(float(terms.sigma.square().mean().sqrt()))
    return {"factors": factors, "initial": subtracted, "forms": forms, "cut": cut}


def make_manifest(**options: Any) -> Manifest:
    """A manifest with the given [train] keys; `quantize` and `dtype` go to [base], `adapt` are the rules.

    The start is the one of `make_factors`, unless `adapt` says another.
    """
    rules = {"adapt": options.pop("adapt", [{"init": "weights"}])}
    base: dict[str, Any] = {"path": "base"} | {k: options.pop(k) for k in ("quantize", "dtype") if k in options}
    recipe = {
        "data": {"jsonl": "unused.jsonl"} | ({"eval_jsonl": "unused.jsonl"} if "eval_every" in options else {}),
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 5e-2 if options.get("method", "soka") == "soka" else 1e-2,
        "max_length": 16,
        "log_every": 1,
    } | options
    return Manifest.model_validate({"schema": 1, "name": "test", "base": base, "train": recipe} | rules)


def run_training(
    base: Path,
    work_dir: Path,
    *,
    factors: dict[str, Factors] | None = None,
    initial: Collection[str] | None = None,
    cut: Mapping[str, Factors] | None = None,
    form: Mapping[str, Any] | None = None,
    forms: Mapping[str, Mapping[str, Any]] | None = None,
    train_set: EncodedSet | None = None,
    eval_set: EncodedSet | None = None,
    accuracy: Callable[[Any], float] | None = None,
    **options: Any,
) -> TrainResult:
    """`train` on the tiny base with everything that is not given filled in.

    Args:
        base: the base checkpoint.
        work_dir: of the run.
        factors: SoKA's starting factors; default: of `rank`, or 2.
        initial: the modules whose starting factors are subtracted; default: all.
        cut: terms that are taken off modules' weights; default: none.
        form: what of SoKA's factors is trained, the choices of a `Form`; default: everything.
        forms: the same by module, where `form` is not given; default of those that are not named: everything.
        train_set, eval_set: the examples; default: 64 for training.
        accuracy: of a model's answers, for `answered`.
        options: `rank`, and what `make_manifest` takes.
    """
    rank = options.pop("rank", 2)
    manifest = make_manifest(**options)
    method = METHODS[manifest.train.method]
    if factors is None:
        factors = make_factors(base, rank) if method.kronecker else {}
    run = TrainingRun(
        model_dir=base,
        manifest=manifest,
        method=method,
        targets=target_names(),
        work_dir=work_dir,
        stored=Base(base).layout.size.dtype,
        factors=factors,
        initial=frozenset(factors) if initial is None else initial,
        cut=cut or {},
        forms={
            name: Form(choices) for name, choices in (dict.fromkeys(factors, form) if form else forms or {}).items()
        },
    )
    return train(run, TrainingData(train_set or make_examples(), eval_set, 0, accuracy), progress=False)


def load_trained(base: Path, result: TrainResult) -> Any:
    """The trained model in evaluation mode: the adapter on its base, or the fully trained model."""
    if METHODS[result.method].whole_model:
        return load_base(result.directory).eval()
    return load_adapter(load_base(base), result.directory).eval()


def tensors_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(result.directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([[1, 5, 6, 3, 5]])).logits
    return logits


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Meanwhile training stops with Ctrl-C after so many steps, which the block must come to."""
    train_step = SokaTrainer.training_step

    def stop(self: SokaTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return train_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SokaTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
