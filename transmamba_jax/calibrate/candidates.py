"""Implementations that may serve a model on the default device, and the reasons against the others."""

import dataclasses
from typing import Any, Literal

import jax

from pallas_kernels import target
from pallas_kernels.ssd import api as ssd_api
from transmamba_jax.attention import implementations, library
from transmamba_jax.config import Config, ModelConfig
from transmamba_jax.runtime import calibration
from transmamba_jax.runtime.calibration import Result

_PLATFORM = {"pallas_tpu": "tpu", "splash": "tpu", "pallas_gpu": "gpu", "triton": "gpu", "cudnn": "gpu"}
"""Platform of an implementation that has only one."""

_DEFINITION = "it is the definition, for tests and every derivative: its memory is that of a state or a score per token"

_CHUNKS = {"sequential": (16, 32), "associative": (32, 64, 128, 256)}
"""Chunk sizes to try; the other implementations choose their own."""

_QUICK_CHUNKS = {"sequential": (32,), "associative": (64, 128)}


@dataclasses.dataclass(frozen=True)
class Job:
    """Shapes of the calls to check and to time, as JSON keeps them."""

    model: dict[str, Any]
    """Heads and dtype: num_heads, num_groups, head_dim, state_dim, dtype."""
    rows: int
    """Of a microbatch; once the devices are known, of one device."""
    split: int
    """Devices that share the tokens or the heads of a row."""
    lengths: tuple[int, ...]
    """Tokens of a row, the longest first."""
    rounds: int
    quick: bool
    limit: float
    """Seconds without a sign of life after which a candidate hangs."""


def make_job(config: Config, quick: bool, limit: float) -> Job:
    """Return the calls of a step of the config: its rows, and rows that TransPoints shorten."""
    rows = config.data.batch_size // config.train.accumulation
    longest = config.data.seq_len
    lengths = (longest,) if quick else tuple(sorted({max(1, longest // part) for part in (1, 4, 16)}, reverse=True))
    model = {name: getattr(config.model, name) for name in calibration.SHAPES}
    split = max(1, config.mesh.context) * max(1, config.mesh.tensor)
    return Job(model, rows, split, lengths, 3 if quick else 9, quick, limit)


def abstract_inputs(model: dict[str, Any], rows: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return shape and dtype of values [B, T, H, P] and of keys [B, T, G, N]."""
    value = (rows, length, model["num_heads"], model["head_dim"])
    key = (rows, length, model["num_groups"], model["state_dim"])
    return jax.ShapeDtypeStruct(value, model["dtype"]), jax.ShapeDtypeStruct(key, model["dtype"])


def candidates(job: Job) -> tuple[list[Result], list[Result]]:
    """Return the candidates, each as the result that it has before any trial, and those that are passed over."""
    value, key = abstract_inputs(job.model, job.rows, job.lengths[0])
    found: list[Result] = []
    passed_over: list[Result] = []
    for operator, names in (("ssd", ssd_api.implementations()), ("attention", implementations())):
        for name in names:
            reason = _reason(operator, name, value, key)  # type: ignore[arg-type]
            if reason is not None:
                passed_over.append(Result(operator, name, None, "passed over", reason))  # type: ignore[arg-type]
                continue
            chunks = (_QUICK_CHUNKS if job.quick else _CHUNKS).get(name, ()) if operator == "ssd" else ()
            fitting = {min(chunk, job.lengths[0]) for chunk in chunks}
            sizes: list[int | None] = [*sorted(fitting)] or [None]
            found += [Result(operator, name, size, "passed") for size in sizes]  # type: ignore[arg-type]
    return found, passed_over


def _reason(operator: Literal["ssd", "attention"], name: str, value: Any, key: Any) -> str | None:
    """Return why an implementation cannot serve the calls here; None: it can."""
    if name == "reference":
        return _DEFINITION
    platform = _PLATFORM.get(name, target.platform())
    if platform != target.platform():
        return f"it is for a {platform.upper()}, and this is a {target.platform().upper()}"
    if operator == "ssd":
        return ssd_api.IMPLEMENTATIONS[name].unsupported_reason(value, key)
    if name == "cudnn":
        return library.cudnn_unsupported_reason(key, value, None)
    return library.splash_unsupported_reason(key) if name == "splash" else None


def model_of(job: Job) -> ModelConfig:
    """Return a model's config with the heads and the dtype of a job, for the key of its record."""
    return ModelConfig(**job.model)
