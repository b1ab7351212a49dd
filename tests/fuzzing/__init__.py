"""Adapters, manifests, folders, caches and frames spoilt at random, and what must hold of whatever is done with them.

Used with few examples by tests/unit/test_fuzz.py and with thousands by eval/checks/fuzz.py. What attacks were made of
is among the changes, so that it is combined and shrunk with the rest.
"""
