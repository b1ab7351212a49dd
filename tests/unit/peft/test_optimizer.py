"""Learning rates of the factors."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from soka_serve.compiler.methods import METHODS, StartingPoint
from soka_serve.errors import CheckpointError, PlanError
from soka_serve.kron import dense_delta
from soka_serve.kron.factors import random_terms
from soka_serve.kron.shapes import FactorShape
from soka_serve.manifest.rules import SMALL
from soka_serve.peft import SokaConfig, create_soka_optimizer, hotswap_adapter, soka_layers

SHAPES = [(16, 16, 16, 16), (64, 16, 24, 36), (2, 64, 128, 4), (8, 4, 8, 128)]


def _adapted(shape: tuple[int, int, int, int], **options: object) -> tuple[nn.Module, nn.Module]:
    """A layer with terms of the weight, unless another start is asked for."""
    m, n, p, q = shape
    options.setdefault("init_soka_weights", "weights")
    base = nn.Sequential(nn.Linear(n * q, m * p, bias=False))
    model = peft.get_peft_model(base, SokaConfig(target_modules=["0"], shape=list(shape), **options))
    return model, soka_layers(model)["0"]


def _size(layer: nn.Module) -> float:
    """Root mean square of Left's entries."""
    return layer.soka_left["default"].square().mean().sqrt().item()


@pytest.mark.parametrize(("shape", "scale"), [*zip(SHAPES, (1.0, 0.1, 1.0, 0.1), strict=True)])
@pytest.mark.parametrize("part", ["left", "right", "sigma"])
def test_a_step_changes_an_output_by_lr_times_the_typical_one(
    shape: tuple[int, int, int, int], scale: float, part: str
) -> None:
    """A step aligns with the one output that is asked for; normal entries are sqrt(2/pi) of their RMS in the mean.

    Of Left and Right times the root of n, or q, over the shape's spread.
    """
    width = shape[1] * shape[3]
    aligned = {"left": shape[1], "right": shape[3]}
    share = math.sqrt(aligned[part] / FactorShape(*shape).spread) if part in aligned else 1.0
    others = {f"{name}_lr": 0.0 for name in ("left", "right", "sigma") if name != part}
    changes = []
    for seed in range(48):
        torch.manual_seed(seed)
        model, layer = _adapted(shape, init_soka_weights="random", init_scale=scale)
        typical = scale * layer.get_base_layer().weight.square().mean().sqrt()
        x = torch.randn(1, width)
        optimizer = create_soka_optimizer(model, lr=0.01 / math.sqrt(SMALL), **others)  # not subtracted
        before = model(x)[0, 3]
        before.backward()
        optimizer.step()
        changes.append(((before - model(x)[0, 3]) / (typical * x.norm())).item())
    assert sum(changes) / 48 == pytest.approx(0.01 * math.sqrt(2 / math.pi) * share, rel=0.25)


@pytest.mark.parametrize(
    "shape", [(16, 16, 16, 16), (64, 4, 4, 64), (256, 1, 1, 256), (1, 256, 256, 1), (8, 8, 64, 64), (32, 24, 48, 18)]
)
def test_terms_of_any_shape_grow_to_the_same_largest_singular_value(shape: tuple[int, int, int, int]) -> None:
    """Here of moves in random directions, by one rate each: 4 sigma RMS(Left) RMS(Right) lr^2, with one module."""
    torch.manual_seed(0)
    model, layer = _adapted(shape)
    rates = [group["lr"] for group in create_soka_optimizer(model, lr=1.0).param_groups]
    sizes = [float(getattr(layer, f"soka_{p}")["default"].detach().square().mean().sqrt()) for p in ("left", "right")]
    (m, n, p, q) = shape
    moves = [(rate * torch.randn(20, *size).sign()) for rate, size in zip(rates, ((m, n), (p, q)), strict=True)]
    left, right = (torch.linalg.matrix_norm(move.double(), 2).mean() for move in moves)
    found = left * right  # of their Kronecker product
    assert float(found) == pytest.approx(4 * sizes[0] * sizes[1], rel=0.25)


def test_factors_of_any_size_move_by_the_same_share_of_themselves() -> None:
    """Finished adapters have factors of unit norm."""
    moved = []
    for size in (1.0, 1 / 16):
        model, layer = _adapted((16, 16, 16, 16))
        with torch.no_grad():
            layer.soka_left["default"].mul_(size)
            layer.soka_sigma["default"].div_(size)
        before = layer.soka_left["default"].clone()
        model(torch.ones(1, 256)).sum().backward()
        create_soka_optimizer(model, lr=0.01).step()
        moved.append((layer.soka_left["default"] - before).norm() / before.norm())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("init", "pace"), [("weights", 1.0), ("zero", 1.0), ("random", math.sqrt(SMALL))])
