"""Training data: rows, templates, tokens, batches."""
