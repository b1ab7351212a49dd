"""Manifests and plans that the planning tests share: LLaMA-2-7B from its bundled config, and the builtin base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soka_serve.base.base import Base
from soka_serve.compiler.plan.plan import Plan, make_plan
from soka_serve.manifest.read import LoadedManifest, read_manifest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "soka_serve" / "builtin" / "configs"
LLAMA2_7B = CONFIGS / "meta-llama--Llama-2-7b-hf"
ATTENTION = 'modules = ["q_proj", "k_proj", "v_proj", "o_proj"]'


def load(tmp_path: Path, text: str) -> LoadedManifest:
    path = tmp_path / "m.toml"
    path.write_text("schema = 1\n" + text)
    return read_manifest(path)


def llama2(tmp_path: Path, rules: str = "[[adapt]]\n" + ATTENTION, train: str = "", **options: Any) -> Plan:
    base = '[base]\nhub = "meta-llama/Llama-2-7b-hf"'
    text = f'{base}\n{rules}\n[train]\n{train}\n[train.data]\nbuiltin = "math"\nlimit = 9'
    return make_plan(load(tmp_path, text), base=Base(LLAMA2_7B), **options)


def tiny(tmp_path: Path, rest: str = "", data: str = 'builtin = "math"\nlimit = 50', **options: Any) -> Plan:
    return make_plan(load(tmp_path, f'[base]\nbuiltin = "tiny"\n{rest}\n[train.data]\n{data}'), **options)