def test_terms_that_are_a_delta_move_as_if_they_were_as_large_as_the_weight(init: str, pace: float) -> None:
    """SokaConfig's random ones are not subtracted."""
    model, layer = _adapted((16, 16, 16, 16), init_soka_weights=init)
    rate = create_soka_optimizer(model, lr=1.0).param_groups[0]["lr"]
    assert rate == pytest.approx(pace / 4 * _size(layer))


@pytest.mark.parametrize(
    ("init", "others", "trained"),
    [
        ("weights", {}, {"left", "right"}),
        ("zero", {}, {"left", "right"}),
        ("random", {}, {"left", "right", "sigma"}),  # a delta, of its own size
        ("weights", {"sigma_lr": 0.5}, {"left", "right", "sigma"}),
        ("weights", {"left_lr": 0.0}, {"right"}),
        ("weights", {"left_lr": 0.0, "right_lr": 0.0}, {"sigma"}),
    ],
)
def test_sigma_is_trained_where_it_is_no_repetition(init: str, others: dict[str, float], trained: set[str]) -> None:
    model, layer = _adapted((16, 16, 16, 16), init_soka_weights=init)
    optimizer = create_soka_optimizer(model, lr=1.0, **others)
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {p for p in ("left", "right", "sigma") if id(getattr(layer, f"soka_{p}")["default"]) in moved} == trained
    assert layer.soka_sigma["default"].requires_grad == ("sigma" in trained)


def test_a_delta_beside_terms_that_are_subtracted_is_a_delta() -> None:
    """Its module has initial factors too then, with sigmas of zero."""
    model, layer = _adapted((16, 16, 16, 16))
    layer.soka_sigma_initial["default"].data.zero_()
    rate = create_soka_optimizer(model, lr=1.0).param_groups[0]["lr"]
    assert rate == pytest.approx(math.sqrt(SMALL) / 4 * _size(layer))


@pytest.mark.parametrize("size", [1.0, 1 / 16])
def test_a_delta_of_zero_moves_outputs_like_small_terms(size: float) -> None:
    """Its sigmas have no size, and the first step moves nothing else: the factors have no gradients yet."""
    model, layer = _adapted((16, 16, 16, 16), init_soka_weights="random", init_scale=1.0)
    with torch.no_grad():
        layer.soka_left["default"].mul_(size)
        layer.soka_sigma["default"].zero_()
    x = torch.randn(64, 256)
    before = model(x)
    before.square().sum().backward()
    create_soka_optimizer(model, lr=8.0).step()
    change = (model(x) - before).square().mean().sqrt() / x.square().mean().sqrt()
    assert change.item() == pytest.approx(8.0 * SMALL, rel=0.2)


def test_factors_that_are_still_to_be_loaded_have_no_rates() -> None:
    model, _ = _adapted((16, 16, 16, 16), init_soka_weights=False)
    with pytest.raises(CheckpointError, match="never loaded"):
        create_soka_optimizer(model, lr=0.3)


@pytest.mark.parametrize("size", [0, 7])
def test_factors_that_were_flattened_have_no_rates(size: int) -> None:
    """As FSDP 1 leaves a process its share of them, and ZeRO 3 nothing."""
    model, layer = _adapted((16, 16, 16, 16))
    for part in (layer.soka_left, layer.soka_right):
        part["default"].data = part["default"].data.flatten()[:size]
    with pytest.raises(PlanError, match=r"0: its factors are sharded as flat tensors.*") as raised:
        create_soka_optimizer(model, lr=0.3)
    assert "fsdp_version: 2" in str(raised.value.hint)


def test_terms_share_the_square_of_the_way_and_modules_its_root() -> None:
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model = peft.get_peft_model(base, SokaConfig(target_modules=["0", "1"], rank_pattern={"0": 6}, r=3))
    lefts = [group["lr"] for group in create_soka_optimizer(model, lr=0.3).param_groups[::2]]
    assert lefts == pytest.approx(
        [
            0.3 / 2 / math.sqrt(len(layer.soka_sigma["default"]) * math.sqrt(2)) * _size(layer)
            for layer in soka_layers(model).values()
        ]
    )


def _adamw(start: Tensor, gradients: list[Tensor], rate: float, decay: float, towards: Tensor) -> Tensor:
    """AdamW (arXiv:1711.05101, algorithm 2) in numbers, with decay towards a given value."""
    value, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        moved = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        value = value - rate * moved - rate * decay * (value - towards)
    return value


