"""How many values of an adapter a GPU holds, and what the server is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from soka_serve.adapter.format import write_adapter
from soka_serve.base.modules import modules_from_config
from soka_serve.builtin import base_directory
from soka_serve.errors import SokaError
from soka_serve.io.json_files import read_json
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape, balanced_shape
from soka_serve.kron.sharding import Heads, LayerShards, column_parallel, cut, qkv_parallel, row_parallel
from soka_serve.serving import command as serving_command
from soka_serve.serving import doctor
from soka_serve.serving.command import Settings
from soka_serve.serving.serve import plan_launch
from soka_serve.serving.slots import slot_values
from tests.support.launches import write_small_adapter

# By layer of the embedded base as vLLM packs them: factor shapes that 2 ranks cannot share out evenly, nor 4.
LAYERS = [
    {
        "self_attn.q_proj": (8, 16, 16, 8),
        "self_attn.k_proj": (4, 128, 16, 1),
        "self_attn.v_proj": (64, 128, 1, 1),
    },
    {"mlp.gate_proj": (11, 8, 32, 16), "mlp.up_proj": (176, 128, 2, 1)},
    {"self_attn.o_proj": (128, 1, 1, 128)},
    {"mlp.down_proj": (8, 11, 16, 32)},
]


def _on_ranks(ranks: int) -> list[int]:
    """Values of one term of LAYERS that each rank holds, by the plugin's cuts of tensors."""

    def layers(rank: int) -> list[LayerShards]:
        return [
            qkv_parallel(Heads(4, 2, 32), 128, rank, ranks),
            column_parallel([352, 352], 128, rank, ranks),
            row_parallel(128, 128, rank, ranks),
            row_parallel(128, 352, rank, ranks),
        ]

    found = []
    for rank in range(ranks):
        values = 0
        for layer, modules in zip(layers(rank), LAYERS, strict=True):
            shapes = list(modules.values())
            for part in layer.slices:
                m, n, p, q = shapes[part.source]
                small = cut(torch.zeros(1, m, n), torch.zeros(1, p, q), part.rows, part.columns)
                values += small.left.numel() + small.right.numel()
        found.append(values)
    return found


@pytest.mark.parametrize(
    ("vllm", "ranks"),
    [
        ((), 1),
        (("--tensor-parallel-size", "1"), 1),
        (("--tensor_parallel_size=2",), 2),
        (("-tp", "4", "--pipeline-parallel-size", "2"), 4),  # more than there are key/value heads
        (("-tp", "4", "--tensor-parallel-size", "2"), 1),  # vLLM takes the last one; the whole adapter fits anyway
    ],
)
def test_slots_hold_what_the_fullest_gpu_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm: tuple[str, ...], ranks: int
) -> None:
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.Engine("vllm", "0.32.0", False))
    factors = {
        f"model.layers.{i}.{name}": Factors(torch.ones(3, m, n), torch.ones(3, p, q), torch.ones(3))
        for i in (0, 2)
        for modules in LAYERS
        for name, (m, n, p, q) in modules.items()
    }
    write_adapter(tmp_path / "large", factors, base_model=str(base_directory()))
    given = [str(write_small_adapter(tmp_path / "small")), str(tmp_path / "large")]
    values = _on_ranks(ranks)
    _, launch = plan_launch(given, Settings(vllm=vllm))
    assert launch.environment["SOKA_SLOT_PARAMETERS"] == str(3 * 2 * max(values))
    assert (max(values) > values[0]) == (ranks == 4)


def test_a_tensor_parallel_size_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_command, "find_engine", lambda: doctor.Engine("vllm", "0.32.0", False))
    with pytest.raises(SokaError, match="--tensor-parallel-size two: expected a number"):
        plan_launch([str(write_small_adapter(tmp_path / "a"))], Settings(vllm=("--tensor-parallel-size", "two")))


@pytest.mark.parametrize(("ranks", "values"), [(1, 10_977_280), (2, 8_192_000), (4, 6_799_360), (8, 6_103_040)])
def test_slots_of_a_70b(ranks: int, values: int) -> None:
    """What vLLM's own layers allocate for one term on each projection, from eval/results/fleet.json."""
    config = read_json(base_directory().parent / "configs/meta-llama--Llama-2-70b-hf/config.json")
    modules = modules_from_config(config)
    factors = {module.name: (1, balanced_shape(module.out_features, module.in_features)) for module in modules}
    assert slot_values(factors, ranks, config["num_key_value_heads"]) == values


def test_what_may_not_be_cut_counts_as_whole() -> None:
    """Shared experts always; k and v where the number of heads is not known, or there are fewer than ranks."""
    shape = FactorShape(8, 8, 8, 8)
    shared, key = ({f"model.layers.0.{name}": (2, shape)} for name in ("mlp.shared_expert.up_proj", "self_attn.k_proj"))
    whole = 2 * (64 + 64)
    assert slot_values(shared, 4, 8) == whole
    assert slot_values({"model.layers.0.mlp.up_proj": (2, shape)}, 4, 8) == 2 * (2 * 8 + 64)
    assert slot_values(key, 4, None) == slot_values(key, 4, 1) == whole
    assert slot_values(key, 4, 2) == 2 * (4 * 8 + 64)
    assert slot_values(key, 4, 8) == 2 * (2 * 8 + 64)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_projections_take_a_slot_for_each_part(ranks: int) -> None:
    """As the plugin cuts them: the parts of Left's rows, each with a Right of its own."""
    shape = FactorShape(16, 8, 8, 8)  # 128 rows: 8 heads and 4 key/value heads of 8, or gate and up of 64
    qkv = {"model.layers.0.self_attn.qkv_proj": (2, shape)}
    both = {"model.layers.0.mlp.gate_up_proj": (2, shape)}
    for factors, layer in (
        (qkv, qkv_parallel(Heads(8, 4, 8), 64, 0, ranks, fused=True)),
        (both, column_parallel([64, 64], 64, 0, ranks, fused=True)),
    ):
        left, right = torch.zeros(2, 16, 8), torch.zeros(2, 8, 8)
        cuts = [cut(left, right, part.rows, part.columns) for part in layer.slices]
        assert slot_values(factors, ranks, 4, 8) == sum(c.left.numel() + c.right.numel() for c in cuts)
    assert slot_values(qkv, ranks, 4) == 3 * 2 * (16 * 8 + 64)
