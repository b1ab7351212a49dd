"""Keys about what is trained: in manifests, plans, stage `init`, and training runs with their resume points."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from soka_serve.adapter.export import export
from soka_serve.adapter.format import read_adapter
from soka_serve.base.base import Base
from soka_serve.base.target_modules import resolve_targets
from soka_serve.builtin import base_directory
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.compiler.init.result import Initialisation
from soka_serve.compiler.keys import stage_keys
from soka_serve.compiler.train.trainer import SokaTrainer
from soka_serve.errors import ManifestError, PlanError
from soka_serve.kron.factors import Factors, subtract_terms
from soka_serve.manifest.read import parse_manifest
from soka_serve.manifest.rules import Adapt
from soka_serve.manifest.schema import Manifest
from soka_serve.trained import TRAINED, Form
from tests.support.plans import tiny
from tests.support.training import make_base, make_factors, run_training, tensors_of
from tests.unit.compiler.test_keys import INPUTS, MODULES

HEAD = 'schema = 1\n[base]\nbuiltin = "tiny"\n'
TAIL = '[train]\nsteps = 1\ndata = { builtin = "math" }\n'


@pytest.mark.parametrize(
    ("rule", "train", "place", "words"),
    [
        ('train_factors = ["sgima"]', "", "5:18", "did you mean 'sigma'?"),
        ("train_factors = []", "", "5:17", "at least 1; got []"),
        ('train_factors = ["left", "left"]', "", "5:17", "a factor is named twice"),
        ('train_factors = ["sigma"]\ninit = "zero"', "", "5:1", "right is missing, which init = 'zero' starts at zero"),
        ('train_factors = ["sigma"]', 'method = "lora"', "5:1", "train_factors belongs to method = 'soka'"),
        ("right = 'dct'", "", "5:1", "right = 'dct' belongs to init = 'gradient'; the init is 'zero'"),
        (
            "init = 'gradient'\nright = 'dct'\ntrain_factors = ['sigma']",
            "",
            "7:1",
            "left is missing, which right = 'dct'",
        ),
        (
            "init = 'gradient'\nright = 'dct'\ncore = true",
            "",
            "7:1",
            "core does not go with right = 'dct', which starts",
        ),
        (
            "init = 'gradient'\nright = 'dct'",
            "right_lr = 2",
            "8:1",
            "right_lr would be ignored: no rule trains right",
        ),
        ("extra_terms = -1", "", "5:15", "at least 0"),
        (
            'train_factors = ["left", "right", "sigma"]',
            "",
            "5:1",
            "train_factors names sigma, which is trained beside left and right where sigma_lr in [train] says so: set",
        ),
        ("extra_terms = 1025", "", "5:15", "at most 1024"),
        (
            'init = "weights"',
            "left_lr = 0\nright_lr = 0\nsigma_lr = 0",
            "7:1",
            "nothing would be trained: left_lr, right_lr and sigma_lr",
        ),
        (
            'extra_terms = 1\ninit = "weights"',
            "right_lr = 0",
            "8:1",
            "right_lr = 0 does not go with extra_terms of adapt[0], which starts",
        ),
        ("init = 'zero'", "right_lr = 0", "7:1", "with init = 'zero' of adapt[0], which starts right at zero"),
        (
            "init = 'gradient'\nright = 'dct'",
            "left_lr = 0",
            "8:1",
            "right = 'dct' of adapt[0], which starts left at zero",
        ),
        (
            'core = true\ninit = "weights"',
            "sigma_lr = 0",
            "8:1",
            "nothing of adapt[0] would be trained: its rates are all 0",
        ),
        ('train_factors = ["sigma"]\ninit = "weights"', "sigma_lr = 0", "8:1", "nothing of adapt[0] would be trained"),
        ('extra_terms = 1\nrank = { policy = "budget", parameters = 99 }', "", "5:1", "which does not pay for them"),
        ("core = true", "", "5:1", "nothing would change; init = 'weights' takes it, and 'zero' is the default"),
        ("core = true", 'method = "lora"', "5:1", "core belongs to method = 'soka'"),
        (
            'weighting = "both"',
            "",
            "5:1",
            "weighting does not go with init = 'zero': nothing is decomposed; init = 'weig",
        ),
        ("core = 1", "", "5:8", "expected true or false"),
        ('core = true\ninit = "zero"', "", "5:1", "core does not go with init = 'zero', which starts right at zero"),
        ('core = true\ntrain_factors = ["sigma"]\ninit = "weights"', "", "6:1", "train_factors does not go with core"),
        (
            'core = true\nrank = { policy = "budget", parameters = 99 }\ninit = "weights"',
            "",
            "6:1",
            "does not go with core, of r x r",
        ),
        (
            'core = true\nrank = { policy = "fixed", rank = 1025 }\ninit = "weights"',
            "",
            "6:1",
            "core takes 1024 terms at most, not 1025",
        ),
        (
            'core = true\ninit = "weights"',
            "prune = { threshold = 0.1 }",
            "8:1",
            "prune does not go with core of adapt[0]",
        ),
        ('core = true\ninit = "weights"', "right_lr = 2", "8:1", "right_lr would be ignored: no rule trains right"),
        ("core = true", 'method = "full"', "5:1", "core belongs to method = 'soka'"),
        (
            'train_factors = ["sigma"]\ninit = "weights"',
            "left_lr = 0.5",
            "8:1",
            "left_lr would be ignored: no rule trains left",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(rule: str, train: str, place: str, words: str) -> None:
    text = f"{HEAD}[[adapt]]\n{rule}\n[train]\n{train}\n{TAIL.removeprefix('[train]' + chr(10))}"
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "m.toml")
    (problem,) = caught.value.problems
    assert (f"{problem.line}:{problem.column}", words in f"{problem.message} {problem.hint}") == (place, True), problem


def test_rules_that_meet_on_a_module_are_refused_there(tmp_path: Path) -> None:
    rule = '[[adapt]]\nmodules = ["q_proj"]\n'
    rules = f'[[adapt]]\ninit = "gradient"\n{rule}init = "zero"\n{rule}train_factors = ["left"]\n'
    manifest = parse_manifest(HEAD + rules + TAIL, "m.toml")
    with pytest.raises(PlanError, match=r"adapt\[2\].train_factors: right is missing, .*q_proj and 3 more"):
        resolve_targets(manifest, Base(base_directory()).layout.modules)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (
            "regularise = { sorsa = 1.0 }",
            r"train\.regularise\.sorsa: sorsa does .* init = 'zero', the default, one of",
        ),
        (
            "right_lr = 0",
            r"train\.right_lr: right_lr = 0 .* init = 'zero', the default, which starts right at zero",
        ),
    ],
)
def test_training_does_not_go_with_a_module_that_has_the_default_start(train: str, words: str) -> None:
    rules = '[[adapt]]\nmodules = ["q_proj", "k_proj"]\n[[adapt]]\nmodules = ["q_proj"]\ninit = "weights"\n'
    text = HEAD + rules + TAIL.replace("[train]\n", f"[train]\n{train}\n")
    layers = Base(base_directory()).layout.modules
    with pytest.raises(PlanError, match=rf"{words}.*\(model\.layers\.0\.self_attn\.k_proj and 3 more\)"):
        resolve_targets(parse_manifest(text, "m.toml"), layers)
    everywhere = text.replace('modules = ["q_proj"]', 'modules = ["q_proj", "k_proj"]')
    assert resolve_targets(parse_manifest(everywhere, "m.toml"), layers)


@pytest.mark.parametrize(
    ("rules", "train"),
    [
        ('[[adapt]]\ninit = "zero"\n[[adapt]]\ninit = "weights"\n', "right_lr = 0"),
        ('[[adapt]]\ninit = "zero"\n[[adapt]]\ninit = "weights"\n', "regularise = { sorsa = 1.0 }"),
        ('[[adapt]]\ninit = "weights"\n[[adapt]]\ninit = "zero"\n', "regularise = { orthogonalise = 1 }"),
        (
            '[[adapt]]\ninit = "weights"\n[[adapt]]\nmodules = ["q_proj"]\ninit = "zero"\nenabled = false\n',
            "right_lr = 0",
        ),
    ],
)
def test_a_start_that_no_module_has_is_nothing_against_training(rules: str, train: str) -> None:
    text = HEAD + rules + TAIL.replace("[train]\n", f"[train]\n{train}\n")
    assert resolve_targets(parse_manifest(text, "m.toml"), Base(base_directory()).layout.modules)


def test_a_default_is_named_only_where_no_rule_says_an_init() -> None:
    with pytest.raises(ManifestError, match="starts right at zero: nothing would change; init = 'weights' takes"):
        parse_manifest(f"{HEAD}[[adapt]]\ncore = true\n{TAIL}", "m.toml")
    with pytest.raises(ManifestError, match="nothing would change") as caught:
        parse_manifest(f'{HEAD}[[adapt]]\ncore = true\n[[adapt]]\ninit = "zero"\n{TAIL}', "m.toml")
    assert "is the default" not in str(caught.value)
    assert "init = 'weights' takes it" in str(caught.value)


def test_every_row_has_its_key_and_the_default_is_no_choice() -> None:
    assert set(TRAINED) <= set(Adapt.model_fields)
    assert set(TRAINED) <= Adapt.LATER
    assert not Adapt().form.choices
    assert not set(TRAINED) & set(Adapt().model_dump())
    rule = Adapt(train_factors=["sigma", "left"])
    assert rule.form == Form({"train_factors": ["left", "sigma"]})
    assert Adapt.model_validate(rule.model_dump()) == rule
    assert Adapt(init="gradient", right="dct").form == Form({"train_factors": ["left", "sigma"]})


def test_a_choice_reruns_from_the_initialisation() -> None:
    """Which counts parameters for a budget."""

    def keys(**rule: Any) -> dict[str, str]:
        tables = {
            "schema": 1,
            "base": {"builtin": "tiny"},
            "adapt": [{"init": "weights", "calibration_batches": 0, **rule}],
        }
        manifest = Manifest.model_validate(tables | {"train": {"steps": 3, "data": {"builtin": "math"}}})
        return stage_keys(manifest, INPUTS, MODULES)

    assert keys(train_factors=["sigma"])["init"] != keys()["init"]


# ------------------------------------------------------------------------------------------------------ plan and init


def test_plans_count_what_is_trained(tmp_path: Path) -> None:
    rank = 'init = "weights"\nrank = { policy = "fixed", rank = 8 }'
    plain = tiny(tmp_path, f"[[adapt]]\n{rank}")
    sigma = tiny(tmp_path, f'[[adapt]]\n{rank}\ntrain_factors = ["sigma"]')
    assert {m.parameters_max for m in sigma.modules} == {8}
    assert sigma.parameters_max == 8 * len(sigma.modules)
    assert sigma.adapter_bytes == plain.adapter_bytes // 2
    core = tiny(tmp_path, f"[[adapt]]\n{rank}\ncore = true")
    assert {m.parameters_max for m in core.modules} == {64}
    assert core.adapter_bytes == sigma.adapter_bytes
    assert core.memory.trained == 16 * core.parameters_max + 4 * 2 * plain.parameters_max
    own, other = sigma.memory.trained, plain.memory.trained
    assert own == 16 * sigma.parameters_max + 4 * (2 * plain.parameters_max - sigma.parameters_max)
    assert other == 16 * plain.parameters_max + 4 * plain.parameters_max


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(base_directory())


def _start(base: Base, **rule: Any) -> Initialisation:
    tables = {"schema": 1, "base": {"builtin": "tiny"}, "train": {"steps": 1, "data": {"builtin": "math"}}}
    adapt = [{"init": "weights", "calibration_batches": 0, "modules": ["q_proj", "v_proj"], **rule}]
    manifest = Manifest.model_validate(tables | {"adapt": adapt})
    with TemporaryDirectory() as scratch:
        targets = resolve_targets(manifest, base.layout.modules)
        return InitRun(targets, base, Path(scratch), progress=False).initialise()


def test_a_budget_buys_terms_by_what_of_them_is_trained(base: Base, tmp_path: Path) -> None:
    budget = {"policy": "budget", "parameters": 100}
    started = _start(base, rank=budget, train_factors=["sigma"])
    assert sum(m.rank for m in started.modules) == sum(m.parameters for m in started.modules) == 100
    started.write(tmp_path)
    again = Initialisation.read(tmp_path)
    assert (
        again.forms
        == started.forms
        == {m.module: Form({"train_factors": ["sigma"]}) for m in started.modules if m.rank}
    )
    assert "trained" not in (tmp_path / "init.json").read_text().replace('"trained": {"train_factors"', "")
    assert not _start(base).forms


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("trained") / "base")


FORMS = [Form({"train_factors": ["sigma"], "extra_terms": 1}), Form({"core": True})]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(dict(form.choices)))
def test_a_run_trains_its_form_and_resumes_bit_by_bit(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form
) -> None:
    factors = make_factors(small, rank=3)
    options: dict[str, Any] = {"factors": factors, "form": form.choices, "steps": 4, "save_every": 2}
    whole = run_training(small, tmp_path / "whole", **options)
    count = sum(form.parameters(f.rank, f.shape) for f in factors.values())
    assert whole.trainable_parameters == count < sum(f.parameters for f in factors.values())
    exported = export(whole.directory, tmp_path / "out")
    assert exported.dropped_energy_frac < 1e-12
    written = read_adapter(tmp_path / "out").factors
    assert all(written[name].rank == form.served(f.rank, subtracted=True) for name, f in factors.items())
    assert all(bool(f.sigma.any()) for f in written.values())
    step = SokaTrainer.training_step

    def interrupted(self: SokaTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    assert all(bool(t.isfinite().all()) for t in tensors_of(whole).values())
    with monkeypatch.context() as patch:
        patch.setattr(SokaTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_training(small, tmp_path / "cut", **options)
    resumed, unbroken = tensors_of(run_training(small, tmp_path / "cut", **options)), tensors_of(whole)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
    for name, f in factors.items():
        for part in ("left", "right", "sigma"):
            stayed = torch.equal(unbroken[f"base_model.model.{name}.soka_{part}"], getattr(f, part))
            assert stayed == (part in form.frozen), (name, part)


# --------------------------------------------------------------------------------------------------------- difference


@pytest.mark.parametrize("shared", [("left", "right"), ("left",), ("right",), ()], ids=str)
def test_terms_that_share_a_factor_are_subtracted_into_one(shared: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, torch.Tensor]:
        sizes = {"left": (3, 2, 4), "right": (3, 5, 3), "sigma": (3,)}
        return {part: torch.randn(size, generator=generator) for part, size in sizes.items()}

    theta, initial = draw(), draw()
    initial |= {part: theta[part] for part in shared}
    found = subtract_terms(Factors(**theta), Factors(**initial))

    def whole(terms: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = (terms[part].double() for part in ("left", "right", "sigma"))
        return torch.stack([s * torch.kron(a, b) for a, b, s in zip(*parts, strict=True)]).sum(0)

    expected = whole(theta) - whole(initial)
    got = whole({part: getattr(found, part) for part in ("left", "right", "sigma")})
    assert found.rank == (3 if shared else 6)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_rule_without_an_init_has_that_of_another() -> None:
    rules = '[[adapt]]\ninit = "weights"\n[[adapt]]\nmodules = ["q_proj"]\nscale = 0.1\n'
    parse_manifest(HEAD + rules + TAIL.replace("steps = 1", "steps = 1\nright_lr = 0"), "m.toml")
