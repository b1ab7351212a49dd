"""What counts as code of a checkpoint's own, and that one module opens models and tokenizers."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import soka_serve
from soka_serve.base.folder import ModelFolder
from soka_serve.base.foreign_code import check_no_adapter, check_no_code
from soka_serve.base.pretrained import open_model, open_tokenizer
from soka_serve.errors import CheckpointError, SokaError
from soka_serve.serving.command import ServeOptions, make_launch
from soka_serve.serving.targets import Target
from tests.support.planted import MODEL, TOKENIZER

# PEFT's own classes, and ours for it, read an adapter: a config and tensors.
OWN = {"PeftModel", "PeftConfig", "SokaConfig"}


def write(directory: Path, config: dict[str, Any], settings: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    return directory


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"model_type": "llama"}, {}),
        ({"model_type": "llama", "auto_map": MODEL}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"model_type": "gpt-sw3", "auto_map": MODEL}, {}),
        ({"model_type": "phi3", "auto_map": MODEL}, {"auto_map": TOKENIZER, "tokenizer_class": "LlamaTokenizerFast"}),
        ({"model_type": "qwen2"}, {"auto_map": TOKENIZER["AutoTokenizer"]}),
        ({"model_type": "llama"}, {"auto_map": TOKENIZER, "tokenizer_class": "Qwen2TokenizerFast"}),
        ({"model_type": "llama"}, {"auto_map": TOKENIZER, "tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"model_type": "llama"}, {"auto_map": TOKENIZER, "tokenizer_class": "TokenizersBackend"}),
        ({"model_type": "planted"}, {}),  # unknown, but with no code: another error says so
        ({"model_type": "llama", "auto_map": {"AutoModel": "planted.X"}}, {}),
        ({"model_type": "llama", "attn_implementation": "sdpa"}, {}),
        ({"model_type": "llama", "auto_map": None}, {"auto_map": {}}),
    ],
)
def test_native_checkpoints_pass(tmp_path: Path, config: dict[str, Any], settings: dict[str, Any]) -> None:
    check_no_code(ModelFolder(write(tmp_path, config, settings)))


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        ({"model_type": "planted", "auto_map": MODEL}, {}, ["config.json: auto_map", "planted.PlantedConfig"]),
        ({"auto_map": MODEL}, {}, ["model_type None"]),
        ({"model_type": ["llama"], "auto_map": MODEL}, {}, ["model_type"]),
        # transformers has a config, but no causal language model, for it
        ({"model_type": "clip", "auto_map": MODEL}, {}, ["AutoModelForCausalLM", "'clip'"]),
        ({"model_type": "llama"}, {"auto_map": TOKENIZER, "tokenizer_class": "Planted"}, ["tokenizer_config.json"]),
        ({"model_type": "llama"}, {"auto_map": TOKENIZER["AutoTokenizer"]}, ["as AutoTokenizer"]),
        ({"model_type": "llama"}, {"auto_map": "planted.Planted"}, ["as AutoTokenizer"]),
        ({"model_type": "llama", "attn_implementation": "owner/kernel"}, {}, ["attn_implementation", "owner/kernel"]),
        ({"model_type": "gemma3", "text_config": {"attn_implementation": "owner/kernel"}}, {}, ["text_config.attn_"]),
        (
            {"model_type": "planted", "auto_map": MODEL},
            {"auto_map": TOKENIZER, "tokenizer_class": "Planted"},
            ["config.json: auto_map", "tokenizer_config.json: auto_map"],
        ),
    ],
)
def test_code_is_refused(tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_no_code(ModelFolder(write(tmp_path, config, settings)))
    for text in named:
        assert text in caught.value.message
    assert "never runs code" in str(caught.value.hint)


@pytest.mark.slow  # imports transformers
def test_an_adapter_beside_a_model_is_refused(tmp_path: Path, root: Path) -> None:
    """transformers would open another model, the one that the adapter names, and add the adapter."""
    base = tmp_path / "base"
    shutil.copytree(root / "soka_serve" / "builtin" / "tiny", base)

    check_no_adapter(base)
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}))
    for refuse in (check_no_adapter, open_model):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: an adapter lies in the folder of the model"):
            refuse(base)
    manifest = tmp_path / "m.toml"
    text = 'schema = 1\n[base]\npath = "base"\n[train]\nsteps = 1\n[train.data]\nbuiltin = "math"\n'
    manifest.write_text(text)
    with pytest.raises(CheckpointError, match="an adapter lies in the folder"):
        soka_serve.plan(manifest)


@pytest.mark.slow
def test_a_tokenizer_of_wrong_settings_is_the_checkpoint_s_fault(tmp_path: Path, root: Path) -> None:
    shutil.copytree(root / "soka_serve" / "builtin" / "tiny", tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": ["a"]}))
    with pytest.raises(CheckpointError, match="transformers cannot build this tokenizer"):
        open_tokenizer(tmp_path / "base")


def test_it_agrees_with_transformers(tmp_path: Path) -> None:
    """What is read from the sources is what transformers itself would say."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wrong = []
    for kind in CONFIG_MAPPING_NAMES:
        native = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        try:
            check_no_code(ModelFolder(write(tmp_path, {"model_type": kind, "auto_map": MODEL})))
            passed = True
        except CheckpointError:
            passed = False
        if passed != native:
            wrong.append(kind)
    assert wrong == []


def test_it_imports_neither_torch_nor_transformers(tmp_path: Path, root: Path) -> None:
    write(tmp_path, {"model_type": "llama", "auto_map": MODEL}, {"auto_map": TOKENIZER, "tokenizer_class": "X"})
    code = (
        "import sys\nfrom pathlib import Path\nfrom soka_serve.base.folder import ModelFolder\n"
        "from soka_serve.base.foreign_code import check_no_code\n"
        f"try:\n    check_no_code(ModelFolder(Path({str(tmp_path)!r})))\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["CheckpointError", "[]"]


def test_one_module_opens_models_and_tokenizers(root: Path) -> None:
    """`from_pretrained` of anything but PEFT is in base/pretrained.py only; trust_remote_code is False always."""
    found, allowed = [], 0
    for file in sorted([*root.glob("soka_serve/**/*.py"), *root.glob("plugins/**/*.py"), *root.glob("eval/**/*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            for keyword in node.keywords if isinstance(node, ast.Call) else ():
                if keyword.arg == "trust_remote_code":
                    assert isinstance(keyword.value, ast.Constant), f"{file}:{node.lineno}"
                    assert keyword.value.value is False, f"{file}:{node.lineno}"
            if not isinstance(node, ast.Attribute) or not node.attr.startswith(("from_pretrained", "from_config")):
                continue
            if isinstance(node.value, ast.Name) and node.value.id in OWN:
                continue
            if file == root / "soka_serve" / "base" / "pretrained.py":
                allowed += 1
            else:
                found.append(f"{file.relative_to(root)}:{node.lineno}")
    assert found == []
    assert allowed == 4


@pytest.mark.parametrize(
    "option", ["--trust-remote-code", "--trust_remote_code", "--trust-rem", "--trust-remote-code=1"]
)
def test_vllm_is_never_told_to_trust_code(tmp_path: Path, option: str) -> None:
    target = Target(given="m", name="m", kind="merged", path=write(tmp_path, {"model_type": "llama"}))
    with pytest.raises(SokaError, match="never run"):
        make_launch([target], None, ServeOptions(vllm=(option,)))
