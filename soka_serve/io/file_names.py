"""Names of an adapter's files, which PEFT, vLLM and the Hugging Face hub know, and of the file of provenance."""

from __future__ import annotations

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LOCK_FILE = "soka.lock"
CARD_FILE = "README.md"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, LOCK_FILE, CARD_FILE)
