"""Translate the config.json of a Mamba-2 model, of transformers or of state-spaces, and a ModelConfig.

What this package has no counterpart for is refused by name, never ignored.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transmamba_jax.config import ModelConfig
from transmamba_jax.runtime.checks import require
from transmamba_jax.runtime.tensor_files import read_json

Naming = Literal["transformers", "state-spaces"]

FILE = "config.json"

_CHUNK_SIZE = 256
"""The default of both: a matter of speed there, and no part of a model here."""

# The defaults of transformers' Mamba2Config and of mamba_ssm's MambaConfig and Mamba2: files may leave them out.
_TRANSFORMERS: dict[str, Any] = {
    "num_heads": 128,
    "head_dim": 64,
    "vocab_size": 32768,
    "hidden_size": 4096,
    "state_size": 128,
    "num_hidden_layers": 64,
    "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "residual_in_fp32": True,
    "time_step_limit": [0.0, math.inf],
    "chunk_size": _CHUNK_SIZE,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
_STATE_SPACES: dict[str, Any] = {
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "rms_norm": True,
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
_STATE_SPACES_LAYER: dict[str, Any] = {
    "layer": "Mamba1",
    "d_state": 128,
    "d_conv": 4,
    "expand": 2,
    "headdim": 64,
    "d_ssm": None,
    "ngroups": 1,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "dt_limit": [0.0, math.inf],
    "bias": False,
    "conv_bias": True,
    "chunk_size": _CHUNK_SIZE,
}
# Of no consequence once the weights are there.
_STATE_SPACES_INITIAL = {
    "A_init_range",
    "conv_init",
    "dt_init_floor",
    "dt_max",
    "dt_min",
    "sequence_parallel",
    "use_mem_eff_path",
}
_STATE_SPACES_EPS = 1e-5  # fixed in mamba_ssm


def read(folder: Path) -> tuple[ModelConfig, Naming]:
    """Read `config.json`; every TransPoint is 0. The dtypes are those of the defaults, float32 for both.

    Raises:
        ValueError: it cannot be read, is of another model, or asks for what this package does not have.
    """
    path = folder / FILE
    tree = read_json(path)
    try:
        if tree.get("model_type") == "mamba2":
            return _from_transformers(tree), "transformers"
        if "ssm_cfg" in tree and "d_model" in tree:
            return _from_state_spaces(tree), "state-spaces"
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    raise ValueError(
        f"{path} must have model_type 'mamba2' (transformers), or d_model and ssm_cfg (state-spaces); "
        f"found model_type {tree.get('model_type')!r} among {', '.join(sorted(tree))}"
    )


def write(config: ModelConfig, naming: Naming, dtype: str, end_of_document: int | None = None) -> dict[str, Any]:
    """Return the contents of `config.json` for weights of this dtype and a tokenizer with this end of document.

    Raises:
        ValueError: the config has an option that Mamba-2, or `naming`, has no counterpart for.
    """
    points = ", ".join(map(str, config.transpoints))
    require(
        not any(config.transpoints),
        f"model.transpoints must all be 0 to be written as Mamba-2, found {points}: Mamba-2 has no attention. "
        "To write the weights nevertheless, export the checkpoint with --schedule mamba2",
    )
    for name, needed, hint in (
        ("mlp_dim", 0, "Mamba-2 has no MLP"),
        ("use_d_skip", True, "Mamba-2 has D"),
        ("rotary", "attention", "Mamba-2 rotates nothing"),
        ("conv_activation", "silu", "Mamba-2 has SiLU behind its convolution"),
        ("ablation", "none", "Mamba-2 has the mixer's own parameters"),
    ):
        found = getattr(config, name)
        require(found == needed, f"model.{name} must be {needed!r} to be written as Mamba-2, found {found!r}: {hint}")
    expand, rest = divmod(config.d_inner, config.d_model)
    require(
        rest == 0,
        f"model.num_heads * model.head_dim = {config.d_inner} must be a multiple of model.d_model = {config.d_model} "
        "to be written as Mamba-2",
    )
    limit = {} if config.dt_limit == (0, math.inf) else {"limit": list(config.dt_limit)}
    if naming == "state-spaces":
        return _to_state_spaces(config, expand, limit)
    return {**_to_transformers(config, expand, limit, dtype), "eos_token_id": end_of_document}


def _from_transformers(found: Mapping[str, Any]) -> ModelConfig:
    tree = {**_TRANSFORMERS, **found}
    _refuse_others(tree, {"use_bias": (False,), "hidden_act": ("silu", "swish"), "quantization_config": (None,)})
    return ModelConfig(
        vocab_size=_integer(tree, "vocab_size"),
        num_layers=_integer(tree, "num_hidden_layers"),
        d_model=_integer(tree, "hidden_size"),
        num_heads=_integer(tree, "num_heads"),
        num_groups=_integer(tree, "n_groups"),
        head_dim=_integer(tree, "head_dim"),
        state_dim=_integer(tree, "state_size"),
        conv_width=_integer(tree, "conv_kernel"),
        tie_embeddings=_flag(tree, "tie_word_embeddings"),
        norm_eps=_number(tree, "layer_norm_epsilon"),
        conv_bias=_flag(tree, "use_conv_bias"),
        dt_limit=_limit(tree, "time_step_limit"),
        residual_in_fp32=_flag(tree, "residual_in_fp32"),
        **_MAMBA2,
    )


def _from_state_spaces(found: Mapping[str, Any]) -> ModelConfig:
    require(isinstance(found["ssm_cfg"], dict), f"ssm_cfg must be an object, found {found['ssm_cfg']!r}")
    tree, layer = {**_STATE_SPACES, **found}, {**_STATE_SPACES_LAYER, **found["ssm_cfg"]}
    unknown = sorted(set(layer) - set(_STATE_SPACES_LAYER) - _STATE_SPACES_INITIAL)
    require(not unknown, f"unknown options in ssm_cfg: {', '.join(unknown)}")
    _refuse_others(tree, {"d_intermediate": (0,), "attn_layer_idx": ([],), "rms_norm": (True,)})
    width = _count(layer, "expand") * _count(tree, "d_model")
    _refuse_others(
        layer,
        {
            "layer": ("Mamba2",),
            "d_ssm": (None, width),
            "D_has_hdim": (False,),
            "rmsnorm": (True,),
            "norm_before_gate": (False,),
            "bias": (False,),
        },
    )
    head_dim, multiple = _count(layer, "headdim"), _count(tree, "pad_vocab_size_multiple")
    require(width % head_dim == 0, f"headdim must divide expand * d_model = {width}, found {head_dim}")
    return ModelConfig(
        vocab_size=-(-_integer(tree, "vocab_size") // multiple) * multiple,
        num_layers=_integer(tree, "n_layer"),
        d_model=_integer(tree, "d_model"),
        num_heads=width // head_dim,
        num_groups=_integer(layer, "ngroups"),
        head_dim=head_dim,
        state_dim=_integer(layer, "d_state"),
        conv_width=_integer(layer, "d_conv"),
        tie_embeddings=_flag(tree, "tie_embeddings"),
        norm_eps=_STATE_SPACES_EPS,
        conv_bias=_flag(layer, "conv_bias"),
        dt_limit=_limit(layer, "dt_limit"),
        residual_in_fp32=_flag(tree, "residual_in_fp32"),
        **_MAMBA2,
    )


_MAMBA2: dict[str, Any] = {"mlp_dim": 0, "transpoints": (0,), "dtype": "float32", "param_dtype": "float32"}


def _to_transformers(config: ModelConfig, expand: int, limit: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "expand": expand,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "n_groups": config.num_groups,
        "state_size": config.state_dim,
        "conv_kernel": config.conv_width,
        "chunk_size": _CHUNK_SIZE,
        "use_bias": False,
        "use_conv_bias": config.conv_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_embeddings,
        # transformers' defaults would be ids of another tokenizer.
        "pad_token_id": None,
        "bos_token_id": None,
        **{f"time_step_{name}": value for name, value in limit.items()},
    }


def _to_state_spaces(config: ModelConfig, expand: int, limit: dict[str, Any]) -> dict[str, Any]:
    require(
        config.norm_eps == _STATE_SPACES_EPS,
        f"model.norm_eps must be {_STATE_SPACES_EPS} to be written as state-spaces, found {config.norm_eps}",
    )
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": config.state_dim,
            "d_conv": config.conv_width,
            "expand": expand,
            "headdim": config.head_dim,
            "ngroups": config.num_groups,
            "conv_bias": config.conv_bias,
            "chunk_size": _CHUNK_SIZE,
            **{f"dt_{name}": value for name, value in limit.items()},
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_embeddings,
    }


def _refuse_others(tree: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in accepted.items():
        named = " or ".join(map(repr, values))
        require(tree[name] in values, f"{name} must be {named}, found {tree[name]!r}: there is no counterpart here")


def _integer(tree: Mapping[str, Any], name: str) -> int:
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, found {value!r}")
    return value


def _count(tree: Mapping[str, Any], name: str) -> int:
    value = _integer(tree, name)
    require(value >= 1, f"{name} must be at least 1, found {value}")
    return value


def _number(tree: Mapping[str, Any], name: str) -> float:
    value = tree[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, found {value!r}")
    return float(value)


def _flag(tree: Mapping[str, Any], name: str) -> bool:
    value = tree[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, found {value!r}")
    return value


def _limit(tree: Mapping[str, Any], name: str) -> tuple[float, float]:
    # Newer releases of transformers write what JSON has no number for as {"__float__": "Infinity"}.
    try:
        lower, upper = (float(end["__float__"]) if isinstance(end, dict) else float(end) for end in tree[name])
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"{name} must be two numbers, found {tree[name]!r}") from None
    return lower, upper
