"""The hardware that a function is traced and lowered for."""

from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.interpreters import ad, batching, mlir

from pallas_kernels import varying


def mesh_device() -> jax.sharding.AbstractDevice | None:
    """Return the kind of device that the mesh of `jax.set_mesh` is made of; None: no mesh is set, or of no kind."""
    return jax.sharding.get_abstract_mesh().abstract_device


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": that of the mesh of `jax.set_mesh`, or of the default backend where none is set."""
    device = mesh_device()
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """Return the kind of device, "TPU v6 lite" say: of that mesh, or of the default backend."""
    device = mesh_device()
    return jax.devices()[0].device_kind if device is None else device.device_kind


def unpartitioned() -> bool:
    """Tell whether a function traced now stays on one device: there is one, or this is inside `jax.shard_map`.

    The compiler cannot partition a kernel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    return devices == 1 or (not mesh.empty and mesh.are_all_axes_manual)


def _interpreted(like: jax.Array) -> bool:
    """Tell whether Pallas kernels traced now are interpreted, under `force_tpu_interpret_mode()` say."""
    call = pl.pallas_call(lambda _: None, out_shape=varying.out_struct_like(like, (1,), jnp.float32))
    (equation,) = jax.make_jaxpr(call)().eqns
    return bool(equation.params["interpret"])


# The platform is known at lowering, not while tracing. Hence an identity operation with a lowering rule that checks it.
_assert_platform = jax.extend.core.Primitive("assert_platform")
_assert_platform.def_abstract_eval(lambda value, **_: value)
_assert_platform.def_impl(lambda value, **params: jax.jit(lambda value: _assert_platform.bind(value, **params))(value))
batching.primitive_batchers[_assert_platform] = lambda values, axes, **params: (
    _assert_platform.bind(*values, **params),
    axes[0],
)


def _second_derivative(_primals: Any, _tangents: Any, *, name: str, **_: Any) -> Any:
    """Refuse: kernels have a VJP of their own, so that only its derivative gets here."""
    raise ValueError(
        f"implementation {name!r} has first derivatives alone, in reverse mode; for second derivatives, jax.jvp and "
        "jax.jacfwd use implementation 'reference'"
    )


ad.primitive_jvps[_assert_platform] = _second_derivative


def _lower(ctx: mlir.LoweringRuleContext, value: Any, *, name: str, wanted: str, advice: str) -> list[Any]:
    others = [found for found in ctx.module_context.platforms if found != wanted]
    if others:
        raise ValueError(
            f"implementation {name!r} cannot serve this call: it is lowered for {', '.join(others)}, and the kernels "
            f"are for {wanted}. Leave `implementation` (`kernels.ssd` of a config) at None or name a portable one "
            f"(associative, sequential){advice}"
        )
    return [value]


mlir.register_lowering(_assert_platform, _lower)


def assert_platform(value: jax.Array, name: str, wanted: str, interpreter: str | None = None) -> jax.Array:
    """Return `value`, an operand of a kernel; lowering it for another platform than `wanted` is a ValueError.

    Args:
        value: an operand.
        name: the implementation that the error names.
        wanted: "tpu" or "cuda".
        interpreter: the function that makes Pallas interpret the kernel, if there is one: under it all is served.
    """
    if interpreter is not None and _interpreted(value):
        return value
    advice = "" if interpreter is None else f"; to test on a CPU, call under {interpreter}()"
    return _assert_platform.bind(value, name=name, wanted=wanted, advice=advice)
