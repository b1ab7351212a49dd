"""Kronecker adapters, ordinary LoRA and the base on one real server over HTTP, alone and in one batch."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from soka_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from soka_serve.builtin import base_directory
from soka_serve.kron import Factors, stack_terms
from soka_serve.peft import build_soka_model, get_factors
from tests.conftest import ROOT
from tests.e2e.serving import Server, base_model, greedy_logprobs, random_factors, serve, with_delta

pytestmark = pytest.mark.slow

# vLLM's attention sums in another order; it is what the independent server check allows in float32.
ATOL_NATS = 1e-4
KINDS = ["base", "alpha", "lokr", "beta", "lora"]  # the LoRA adapter in the last slot
PROMPTS = [[1, *range(40, 60)], [1, *range(100, 107)], [1, *range(300, 333)]]


def test_the_entry_point_is_installed() -> None:
    """vLLM finds the plugin by it; a checkout that was installed before it was there wants `make venv` again."""
    assert importlib.metadata.entry_points(group="vllm.general_plugins", name="soka")


def module(layer: int, name: str) -> str:
    block = "self_attn" if name in "qkvo" else "mlp"
    return f"model.layers.{layer}.{block}.{name}_proj"


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
class Served:
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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    references = {
        "base": base_model(),
        "alpha": write_soka(folder / "alpha", random_factors(ALPHA, 1, seed=1, scale=0.02)),
        "beta": write_soka(folder / "beta", random_factors(BETA, 4, seed=2, scale=0.04)),
        "lora": write_peft(folder / "lora", LORA, seed=3),
        "lokr": write_peft(folder / "lokr", LOKR, seed=3),
    }
    options = ["--max-loras", "4", "--max-cpu-loras", "6", "--max-lora-rank", "8"]
    options += ["--lora-target-modules", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    options += ["--lora-modules", *(f"{name}={folder / name}" for name in KINDS[1:])]
    with serve(folder, options) as server:
        yield Served(server, references, folder)


def test_alone(served: Served) -> None:
    for name in KINDS:
        for prompt in PROMPTS:
            served.check_alone(name, prompt)


def test_all_in_one_batch(served: Served) -> None:
    served.check_at_once(KINDS)


def test_independent_check(served: Served) -> None:
    script = Path(os.environ.get("SOKA_ACCEPT", ROOT.parent / "shared" / "accept")) / "check_server.py"
    if not script.exists():
        pytest.skip(f"no {script}")
    command = [sys.executable, str(script), "--url", served.server.url, "--base", str(base_directory())]
    command += ["--base-name", "base", "--tokens", "12"]
    for name in ("alpha", "beta"):
        command += ["--adapter", f"{name}={served.folder / name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_more_adapters_than_slots(served: Served) -> None:
    """Six adapters on four slots: slots change hands between kinds; one of them is a checkpoint of a training."""
    gamma = random_factors(ALPHA, 2, seed=4, scale=0.02)
    served.references["gamma"] = write_soka(served.folder / "gamma", gamma)
    served.references["training"] = write_checkpoint(served.folder / "training")
    names = ["gamma", "training"]
    for name in names:
        body = {"lora_name": name, "lora_path": str(served.folder / name)}
        status, reply = served.server.post("/v1/load_lora_adapter", body)
        assert status == 200, reply
    served.check_at_once(["gamma", "lora", "base", "training", "lokr", "beta", "alpha"])
    for name in ("alpha", "lora", "training", "gamma", "beta", "lokr", "lora", "base"):
        served.check_alone(name, PROMPTS[0])
    for name in names:
        status, reply = served.server.post("/v1/unload_lora_adapter", {"lora_name": name})
        assert status == 200, reply
        status, reply = served.server.post("/v1/completions", {"model": name, "prompt": [1, 2], "max_tokens": 1})
        assert status == 404, reply
    served.check_at_once(["alpha", "base", "lora"])


def write_checkpoint(folder: Path) -> Any:
    """An adapter as it is saved during training, with the initial factors; returns its reference."""
    initial = random_factors(BETA, 2, seed=5, scale=0.05)
    model = build_soka_model(base_model(), initial, initial=True, base_model=str(base_directory()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "soka_sigma" in name and "initial" not in name:
                parameter.mul_(-1)
    theta, theta0 = get_factors(model)
    model.save_pretrained(folder)
    return with_delta({name: stack_terms(theta[name], theta0[name], signs=(1, -1)) for name in theta})


def test_reload_in_place(served: Served) -> None:
    """A rebuilt adapter under the same name, from another folder: its answers, not those of the prefix cache."""
    server = served.server
    for folder, seed in (("beta2", 6), ("beta", 2)):
        served.references["beta"] = write_soka(served.folder / folder, random_factors(BETA, 4, seed=seed, scale=0.04))
        body = {"lora_name": "beta", "lora_path": str(served.folder / folder), "load_inplace": True}
        assert server.post("/v1/load_lora_adapter", body)[0] == 200
        served.check_at_once(["beta", "alpha", "base"])


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    return edit


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        change(config)
        (folder / CONFIG_FILE).write_text(json.dumps(config))

    return edit


def truncate(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(1000)


def factors_for(name: str, shape: tuple[int, int, int, int]) -> Callable[[Path], None]:
    """Replace the adapter by one for a single module."""
    return lambda folder: write_adapter(folder, random_factors({name: shape}, 1, 7, 0.1), base_model="builtin")


Q0 = f"base_model.model.{module(1, 'q')}."
MALFORMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, WEIGHTS_FILE),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    "a tensor missing": (edit_weights(lambda t: t.pop(Q0 + "soka_sigma")), Q0 + "soka_sigma"),
    "a tensor too many": (edit_weights(lambda t: t.update({Q0 + "lora_A": torch.ones(2, 2)})), Q0 + "lora_A"),
    "not a number": (edit_weights(lambda t: t[Q0 + "soka_left"].fill_(float("nan"))), "not finite"),
    "rank of the config": (edit_config(lambda c: c["soka_modules"][module(1, "q")].update(rank=9)), "makes it"),
    "format of the future": (edit_config(lambda c: c.update(soka_format=2)), "this version reads 1"),
    "an unknown setting": (edit_config(lambda c: c.update(soka_alpha=2)), "soka_alpha"),
    "a pickle": (lambda folder: (folder / "more.pt").write_bytes(b"x"), "more.pt"),
    "wrong shape": (factors_for(module(0, "k"), (16, 8, 8, 16)), "the served weight is (64, 128)"),
    "no such layer": (factors_for(module(9, "q"), (16, 8, 8, 16)), "no layer of the served model"),
    "lm_head": (factors_for("lm_head", (2, 8, 313, 16)), "lm_head: no layer of the served model"),
    "embeddings": (factors_for("model.embed_tokens", (2, 8, 313, 16)), "model.embed_tokens: no layer"),
    "config is no JSON": (lambda folder: (folder / CONFIG_FILE).write_text("{"), "Expecting property name"),
    "another peft_type": (
        edit_config(lambda c: c.update(peft_type="LOHA")),
        "peft_type is 'LOHA'; supported are LORA, SOKA, LOKR",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_adapters_are_refused(served: Served, kind: str) -> None:
    spoil, expected = MALFORMED[kind]
    folder = served.folder / f"malformed {kind}"
    shutil.copytree(served.folder / "beta", folder)
    spoil(folder)
    status, reply = served.server.post("/v1/load_lora_adapter", {"lora_name": "bad", "lora_path": str(folder)})
    assert status == 400, reply
    assert expected in reply["error"]["message"], reply
    assert served.server.post("/v1/completions", {"model": "bad", "prompt": [1], "max_tokens": 1})[0] == 404
    served.check_alone("beta", PROMPTS[1])


def test_a_missing_adapter_is_not_found(served: Served) -> None:
    body = {"lora_name": "bad", "lora_path": str(served.folder / "nowhere")}
    assert served.server.post("/v1/load_lora_adapter", body)[0] == 404
    served.check_at_once(KINDS)


def test_the_log_says_what_was_loaded(served: Served) -> None:
    log = served.server.log.read_text()
    assert f"SOKA adapter 'alpha' from {served.folder / 'alpha'}: 28 modules, ranks 1 to 2, " in log


def test_bfloat16(tmp_path: Path) -> None:
    """Not much further from float32 than transformers with merged weights is, itself in bfloat16."""
    references = {
        "base": base_model(),
        "alpha": write_soka(tmp_path / "alpha", random_factors(ALPHA, 1, seed=1, scale=0.01)),
        "lora": write_peft(tmp_path / "lora", LORA, seed=3),
        "beta": write_soka(tmp_path / "beta", random_factors(BETA, 4, seed=2, scale=0.02)),
    }
    options = ["--max-loras", "3", "--lora-modules", *(f"{n}={tmp_path / n}" for n in ("alpha", "lora", "beta"))]
    jobs = [(name, prompt) for prompt in PROMPTS for name in references]
    with serve(tmp_path, options, "bfloat16") as server:
        alone = [server.ask(*job) for job in jobs]
        answers = list(zip(jobs + jobs, alone + server.ask_at_once(jobs), strict=True))

    def logprobs(model: Any, name: str) -> torch.Tensor:
        """A model's log-probabilities of all that `name` answered."""
        chosen = [(prompt, tokens) for (asked, prompt), (tokens, _) in answers if asked == name]
        steps = [
            greedy_logprobs(model, prompt, tokens).gather(1, torch.tensor(tokens)[:, None]) for prompt, tokens in chosen
        ]
        return torch.cat(steps).flatten()

    for name, model in references.items():
        served = torch.tensor([x for (asked, _), (_, got) in answers if asked == name for x in got]).double()
        want, plain = logprobs(model, name), logprobs(references["base"], name)
        merged = copy.deepcopy(model)
        if isinstance(merged, PeftModel):
            merged = merged.merge_and_unload()
        error, allowed, effect = rms(served - want), rms(logprobs(merged.bfloat16(), name) - want), rms(plain - want)
        assert error < 2 * allowed, (name, error, allowed)
        assert name == "base" or effect > 10 * error, (name, error, effect)


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
