"""One server over two processes, tensor parallel and pipeline parallel: answers, refusals, and files that vanish."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from soka_serve.adapter.format import WEIGHTS_FILE, write_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.io.lockfile import write_lock
from soka_serve.kron import Factors
from tests.support.serve_adapters import (
    ALPHA,
    BETA,
    LOKR,
    LORA,
    PROMPTS,
    TARGET_OPTIONS,
    AdapterServer,
    module,
    summed,
    write_peft,
    write_soka,
)
from tests.support.serving import base_model, random_factors, serve, with_delta

pytestmark = pytest.mark.slow

# Factors that two ranks cannot share out evenly: blocks are cut, of Left one row or column is all there is, or Left or
# Right is a single number.
AWKWARD = {
    "q": (1, 128, 128, 1),
    "k": (1, 1, 64, 128),
    "v": (64, 128, 1, 1),
    "o": (128, 1, 1, 128),
    "gate": (11, 8, 32, 16),
    "up": (176, 128, 2, 1),
    "down": (8, 11, 16, 32),
}
KINDS = ["base", "alpha", "awkward", "lora", "lokr"]
# Of one kind, and of two that share layers; awkward ones are cut.
SUMS: dict[str, list[tuple[float, str]]] = {
    "0.5*awkward": [(0.5, "awkward")],
    "awkward+-0.5*lora": [(1, "awkward"), (-0.5, "lora")],
}
LONG = [1, *range(30, 230)]  # more than a block of the prefix cache, which has 128 tokens on CPUs


def serve_two(folder: Path, options: list[str], keep_gib: str) -> Iterator[AdapterServer]:
    awkward = {module(layer, name): shape for layer in range(4) for name, shape in AWKWARD.items()}
    references = {
        "base": base_model(),
        "alpha": write_soka(folder / "alpha", random_factors(ALPHA, 1, seed=1, scale=0.02)),
        "awkward": write_soka(folder / "awkward", random_factors(awkward, 2, seed=3, scale=0.02)),
        "lora": write_peft(folder / "lora", LORA, seed=3),
        "lokr": write_peft(folder / "lokr", LOKR, seed=3),
    }
    references |= {text: summed(references, *terms) for text, terms in SUMS.items()}
    options = [*options, "--max-loras", "4", *TARGET_OPTIONS]
    options += ["--lora-modules", *(f"{name}={folder / name}" for name in KINDS[1:])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        patch.setenv("SOKA_KEEP_ADAPTERS_GIB", keep_gib)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with serve(folder, options) as server:
            yield AdapterServer(server, references, folder)


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterServer]:
    yield from serve_two(tmp_path_factory.mktemp("tp"), ["--tensor-parallel-size", "2"], "1")


@pytest.fixture(scope="module")
def pipeline_parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterServer]:
    """Keeps nothing of an adapter that is evicted."""
    yield from serve_two(tmp_path_factory.mktemp("pp"), ["--pipeline-parallel-size", "2"], "0")


def load(served: AdapterServer, name: str, folder: str = "", **more: Any) -> tuple[int, str]:
    """Status and message of a load."""
    status, reply = served.server.load(name, served.folder / (folder or name), **more)
    return status, str(reply)


def unload(served: AdapterServer, name: str) -> None:
    assert served.server.unload(name)[0] == 200


def beta(served: AdapterServer, seed: int, name: str = "beta") -> None:
    """Write adapter `name`, another one for each seed."""
    factors = random_factors(BETA, 4, seed=seed, scale=0.04)
    shutil.rmtree(served.folder / name, ignore_errors=True)
    served.references[name] = write_soka(served.folder / name, factors)


def change(folder: Path, key: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({**tensors, key: value}, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def test_tensor_parallel_answers(tensor_parallel: AdapterServer) -> None:
    for name in KINDS:
        tensor_parallel.check_alone(name, PROMPTS[0])
    tensor_parallel.check_at_once([*KINDS, *SUMS])


def test_a_refused_adapter_leaves_the_workers_together(tensor_parallel: AdapterServer) -> None:
    """Each of them fails; the loads after that are all right, and so are the answers."""
    served = tensor_parallel
    factors = random_factors({module(0, "k"): (16, 8, 8, 16)}, 1, 7, 0.1)
    write_adapter(served.folder / "shape", factors, base_model="builtin")
    status, message = load(served, "shape")
    assert (status, "the served weight is (64, 128)" in message) == (400, True)
    # Of ordinary LoRA vLLM would cut the first to size, fail at the second in a slot, and leave out the third.
    for name, key, value, expected in (
        ("high", f"{module(3, 'q')}.lora_B.weight", torch.ones(256, 4), "lora_B (256, 4) and lora_A (4, 128)"),
        ("wide", f"{module(3, 'q')}.lora_A.weight", torch.ones(4, 256), "lora_B (128, 4) and lora_A (4, 256)"),
        ("deep", f"{module(9, 'q')}.lora_A.weight", torch.ones(4, 128), f"{module(9, 'q')}: no layer"),
        ("nan", f"{module(3, 'q')}.lora_A.weight", torch.full((4, 128), torch.nan), "not finite"),
    ):
        shutil.copytree(served.folder / "lora", served.folder / name)
        change(served.folder / name, f"base_model.model.{key}", value)
        status, message = load(served, name)
        assert (status, expected in message) == (400, True), message
    for seed in range(2):
        beta(served, seed, f"good{seed}")
        assert load(served, f"good{seed}") == (200, f"Success: LoRA adapter 'good{seed}' added successfully.")
        assert load(served, "shape")[0] == 400
        served.check_at_once([f"good{seed}", *KINDS])
    assert load(served, "nowhere")[0] == 404
    served.check_at_once(["good0", "good1", "lora", "base"])
    for name in ("good0", "good1"):
        unload(served, name)


def test_the_base_that_an_adapter_was_made_for(tensor_parallel: AdapterServer) -> None:
    """As its soka.lock names it: by the hash of the weights."""
    served = tensor_parallel
    beta(served, 6, "locked")
    own = Checkpoint.open(base_directory()).sha256()
    write_lock(served.folder / "locked" / "soka.lock", {"base": {"name": "other", "sha256": "0" * 64}})
    status, message = load(served, "locked")
    assert status == 400, message
    assert "0" * 64 in message
    assert own in message
    write_lock(served.folder / "locked" / "soka.lock", {"base": {"name": "builtin", "sha256": own}})
    assert load(served, "locked")[0] == 200
    served.check_alone("locked", PROMPTS[1])
    unload(served, "locked")


def test_a_refused_reload_changes_nothing(tensor_parallel: AdapterServer) -> None:
    served = tensor_parallel
    beta(served, 2)
    assert load(served, "beta")[0] == 200
    served.check_alone("beta", LONG)
    with (served.folder / "beta" / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(1000)
    status, message = load(served, "beta", load_inplace=True)
    assert (status, WEIGHTS_FILE in message) == (400, True)
    served.check_at_once(["beta", "alpha", "base"])
    unload(served, "beta")


def test_new_weights_under_a_known_name_and_path(tensor_parallel: AdapterServer) -> None:
    """Reloaded in place, or unloaded and loaded: not what the prefix cache has of the old ones."""
    served = tensor_parallel
    beta(served, 3)
    assert load(served, "beta")[0] == 200
    served.check_alone("beta", LONG)
    beta(served, 4)
    assert load(served, "beta", load_inplace=True)[0] == 200
    served.check_alone("beta", LONG)
    beta(served, 5)
    unload(served, "beta")
    assert load(served, "beta")[0] == 200
    served.check_alone("beta", LONG)
    unload(served, "beta")


def test_files_that_vanish_are_not_missed(tensor_parallel: AdapterServer) -> None:
    """Of six adapters four are in slots and in vLLM's cache; the others come back from what the plugin keeps."""
    served = tensor_parallel
    names = [f"gone{i}" for i in range(6)]
    for seed, name in enumerate(names):
        beta(served, 10 + seed, name)
        assert load(served, name)[0] == 200
    for name in names[::2]:
        shutil.rmtree(served.folder / name)
    for name in names[1::2]:
        (served.folder / name / WEIGHTS_FILE).write_bytes(b"no weights")
    served.check_at_once([*names, *KINDS])
    for name in names:
        unload(served, name)


