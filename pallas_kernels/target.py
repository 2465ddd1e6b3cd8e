"""Which hardware a function is traced for."""

import jax


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": that of the mesh of `jax.set_mesh`, or of the default backend where none is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
