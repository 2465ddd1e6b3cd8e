"""The Memory Converter: the keys and values that attention has seen, as the state of a Mamba-2 model.

Attention remembers a prefix as K and V; an SSM remembers it as a matrix. With shared weights (B = K, X = Δ∘V) the
SSM state after the prefix is a function of what attention already has, so the converter has no parameters.

Derivation (arXiv 2503.24067 §3.2; SSD: arXiv 2405.21060 §6). For one head with decay A < 0, K_i in R^N, V_i in R^P:

    h_t = exp(Δ_t A) h_{t-1} + Δ_t V_t K_tᵀ,  h_0 given                                 (Mamba-2 recurrence)
    h_P = exp(Σ_{j=1..P} Δ_j A) h_0 + Σ_{i=1..P} exp(Σ_{j=i+1..P} Δ_j A) Δ_i V_i K_iᵀ   (unrolled)

The second line is the converter. The paper's eq. 9 prints V without Δ and its eqs. 4 and 7 print A_{k-1}; both forms
miss the state of the SSM that follows, so the forms above are used. K is the unrotated key: rotary embedding belongs
to attention's scores only. It is the state-only half of SSD and costs O(P·N·head_dim) per head.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ssd import Choice, ssd_state
from transmamba_jax.shapes import Dt, HeadScalar, QueryKey, SegmentIds, State, TransPoint, Value


def memory_converter(
    k: QueryKey,
    v: Value,
    dt: Dt,
    a: HeadScalar,
    transpoint: TransPoint | None = None,
    initial_state: State | None = None,
    segment_ids: SegmentIds | None = None,
    *,
    chunk_size: int = 128,
    implementation: Choice = None,
) -> State:
    """Convert the first `transpoint` tokens of K and V to the SSM state h_P (equation in the module's docstring).

    A Python int slices the sequence, so nothing after it is read. A traced scalar or one value per row sets Δ to 0
    from the TransPoint on (decay 1, no input), so that any TransPoint runs without compiling again.

    Args:
        k: unrotated keys.
        v: values.
        dt: step sizes after softplus, in the units of 1/|A|.
        a: negative decay rates.
        transpoint: tokens to convert; None: all; more than T: all.
        initial_state: state before the first token; belongs to the document of the first token that is not padding.
        segment_ids: with documents packed into a row, the state is that of the document of the last token before the
            TransPoint that is not padding; what came before that document is forgotten.
        chunk_size: tokens of one chunk of the operator.
        implementation: as for `pallas_kernels.ssd.ssd`; None chooses by device.

    Returns:
        The state, accumulated in float32 whatever the dtype of k and v.

    Raises:
        ValueError: shapes or dtypes do not fit, or the TransPoint is negative.
    """
    seq_len = k.shape[1]
    convert = partial(_convert, chunk_size=chunk_size, implementation=implementation)
    if transpoint is None:
        return convert(k, v, dt, a, initial_state, segment_ids)
    if isinstance(transpoint, int | np.integer):
        if transpoint < 0:
            raise ValueError(f"transpoint must be >= 0 (a number of tokens), found {transpoint}")
        stop = min(int(transpoint), seq_len)
        if stop == 0:
            return _empty_state(k, v, initial_state)
        ids = None if segment_ids is None else segment_ids[:, :stop]
        return convert(k[:, :stop], v[:, :stop], dt[:, :stop], a, initial_state, ids)
    _check_traced(transpoint, k.shape[0])
    before = jnp.arange(seq_len, dtype=jnp.int32)[None] < jnp.reshape(transpoint, (-1, 1))  # [1 or B, T]
    masked_dt = jnp.where(before[..., None], dt, 0)
    ids = None if segment_ids is None else jnp.where(before, segment_ids, 0)
    return convert(k, v, masked_dt, a, initial_state, ids)


@partial(jax.jit, static_argnames=("chunk_size", "implementation"))
def _convert(
    k: QueryKey,
    v: Value,
    dt: Dt,
    a: HeadScalar,
    initial_state: State | None,
    segment_ids: SegmentIds | None,
    *,
    chunk_size: int,
    implementation: Choice,
) -> State:
    return ssd_state(
        v,
        dt,
        a,
        k,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def _empty_state(k: QueryKey, v: Value, initial_state: State | None) -> State:
    if initial_state is not None:
        return initial_state
    batch, _, heads, head_dim = v.shape
    return jnp.zeros((batch, heads, head_dim, k.shape[-1]), jnp.float32)


def _check_traced(transpoint: TransPoint, batch: int) -> None:
    shape, dtype = jnp.shape(transpoint), jnp.result_type(transpoint)
    if not jnp.issubdtype(dtype, jnp.integer) or shape not in ((), (batch,)):
        raise ValueError(
            f"transpoint must be an integer scalar or one integer per row, shape () or ({batch},), "
            f"found shape {shape}, dtype {dtype}"
        )
