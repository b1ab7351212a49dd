"""The TOML manifest: its schema, reading it, and reporting every problem with its place."""
