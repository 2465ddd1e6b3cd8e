"""Contenders of `suite.py`: this project's SSD operator and, where they are installed, those of others.

A contender is a pair of functions of a dictionary of arrays, forward and forward + backward, that start the work and
return its results; `wait` waits for them. Every one computes y and the final state of Mamba-2's recurrence, and the
gradients of x, dt, a, b, c and d. What a peer's signature leaves out (the step on x, the skip) is part of its time.

    pip install mamba-ssm flash-linear-attention einops        (beside torch and triton)
    pip install --no-deps jax-linear-attention                 (Python 3.12 or later)

jax-linear-attention asks for one version of jax, 0.11.2: `--no-deps` leaves the one that is there. `pallas_gpu` takes
both that and later ones.
"""

import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ssd import ssd

NAMES = ("x", "dt", "a", "b", "c", "d")
LOW = ("x", "b", "c", "dy")
"""Inputs in the compute dtype; the others are float32."""

Arrays = dict[str, np.ndarray]
Run = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Contender:
    """Functions that run, feed and await one implementation."""

    forward: Run
    both: Run
    convert: Callable[[Arrays, str], Any]
    wait: Callable[[Any], Any]


def as_numpy(value: Any) -> np.ndarray:
    """Float64 array of a result of either library."""
    if not isinstance(value, jax.Array):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, np.float64)


# --- JAX --------------------------------------------------------------------------------------------------------------


def _to_jax(arrays: Arrays, dtype: str) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, dtype if name in LOW else "float32") for name, value in arrays.items()}


def of_jax(function: Callable[..., Any]) -> Contender:
    """Contender of function(x, dt, a, b, c, d) -> (y, state)."""

    def forward(inputs: dict[str, jax.Array]) -> Any:
        return function(*(inputs[name] for name in NAMES))

    def both(inputs: dict[str, jax.Array]) -> Any:
        result, pullback = jax.vjp(function, *(inputs[name] for name in NAMES))
        return result, pullback((inputs["dy"], inputs["dstate"]))

    return Contender(jax.jit(forward), jax.jit(both), _to_jax, jax.block_until_ready)


def ours(implementation: str) -> Contender:
    """One implementation of this project."""
    return of_jax(functools.partial(ssd, implementation=implementation))


def _jax_linear_attention() -> Contender:
    from jla.ops import linear_attention

    def function(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        v = (x.astype(jnp.float32) * dt[..., None]).astype(x.dtype)
        y, state = linear_attention("simple_gla", c, b, v, g=dt * a, scale=1.0, output_final_state=True)
        y = y.astype(jnp.float32) + d[:, None] * x.astype(jnp.float32)
        return y.astype(x.dtype), state.astype(jnp.float32).swapaxes(2, 3)

    return of_jax(function)


# --- torch ------------------------------------------------------------------------------------------------------------


def _of_torch(function: Callable[..., Any]) -> Contender:
    import torch

    def convert(arrays: Arrays, dtype: str) -> Any:
        low = getattr(torch, dtype)
        return {
            name: torch.from_numpy(value).cuda().to(low if name in LOW else torch.float32)
            for name, value in arrays.items()
        }

    def forward(inputs: Any) -> Any:
        with torch.no_grad():
            return function(*(inputs[name] for name in NAMES))

    def both(inputs: Any) -> Any:
        tensors = [inputs[name].requires_grad_() for name in NAMES]
        results = function(*tensors)
        return results, torch.autograd.grad(results, tensors, (inputs["dy"], inputs["dstate"]))

    return Contender(forward, both, convert, lambda _: torch.cuda.synchronize())


def _mamba_ssm() -> Contender:
    # The package's own start imports CUDA extensions that the Triton kernels do not need.
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    if "mamba_ssm" not in sys.modules:
        bare = types.ModuleType("mamba_ssm")
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["mamba_ssm"] = bare
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return _of_torch(lambda x, dt, a, b, c, d: scan(x, dt, a, b, c, chunk_size=256, D=d, return_final_states=True))


def _flash_linear_attention() -> Contender:
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def function(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        v = (x.float() * dt[..., None]).to(x.dtype)
        y, state = chunk_simple_gla(c, b, v, g=dt * a, scale=1.0, output_final_state=True)
        return (y.float() + d[:, None] * x.float()).to(x.dtype), state.float().transpose(2, 3)

    return _of_torch(function)


_PEERS = {
    "mamba_ssm": (("mamba_ssm", "torch", "triton", "einops"), _mamba_ssm),
    "flash-linear-attention": (("fla", "torch", "triton"), _flash_linear_attention),
    "jax-linear-attention": (("jla",), _jax_linear_attention),
}


def errors() -> tuple[type[Exception], ...]:
    """Return what Triton raises besides RuntimeErrors where it is installed: no compilation, not enough resources."""
    if importlib.util.find_spec("triton") is None:
        return ()
    return (importlib.import_module("triton.errors").TritonError,)


def peers() -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the peers that run here, and why the others do not."""
    found: dict[str, Contender] = {}
    reasons: dict[str, str] = {}
    for name, (needed, make) in _PEERS.items():
        missing = [module for module in needed if importlib.util.find_spec(module) is None]
        if missing:
            reasons[name] = f"not installed: {', '.join(missing)}"
        elif "torch" in needed and jax.default_backend() != "gpu":
            reasons[name] = "its Triton kernels need a GPU"
        else:
            try:
                found[name] = make()
            except ImportError as error:
                reasons[name] = f"does not import: {error}"
    return found, reasons
