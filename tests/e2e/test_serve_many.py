"""Hundreds of adapters in slots at once: what they take, and that each answers as itself."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from soka_serve.adapter.format import write_adapter
from soka_serve.kron import Factors
from soka_vllm.ops.torch_ops import ROW_FIELDS
from soka_vllm.slots import SlotStore
from tests.support.serve_adapters import ATOL_NATS, TARGET_OPTIONS, expected_answers, module
from tests.support.serving import ONE_PROCESS, Server, base_model, greedy_logprobs, random_factors, serve, with_delta

MANY = 256
TOKENS = 6
# Rank and shapes go round with these, so that neighbours in slots differ; each touches every kind of layer.
SHAPES = [
    {"q": (16, 8, 8, 16), "o": (8, 8, 16, 16), "up": (22, 8, 16, 16)},
    {"k": (8, 16, 8, 8), "v": (4, 8, 16, 16), "down": (8, 22, 16, 16)},
    {"q": (8, 16, 16, 8), "gate": (16, 16, 22, 8), "down": (16, 16, 8, 22)},
]
WIDTHS = {("q", "k", "v"): 128, ("o",): 128, ("gate", "up"): 128, ("down",): 352}  # layers of the base: in_features
OUT = {"q": 128, "k": 64, "v": 64, "o": 128, "gate": 352, "up": 352, "down": 128}


def factors_of(i: int) -> dict[str, Factors]:
    """Adapter number i: three modules of one layer."""
    shapes = {module(i % 4, name): shape for name, shape in SHAPES[i % 3].items()}
    return random_factors(shapes, 1 + i % 5, seed=1000 + i, scale=0.1)


def nbytes_of(factors: Mapping[str, Factors], itemsize: int) -> int:
    """What Left and Right take; sigma is multiplied into Left."""
    return sum(itemsize * (f.left.numel() + f.right.numel()) for f in factors.values())


def test_slots_take_what_their_factors_need() -> None:
    """All 256 adapters in the slots of the base's layers: the bytes of their factors, and a row of the table each."""
    stores = {
        (layer, names): SlotStore(MANY + 1, [OUT[name] for name in names], width, torch.float32, "cpu")
        for layer in range(4)
        for names, width in WIDTHS.items()
    }
    needed = 0
    for i in range(MANY):
        factors = factors_of(i)
        needed += nbytes_of(factors, 4)
        for (layer, names), store in stores.items():
            for index, name in enumerate(names):
                if (f := factors.get(module(layer, name))) is not None:
                    store.put(i, index, f.left * f.sigma[:, None, None], f.right)
    assert sum(store.nbytes for store in stores.values()) == needed + table_nbytes(stores.values(), MANY + 1)


def table_nbytes(stores: Iterable[SlotStore], slots: int) -> int:
    return sum(ROW_FIELDS * 8 * len(store.widths) * slots for store in stores)


@pytest.mark.parametrize(
    ("modules", "layers"), [(("q", "k", "v", "o"), 32), (("q", "k", "v", "o", "gate", "up", "down"), 12)]
)
def test_a_million_parameters_at_llama_2_7b(modules: tuple[str, ...], layers: int) -> None:
    """At most 3 MB per slot in bfloat16, with a thousand slots made for; at rank 1 with the most even factors."""
    out = {"q": 4096, "k": 4096, "v": 4096, "o": 4096, "gate": 11008, "up": 11008, "down": 4096}
    packed = {("q", "k", "v"): 4096, ("o",): 4096, ("gate", "up"): 4096, ("down",): 11008}
    slots, filled = 1000, 3
    parameters = nbytes = tables = 0
    for layer in range(32):
        for names, width in packed.items():
            store = SlotStore(slots, [out[name] for name in names], width, torch.bfloat16, "cpu")
            for slot in range(filled):
                for index, name in enumerate(names):
                    if name in modules and layer < layers:
                        left, right = torch.ones(1, out[name] // 64, width // 64), torch.ones(1, 64, 64)
                        store.put(slot, index, left, right)
                        parameters += left.numel() + right.numel() + 1
            nbytes += store.nbytes - store.table.nbytes
            tables += store.table.nbytes
    assert 0.9e6 < parameters / filled < 1.1e6
    assert nbytes / filled + tables / slots <= 3e6
    assert nbytes == 2 * (parameters - filled * layers * len(modules))


@dataclass
class AdapterFleet:
    """A server, the folder of its adapters, one prompt, and for each name its greedy answer and log-probabilities."""

    server: Server
    folder: Path
    prompt: list[int]
    answers: dict[str, list[int]]
    logprobs: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterFleet]:
    folder = tmp_path_factory.mktemp("many")
    prompts = torch.randint(3, 600, (4, 20), generator=torch.Generator().manual_seed(0))
    plain = base_model()
    prompt = prompts[int(expected_answers(plain, prompts, TOKENS)[1].argmax())]
    answers, logprobs = {}, {}
    for i in range(-1, MANY):
        name, model = "base", plain
        if i >= 0:
            name, factors = f"a{i}", factors_of(i)
            write_adapter(folder / name, factors, base_model="builtin")
            model = with_delta(factors, copy.deepcopy(plain))
        answer, lead = expected_answers(model, prompt[None], TOKENS)
        answers[name] = answer[0].tolist()
        logprobs[name] = greedy_logprobs(model, prompt.tolist(), answers[name]).max(-1).values
        if lead < 10 * ATOL_NATS:  # rounding may choose another token there
            del answers[name]
    options = [*TARGET_OPTIONS, "--max-loras", str(MANY), "--max-cpu-loras", str(MANY), "--max-num-seqs", "64"]
    with serve(folder, options, more=ONE_PROCESS) as server:
        yield AdapterFleet(server, folder, prompt.tolist(), answers, logprobs)


@pytest.mark.slow
def test_every_one_of_many_answers_as_itself(many: AdapterFleet) -> None:
    names = list(many.logprobs)
    for name in names[1:]:
        status, reply = many.server.load(name, many.folder / name)
        assert status == 200, (name, reply)
    assert [card["id"] for card in many.server.get("/v1/models")["data"]] == names
    log = many.server.log.read_text()
    for i in (0, 1, MANY - 1):
        assert f"'a{i}' from {many.folder / f'a{i}'}: 3 modules" in log
        assert f" {nbytes_of(factors_of(i), 4)} bytes in torch.float32" in log
    for name in names[1:]:
        shutil.rmtree(many.folder / name)  # they live in their slots
    assert len(many.answers) > 0.9 * len(names)
    for turn in (1, 7):  # neighbours in a batch change
        order = [names[turn * i % len(names)] for i in range(len(names))]
        with ThreadPoolExecutor(64) as pool:
            got = dict(
                zip(order, pool.map(lambda name: many.server.ask(name, many.prompt, TOKENS), order), strict=True)
            )
        assert len(got) == len(names)
        wrong = [name for name, answer in many.answers.items() if got[name][0] != answer]
        assert not wrong, f"{len(wrong)} of {len(names)} answers are wrong: {wrong[:20]}"
        served = torch.tensor([got[name][1] for name in names], dtype=torch.float64)
        right = [name in many.answers for name in names]
        error = (served - torch.stack(list(many.logprobs.values())))[right].abs().max()
        assert float(error) < ATOL_NATS
        # No two answer alike, the base included: every one has its own effect.
        apart = torch.cdist(served, served, p=float("inf")).fill_diagonal_(1.0)
        assert float(apart.min()) > 10 * ATOL_NATS, apart.min(1).values.sort()