def test_pipeline_parallel_answers(pipeline_parallel: AdapterServer) -> None:
    for name in KINDS:
        pipeline_parallel.check_alone(name, PROMPTS[0])
    pipeline_parallel.check_at_once([*KINDS, *SUMS])


def test_each_stage_answers_for_its_layers(pipeline_parallel: AdapterServer) -> None:
    """What only the last stage can use is served; a module or a shape that no stage has is refused."""
    served = pipeline_parallel
    last = {name: shape for name, shape in BETA.items() if name.startswith("model.layers.3.")}
    # More terms than the rank that vLLM allows LoRA, 16: they are not what it is.
    served.references["last"] = write_soka(served.folder / "last", random_factors(last, 40, seed=8, scale=0.06))
    assert load(served, "last")[0] == 200
    served.check_alone("last", PROMPTS[1])
    unload(served, "last")
    for shapes, expected in (
        ({module(3, "k"): (16, 8, 8, 16)}, "the served weight is (64, 128)"),
        ({module(0, "k"): (16, 8, 8, 16), module(3, "k"): (16, 8, 8, 16)}, "layers.0.self_attn.k_proj"),
        ({module(4, "q"): (16, 8, 8, 16)}, "model.layers.4.self_attn.q_proj: no layer of the served model"),
        ({"model.layers.3.self_attn.z_proj": (16, 8, 8, 16)}, "model.layers.3.self_attn.z_proj: no layer"),
        ({"lm_head": (2, 8, 313, 16)}, "lm_head: no layer"),
    ):
        shutil.rmtree(served.folder / "bad", ignore_errors=True)
        write_adapter(served.folder / "bad", random_factors(shapes, 1, 7, 0.1), base_model="builtin")
        status, message = load(served, "bad")
        assert status == 400, message
        assert expected in message
        assert all(name in message for name in shapes)
    served.check_at_once(KINDS)


