"""TransMamba in JAX and Flax: attention and Mamba-2 with one set of weights, switched inside a sequence."""
