"""The base model: its files, its modules, and how it is opened."""
