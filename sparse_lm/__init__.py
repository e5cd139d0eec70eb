"""Sparse expert language models in JAX and Flax."""

from flax import nnx

from sparse_lm.threefry import write_out_on_cpus

# NNX modules are used as plain pytrees under plain jax transformations. Graph mode (shared references, automatic
# state propagation) is off for the whole package, so that nothing is updated behind a transformation's back.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
write_out_on_cpus()

__version__ = "0.1.0"