@pytest.mark.parametrize("init", ["weights", "random", "zero"])
def test_weight_decay_is_adamws_towards_a_delta_of_zero(init: str) -> None:
    """To the initial factors where they are subtracted (a start from weights), to zero for all else."""
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).double()
    config = SokaConfig(target_modules=["0"], modules_to_save=["1"], r=2, init_soka_weights=init)
    model = peft.get_peft_model(base, config)
    optimizer = create_soka_optimizer(model, lr=0.2, weight_decay=0.5)
    trained = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups for _ in group["params"]]
    gradients: list[list[Tensor]] = []
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 16, dtype=torch.float64)).square().mean().backward()
        gradients.append([p.grad.clone() for p, _ in trained])
        optimizer.step()
    subtracted = 2 if init == "weights" else 0
    towards = [start if number < subtracted else torch.zeros_like(start) for number, (_, start) in enumerate(trained)]
    for (value, start), rate, target, *found in zip(trained, rates, towards, *gradients, strict=True):
        expected = _adamw(start, found, rate, 0.5, target)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=1e-12)


def test_weight_decay_alone_leaves_a_fresh_adapter_as_it_is() -> None:
    """And brings a trained one back to the base."""
    model, layer = _adapted((16, 16, 16, 16), init_soka_weights="weights", init_scale=16 * math.sqrt(3))  # sizes of 1
    optimizer = create_soka_optimizer(model, lr=1.0, weight_decay=1.0)
    sizes = []
    for factor in (1.0, 1.1):
        with torch.no_grad():
            layer.soka_left["default"].mul_(factor)
        for _ in range(40):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            sizes.append(layer.get_delta_weight("default").norm().item())
    assert sizes[39] == 0
    assert 0 < sizes[-1] < 0.01 * sizes[40]


def test_weight_decay_refuses_factors_that_are_sharded_apart() -> None:
    model, layer = _adapted((16, 16, 16, 16), init_soka_weights="weights")
    optimizer = create_soka_optimizer(model, lr=1.0, weight_decay=1.0)
    model(torch.ones(1, 256)).sum().backward()
    start = layer.soka_left_initial["default"]
    start.data = start.data.flatten()[:1]
    with pytest.raises(PlanError, match=r"factor of \(1, 16, 16\) with its initial one of \(1,\)"):
        optimizer.step()


def test_other_parameters_have_a_rate_of_their_own_and_a_part_with_zero_is_frozen() -> None:
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    model = peft.get_peft_model(base, SokaConfig(target_modules=["0"], modules_to_save=["1"], init_soka_weights="zero"))
    optimizer = create_soka_optimizer(model, torch.optim.SGD, lr=4.0, other_lr=0.5, sigma_lr=0.0, momentum=0.9)
    left, right, others = optimizer.param_groups
    assert left["lr"] == right["lr"] == pytest.approx(4.0 / 2 * _size(soka_layers(model)["0"]))  # zeros count as Left
    assert (others["lr"], len(others["params"]), others["momentum"]) == (0.5, 2, 0.9)
    assert not soka_layers(model)["0"].soka_sigma["default"].requires_grad


def test_going_on_with_a_saved_state(tmp_path: Path) -> None:
    """As docs/python.md says: rates follow from the start, where Right is zero."""
    torch.manual_seed(0)
    weight = torch.randn(16, 16)

    def base() -> nn.Sequential:
        made = nn.Sequential(nn.Linear(16, 16, bias=False))
        made[0].weight.data.copy_(weight)
        return made

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
            (model(inputs) - inputs).square().mean().backward()
            optimizer.step()

    model = peft.get_peft_model(base(), SokaConfig(target_modules=["0"]))
    optimizer = create_soka_optimizer(model, lr=8.0)
    steps(model, optimizer, range(3))
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, range(3, 6))
    again = peft.get_peft_model(base(), SokaConfig(target_modules=["0"]))
    resumed = create_soka_optimizer(again, lr=8.0)
    peft.set_peft_model_state_dict(again, peft.load_peft_weights(tmp_path))
    resumed.load_state_dict(state)
    steps(again, resumed, range(3, 6))
    whole, parts = (soka_layers(m)["0"] for m in (model, again))
    for part in ("left", "right", "sigma"):
        assert torch.equal(getattr(whole, f"soka_{part}")["default"], getattr(parts, f"soka_{part}")["default"])


def test_what_is_frozen_stays_so_when_peft_thaws_the_adapter() -> None:
    model, layer = _adapted((4, 4, 4, 4), init_soka_weights="zero")
    create_soka_optimizer(model, lr=1.0)
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    trains = {part: getattr(layer, f"soka_{part}")["default"].requires_grad for part in ("left", "right", "sigma")}
    assert trains == {"left": True, "right": True, "sigma": False}
    create_soka_optimizer(model, lr=1.0, sigma_lr=1.0, left_lr=0.0)  # which says otherwise
    model.set_adapter("default")
    trains = {part: getattr(layer, f"soka_{part}")["default"].requires_grad for part in ("left", "right", "sigma")}
    assert trains == {"left": False, "right": True, "sigma": True}


