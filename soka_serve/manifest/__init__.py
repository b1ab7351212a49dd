"""The TOML manifest: its keys, how it is read, and what is said of a wrong one."""
