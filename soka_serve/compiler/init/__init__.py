"""The factors at step 0: decomposition of the weights, and the number of terms."""
