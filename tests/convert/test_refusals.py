"""Weights and configs that cannot be converted are refused, with the reason and the remedy."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import transmamba_jax as tm
from tests.convert.support import (
    STATE_SPACES,
    copied,
    edit_json,
    edit_tensors,
    golden,
    hold_twice,
    pickles_only,
    trained_on,
)
from transmamba_jax import convert, export
from transmamba_jax.convert import __main__ as convert_command
from transmamba_jax.convert import mamba2_config

REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": (
        "tied",
        edit_tensors(lambda found: found.update(extra=found.pop("backbone.layers.1.mixer.D"))),
        r"missing: backbone.layers.1.mixer.D \(6,\)\n.*unexpected: extra \(6,\)",
    ),
    "shape": (
        "tied",
        edit_tensors(lambda found: found.update({"backbone.norm_f.weight": np.ones(5, np.float32)})),
        r"shape mismatch: backbone.norm_f.weight: expected \(12,\), found \(5,\)",
    ),
    "head": (
        "tied",
        edit_tensors(lambda found: found.update({"lm_head.weight": 1 + found["backbone.embeddings.weight"]})),
        "lm_head.weight must equal backbone.embeddings.weight",
    ),
    "dtype": (
        "tied",
        edit_tensors(lambda found: found.update({"backbone.norm_f.weight": np.ones(12, np.int32)})),
        "must hold F32, BF16, F16, found I32",
    ),
    "no config": ("tied", lambda at: (at / "config.json").unlink(), "must hold config.json, found model.safetensors"),
    "pickle": ("tied", pickles_only, r"must hold model.safetensors .*other formats are not read.*pytorch_model.bin"),
    "no safetensors": ("tied", lambda at: (at / "model.safetensors").write_bytes(b"PK"), "cannot be read as safe"),
    "no file": ("limited", lambda at: (at / "model-00002-of-00003.safetensors").unlink(), "00002.*cannot be read"),
    "outside": (
        "limited",
        edit_json("model.safetensors.index.json", weight_map={"a": "../tied/model.safetensors"}),
        "must name files of the same folder",
    ),
    "misplaced": (
        "limited",
        edit_json("model.safetensors.index.json", weight_map={"a": "model-00001-of-00003.safetensors"}),
        "names tensors that are missing: a in model-00001",
    ),
    "twice": ("limited", hold_twice, "each tensor in one file, found .* in model-00001.* and model-00002"),
    "other model": ("tied", edit_json(model_type="mamba"), "model_type 'mamba2'.*found model_type 'mamba'"),
    "bias": ("tied", edit_json(use_bias=True), "use_bias must be False, found True: there is no counterpart"),
    "activation": ("tied", edit_json(hidden_act="gelu"), "hidden_act must be 'silu' or 'swish', found 'gelu'"),
    "limit": ("tied", edit_json(time_step_limit=[1.0]), r"time_step_limit must be two numbers, found \[1.0\]"),
    "empty limit": ("tied", edit_json(time_step_limit=[0.2, 0.1]), "model.dt_limit must be two numbers"),
    "not a number": ("tied", edit_json(num_heads="6"), "num_heads must be an integer, found '6'"),
    "layers": ("tied", edit_json(num_hidden_layers=1000), "has 1000 layers, and the files only 20 tensors"),
    "groups": ("tied", edit_json(n_groups=4), "num_groups must divide"),
    "quantized": (
        "tied",
        edit_json(quantization_config={"bits": 4}),
        "quantization_config must be None, found .*'bits': 4.*: there is no counterpart",
    ),
    "billion layers": ("tied", edit_json(num_hidden_layers=10**9), "num_layers must be <= 10000, found 1000000000"),
    "negative": ("tied", edit_json(hidden_size=-16), "model.d_model must be >= 1, found -16"),
    "no heads": ("tied", edit_json(num_heads=0), "model.num_heads must be >= 1, found 0"),
    "true layers": ("tied", edit_json(num_hidden_layers=True), "num_hidden_layers must be an integer, found True"),
    "no epsilon": ("tied", edit_json(layer_norm_epsilon=None), "layer_norm_epsilon must be a number, found None"),
    "infinite epsilon": ("tied", edit_json(layer_norm_epsilon=1e999), "model.norm_eps must be positive and finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    case, change, message = REFUSED[name]
    folder = copied(tmp_path, case)
    change(folder)
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        convert.from_mamba2(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba1"}}, "layer must be 'Mamba2', found 'Mamba1'"),
        ({"ssm_cfg": {**STATE_SPACES["ssm_cfg"], "norm_before_gate": True}}, "norm_before_gate must be False"),
        ({"ssm_cfg": {**STATE_SPACES["ssm_cfg"], "new": 1}}, "unknown options in ssm_cfg: new"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx must be \[\], found \[1\]"),
        ({"d_intermediate": 32}, "d_intermediate must be 0, found 32"),
        ({"ssm_cfg": {**STATE_SPACES["ssm_cfg"], "headdim": 0}}, "headdim must be at least 1, found 0"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple must be at least 1, found 0"),
        ({"d_model": -16}, "d_model must be at least 1, found -16"),
        ({"n_layer": 10**9}, "model.num_layers must be <= 10000, found 1000000000"),
        ({"vocab_size": -8}, "model.vocab_size must be >= 1, found -8"),
        ({"ssm_cfg": "Mamba2"}, "ssm_cfg must be an object, found 'Mamba2'"),
    ],
)
def test_what_state_spaces_has_and_this_package_has_not_is_refused(changed: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**STATE_SPACES, **changed}))
    with pytest.raises(ValueError, match=message):
        mamba2_config.read(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"transpoints": (0, 4)},
            "transpoints must all be 0 .* found 0, 4: Mamba-2 has no attention.* --schedule mamba2",
        ),
        ({"mlp_dim": 8}, "mlp_dim must be 0"),
        ({"use_d_skip": False}, "use_d_skip must be True"),
        ({"conv_activation": "none"}, "conv_activation must be 'silu'"),
        ({"rotary": "both"}, "rotary must be 'attention'"),
        ({"head_dim": 5}, "= 30 must be a multiple of model.d_model = 12"),
        ({"conv_bias": False}, r"(?s)unexpected: layers/mixer/conv_v/bias \(2, 24\)|conv_q/bias"),
    ],
)
def test_what_mamba2_has_not_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, params, *_ = golden("tied")
    with pytest.raises(ValueError, match=message):
        convert.to_mamba2(dataclasses.replace(config, **changed), params, tmp_path)
    assert list(tmp_path.iterdir()) == []


NOT_FINITE = [
    ("layers/mixer/q/kernel", 70_000.0, "float16", r"q/kernel .* up to 70000, and float16 ends at 65504; .*as float32"),
    ("embedding", -65_520.0, "float16", "embedding holds numbers up to 65520, and float16 ends at 65504"),
    ("final_norm/scale", 3.4e38, "bfloat16", r"scale holds numbers up to 3.4e\+38, and bfloat16 ends at 3.3\d+e\+38"),
    ("layers/mixer/a_log", np.nan, None, "layers/mixer/a_log holds NaN; write a checkpoint from before"),
    ("layers/mixer/out/kernel", -np.inf, "bfloat16", "layers/mixer/out/kernel holds infinity"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "dtype", "message"), NOT_FINITE)
def test_numbers_that_a_dtype_cannot_hold_are_refused_by_name(
    path: str, value: float, dtype: str | None, message: str, tmp_path: Path
) -> None:
    config, params, *_ = golden("tied")
    changed = trained_on(params, path, value)
    with pytest.raises(ValueError, match=message):
        convert.to_mamba2(config, changed, tmp_path, dtype=dtype)
    if not np.isfinite(value):
        with pytest.raises(ValueError, match=f"{path} holds (NaN|infinity)"):
            export.save(tmp_path, tm.Config(model=config), changed, None)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copied(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(60)}, unk_token="0"))
    words.add_special_tokens(["</s>"])
    words.save(str(source / "tokenizer.json"))
    assert convert_command.main(["from-mamba2", str(source), str(tmp_path / "out")]) == 2
    assert "too small for the tokenizer with ids 0..60" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