def trains(layer: nn.Module) -> set[str]:
    parts = ("left", "right", "sigma")
    return {part for part in parts if getattr(layer, f"soka_{part}")["default"].requires_grad}


def test_rates_that_leave_nothing_to_train_are_refused_and_freeze_nothing() -> None:
    model, layer = _adapted((4, 4, 4, 4))
    with pytest.raises(ValueError, match="left_lr, right_lr and sigma_lr leave nothing to train"):
        create_soka_optimizer(model, lr=1.0, left_lr=0.0, right_lr=0.0, sigma_lr=0.0)
    assert len(create_soka_optimizer(model, lr=1.0).param_groups) == 2
    assert trains(layer) == {"left", "right"}
    model.requires_grad_(False)
    with pytest.raises(PlanError, match="no parameter of the model needs gradients"):
        create_soka_optimizer(model, lr=1.0)
    assert not trains(layer)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("key", ["lr", "left_lr", "sigma_lr", "other_lr", "weight_decay"])
def test_rates_are_numbers_from_zero(key: str, value: float) -> None:
    model, layer = _adapted((4, 4, 4, 4))
    with pytest.raises(PlanError, match=f"{key}: expected a finite number from 0; got {value}"):
        create_soka_optimizer(model, **{"lr": 1.0} | {key: value})
    assert trains(layer) == {"left", "right", "sigma"}


def test_an_adapter_that_is_held_whole_can_be_trained_again() -> None:
    """Where the rest of the model is trained: what is left out by one optimiser is not lost to the next."""
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    model = peft.get_peft_model(base, SokaConfig(target_modules=["0"], modules_to_save=["1"]))
    (layer,) = soka_layers(model).values()
    (others,) = create_soka_optimizer(model, lr=1.0, left_lr=0.0, right_lr=0.0, sigma_lr=0.0).param_groups
    assert len(others["params"]) == 2
    model.set_adapter("default")
    assert not trains(layer)
    create_soka_optimizer(model, lr=1.0, right_lr=0.0)
    assert trains(layer) == {"left"}


def test_an_adapter_that_is_not_active_is_not_thawed() -> None:
    model, layer = _adapted((4, 4, 4, 4))
    create_soka_optimizer(model, lr=1.0)
    model.add_adapter("other", SokaConfig(target_modules=["0"], shape=[4, 4, 4, 4]))
    model.set_adapter("other")
    create_soka_optimizer(model, lr=1.0)
    assert not trains(layer)
    model.set_adapter("default")
    assert trains(layer) == {"left", "right"}


@pytest.mark.parametrize("trained", [True, False])
def test_what_was_held_is_trained_after_a_hot_swap(tmp_path: Path, trained: bool) -> None:
    options = {"init_soka_weights": "weights", "init_scale": 0.5}
    _adapted((4, 4, 4, 4), **options)[0].save_pretrained(tmp_path)
    model, layer = _adapted((4, 4, 4, 4), **options)
    create_soka_optimizer(model, lr=1.0)
    if not trained:
        model.requires_grad_(False)
    hotswap_adapter(model, str(tmp_path))
    assert trains(layer) == ({"left", "right", "sigma"} if trained else set())
    model.set_adapter("default")
    assert trains(layer) == {"left", "right", "sigma"}


def test_what_a_form_adds_is_frozen_with_the_factor_that_it_is_like() -> None:
    model, layer = _adapted((4, 4, 4, 4), soka_trained={"extra_terms": 1})
    create_soka_optimizer(model, lr=1.0, left_lr=0.0)
    model.set_adapter("default")
    trains = {part: getattr(layer, f"soka_extra_{part}")["default"].requires_grad for part in ("left", "right")}
    assert trains == {"left": False, "right": True}


def test_a_delta_decays_to_zero_beside_a_start_that_is_subtracted(tmp_path: Path) -> None:
    """A build's modules share a flag for initial factors; a start from a delta of its own has none to be pulled to."""
    factors = {name: random_terms(1, FactorShape(4, 4, 4, 4), 0.5) for name in ("0", "1")}
    base = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    start = StartingPoint(["0", "1"], 1, 1.0, "base", torch.device("cpu"), 1, tmp_path, list, factors, {"1"})
    model = METHODS["soka"].build(base, start)
    optimizer = create_soka_optimizer(model, lr=1.0, weight_decay=1.0, sigma_lr=0.0)
    for _ in range(300):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    own, subtracted = (soka_layers(model)[name] for name in ("0", "1"))
    assert own.get_delta_weight("default").norm() < 1e-3 * dense_delta(factors["0"]).norm()
    assert torch.equal(subtracted.soka_left["default"], factors["1"].left)
