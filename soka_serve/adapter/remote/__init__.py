"""Adapters that are kept elsewhere (a hub, object stores, web servers), fetched into a cache of bounded size."""