def test_a_file_of_lycoris(pipeline_parallel: AdapterServer) -> None:
    """It has no dots in its names, and no stage knows the other's modules."""
    served = pipeline_parallel
    shapes = {module(0, "q"): (8, 4, 16, 32), module(3, "down"): (4, 11, 32, 32)}
    factors = {
        name: Factors(f.left[:1], f.right[:1], torch.ones(1))
        for name, f in random_factors(shapes, 1, seed=9, scale=1.0).items()
    }
    tensors = {}
    for name, f in factors.items():
        flat = "lycoris_" + name.replace(".", "_")
        f.left.mul_(0.05)
        tensors |= {f"{flat}.lokr_w1": f.left[0], f"{flat}.lokr_w2": f.right[0], f"{flat}.alpha": torch.tensor(4.0)}
    (served.folder / "lycoris").mkdir()
    save_file(tensors, served.folder / "lycoris" / "kron.safetensors")
    served.references["lycoris"] = with_delta(factors)
    status, message = load(served, "lycoris")
    assert status == 200, message
    served.check_alone("lycoris", PROMPTS[0])
    unload(served, "lycoris")
    save_file(
        {**tensors, "lycoris_lm_head.lokr_w1": torch.ones(2, 2), "lycoris_lm_head.lokr_w2": torch.ones(313, 64)},
        served.folder / "lycoris" / "kron.safetensors",
    )
    status, message = load(served, "lycoris")
    assert (status, "lm_head: no layer" in message) == (400, True), message


def test_a_request_whose_adapter_cannot_be_read_is_refused_alone(pipeline_parallel: AdapterServer) -> None:
    """Nothing is kept here: an evicted adapter is read again, and must be what was loaded."""
    served = pipeline_parallel
    names = [f"gone{i}" for i in range(5)]
    for seed, name in enumerate(names):
        beta(served, 20 + seed, name)
        assert load(served, name)[0] == 200
    shutil.rmtree(served.folder / "gone0")
    beta(served, 30, "gone1")
    ask = {"prompt": PROMPTS[0], "max_tokens": 4}
    for name, reason in (("gone0", "gone0"), ("gone1", "has changed since it was loaded")):
        assert served.server.post("/v1/completions", {"model": name, **ask})[0] == 500
        assert any("is refused" in line and reason in line for line in served.server.log.read_text().splitlines()), (
            reason
        )
    served.check_at_once(["gone2", "gone3", "gone4", *KINDS])
    assert load(served, "gone1", load_inplace=True)[0] == 200
    served.check_alone("gone1", PROMPTS[0])
