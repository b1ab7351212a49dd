"""The adapter on disk: its format, and what is made of one (export, a look inside)."""
