"""Adapters added to a base's weights, shard by shard."""
