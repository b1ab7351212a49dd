"""Adapters behind vLLM's OpenAI API: `soka-serve serve` and `doctor`."""
