"""From a manifest to an adapter, a merged model and a report."""
