"""Kernels that add Kronecker deltas to the output of a linear layer, for a batch of tokens of several adapters."""
