"""Test Mamba-2 weights in and out against torch's logits of transformers' models (tests/golden/make_mamba2.py)."""

import dataclasses
import json
import os
import shutil
import stat
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

import transmamba_jax as tm
from tests.convert.support import CASES, GOLDEN, STATE_SPACES, copied, golden, tensors, trained_on
from tests.oracle import relative_error
from transmamba_jax import checkpoint, convert, data, export
from transmamba_jax.convert import __main__ as convert_command
from transmamba_jax.convert import mamba2_config
from transmamba_jax.data.tokenizers import ByteTokenizer


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    config, params, tokens, expected = golden(case)
    logits = jax.jit(tm.TransMamba(config).apply)({"params": params}, tokens)
    assert relative_error(logits, expected) < 2e-6
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_config_says_what_the_file_says() -> None:
    tied, limited, narrow = (convert.from_mamba2(GOLDEN / case)[0] for case in CASES)
    assert (tied.num_heads, tied.num_groups, tied.tie_embeddings, tied.dt_limit) == (6, 2, True, (0.0, np.inf))
    assert (limited.dt_limit, limited.conv_bias, limited.conv_width, limited.norm_eps) == ((0.05, 0.4), False, 3, 1e-3)
    assert (limited.tie_embeddings, limited.residual_in_fp32, limited.dtype) == (False, True, "float32")
    assert (narrow.dtype, narrow.param_dtype, narrow.residual_in_fp32) == ("bfloat16", "bfloat16", False)
    assert {config.mlp_dim for config in (tied, limited, narrow)} == {0}
    assert {config.transpoints for config in (tied, limited, narrow)} == {(0,)}


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_keeps_every_bit(case: str, tmp_path: Path) -> None:
    config, params = tm.convert.from_mamba2(GOLDEN / case)
    tm.convert.to_mamba2(config, params, tmp_path / "transformers")
    assert tensors(tmp_path / "transformers") == tensors(GOLDEN / case)
    written, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "transformers", GOLDEN / case)
    )
    ids = {name for name in written if name.endswith("_token_id")}
    # The chunk is a matter of speed, and no part of a config here: a file gets transformers' default.
    expected = {name: original[name] for name in written.keys() - ids} | {"chunk_size": 256}
    assert {name: written[name] for name in expected} == expected
    assert {written[name] for name in ids} == {None}
    if config.norm_eps == 1e-5:
        convert.to_mamba2(config, params, tmp_path / "state-spaces", "state-spaces")
        renamed = {
            name.replace("backbone.embeddings.", "backbone.embedding."): value
            for name, value in tensors(GOLDEN / case).items()
        }
        assert tensors(tmp_path / "state-spaces") == renamed
        again, back = convert.from_mamba2(tmp_path / "state-spaces")
        assert again == config
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, params)))


def test_narrower_weights_become_float32_without_loss(tmp_path: Path) -> None:
    config, params, *_ = golden("tied")
    convert.to_mamba2(config, params, tmp_path, dtype="float16")
    assert {kind.split()[0] for kind, _ in tensors(tmp_path).values()} == {"float16"}
    again, back = convert.from_mamba2(tmp_path)
    assert again == config
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16).astype(np.float32), params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, rounded)))


def test_decoding_holds_to_the_options_of_mamba2() -> None:
    """Limits, no convolution bias, an untied head, no MLP: one token at a time gives torch's logits as well."""
    config, params, tokens, expected = golden("limited")
    decoder = tm.Decoder(tm.TransMamba(config), params)
    state = decoder.prefill(tokens[:, :16].tolist())
    assert relative_error(state.logits, expected[:, 15]) < 2e-6
    state = decoder.extend(state, tokens[:, 16:].tolist())
    assert relative_error(state.logits, expected[:, -1]) < 2e-6


@pytest.mark.slow
def test_attention_by_a_schedule_and_a_step_of_training() -> None:
    config, params, tokens, _ = golden("limited")
    model, points = tm.TransMamba(config), jnp.array([9, 20])

    def loss(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, tokens, transpoints=points)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    @jax.jit
    def step(params: Any) -> tuple[jax.Array, Any, Any]:
        value, gradient = jax.value_and_grad(loss)(params)
        return value, gradient, jax.tree.map(lambda leaf, slope: leaf - 1e-2 * slope, params, gradient)

    before, gradient, params = step(params)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient))
    after, *_ = step(params)
    assert np.isfinite(after)
    assert after < before


def test_a_float32_residual_stream_keeps_what_bfloat16_drops() -> None:
    """Updates below half a step of bfloat16, 64 of them: lost one by one, or not."""
    config = tm.ModelConfig(
        vocab_size=4, num_layers=64, d_model=8, num_heads=2, num_groups=1, head_dim=4, state_dim=2, mlp_dim=0,
        transpoints=(0,), dtype="bfloat16",
    )  # fmt: skip
    tokens, rng = np.array([[0, 1, 2, 3]]), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), export.abstract_params(config))
    params["embedding"] = np.sign(params["embedding"])  # the normalised y is at most √8: |y W_o| < 2^-9, half a step
    out = params["layers"]["mixer"]["out"]["kernel"]
    params["layers"]["mixer"]["out"]["kernel"] = 2.0**-11 * out / np.abs(out).sum(1).max()
    params["layers"]["mixer"]["norm"]["scale"] = np.ones_like(params["layers"]["mixer"]["norm"]["scale"])
    params["final_norm"]["scale"] = np.ones(8)
    hidden = {}
    for wide in (False, True):
        model = tm.TransMamba(dataclasses.replace(config, residual_in_fp32=wide))
        hidden[wide] = np.asarray(
            jax.jit(partial(model.apply, method="hidden"))({"params": params}, tokens), np.float32
        )
    assert np.array_equal(hidden[False][0], params["embedding"])
    assert 2**-8 <= np.abs(hidden[True][0] - params["embedding"]).max() < 0.1


def test_a_published_config_of_state_spaces_is_read(tmp_path: Path) -> None:
    tree = {
        **STATE_SPACES, "d_model": 768, "n_layer": 24, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16,
        "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "tie_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config, naming = mamba2_config.read(tmp_path)
    assert naming == "state-spaces"
    assert (config.vocab_size, config.num_heads, config.head_dim, config.num_groups) == (50288, 24, 64, 1)
    assert (config.state_dim, config.residual_in_fp32, config.tie_embeddings) == (128, True, True)


def test_the_largest_numbers_of_a_dtype_are_written(tmp_path: Path) -> None:
    config, params, *_ = golden("tied")
    largest = {"float16": 65_504.0, "bfloat16": 3.38e38, "float32": 3.4e38}
    for dtype, value in largest.items():
        changed = trained_on(params, "final_norm/scale", value)
        convert.to_mamba2(config, changed, tmp_path / dtype, dtype=dtype)
        _, back = convert.from_mamba2(tmp_path / dtype)
        assert float(back["final_norm"]["scale"][1]) == float(jnp.asarray(value, dtype))


def test_the_config_gives_the_dtype_of_the_tensors(tmp_path: Path) -> None:
    config, params, *_ = golden("tied")
    convert.to_mamba2(dataclasses.replace(config, param_dtype="bfloat16"), params, tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    mixed = {**params, "embedding": params["embedding"].astype(jnp.bfloat16)}
    convert.to_mamba2(config, mixed, tmp_path / "mixed")
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["dtype"] == "float32"
    for dtype in (np.float64, np.int32):
        other = jax.tree.map(lambda leaf, dtype=dtype: np.asarray(leaf).astype(dtype), params)
        with pytest.raises(ValueError, match=f"must be of dtype float32, .*, found {np.dtype(dtype).name}"):
            convert.to_mamba2(config, other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_unusual_folders_are_read(tmp_path: Path) -> None:
    source, blobs = copied(tmp_path), tmp_path / "blobs"
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + (source / "config.json").read_bytes())
    source.rename(blobs)
    source.mkdir()
    for file in blobs.iterdir():  # as a download cache keeps them
        (source / file.name).symlink_to(file)
    assert convert.from_mamba2(source)[0] == golden("tied")[0]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_the_umask(mask: int, tmp_path: Path) -> None:
    config, params, *_ = golden("tied")
    before = os.umask(mask)
    try:
        convert.to_mamba2(config, params, tmp_path / "mamba2", tokenizer=ByteTokenizer())
        export.save(tmp_path / "export", tm.Config(model=config), params, ByteTokenizer())
    finally:
        os.umask(before)
    files = [*(tmp_path / "mamba2").iterdir(), *(tmp_path / "export").iterdir()]
    assert len(files) == 7
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


def test_the_byte_tokenizer_is_written_for_other_programs(tmp_path: Path) -> None:
    config, params, *_ = golden("tied")
    config = dataclasses.replace(config, vocab_size=256)
    params = {**params, "embedding": np.resize(params["embedding"], (256, config.d_model))}
    ours = ByteTokenizer()
    convert.to_mamba2(config, params, tmp_path, tokenizer=ours)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "".join(map(chr, range(0x250))) + "def main(a):\n\treturn 天地 😀  <|endoftext|>\r\n"
    for part in (text, "", "\0", " a", *text):
        expected = ours.encode(part.replace("<|endoftext|>", "end"))
        assert theirs.encode(part.replace("<|endoftext|>", "end")).ids == expected
        assert theirs.decode(expected) == ours.decode(expected)
    assert theirs.get_vocab_size() == 256
    assert theirs.token_to_id("<|endoftext|>") == ours.end_of_document
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 0
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert convert_command.main(["from-mamba2", str(tmp_path), str(tmp_path / "back")]) == 0
    _, _, again = export.load(tmp_path / "back")
    assert again is not None
    assert again.encode("天地 a") == ours.encode("天地 a")
    assert again.end_of_document == 0


@pytest.mark.parametrize("spelling", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_the_end_of_a_document_is_the_one_that_the_model_names(spelling: object, tmp_path: Path) -> None:
    source = copied(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.add_special_tokens(["</s>", "<|im_end|>"])
    words.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": spelling}))
    assert convert_command.main(["from-mamba2", str(source), str(tmp_path / "out")]) == 0
    _, _, tokenizer = export.load(tmp_path / "out")
    assert tokenizer is not None
    assert tokenizer.end_of_document == 3


@pytest.mark.parametrize(("index", "end"), [(3, 3), (1, 2), (7, 2)], ids=["added", "a word", "no token"])
def test_without_a_named_end_the_id_of_the_model_s_config_is_taken(index: int, end: int, tmp_path: Path) -> None:
    source = copied(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.add_special_tokens(["</s>", "<|padding|>"])
    words.save(str(source / "tokenizer.json"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": index}))
    assert convert_command.main(["from-mamba2", str(source), str(tmp_path / "out")]) == 0
    tokenizer = export.load(tmp_path / "out").tokenizer
    assert tokenizer is not None
    assert tokenizer.end_of_document == end  # </s> where the config names no added token


@pytest.mark.slow
def test_the_command_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, middle, back = tmp_path / "limited", tmp_path / "middle", tmp_path / "back"
    shutil.copytree(GOLDEN / "limited", source)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.add_special_tokens(["</s>"])
    words.save(str(source / "tokenizer.json"))
    assert convert_command.main(["from-mamba2", str(source), str(middle)]) == 0
    assert convert_command.main(["to-mamba2", str(middle), str(back)]) == 0
    assert tensors(back) == tensors(source)
    config, params, tokenizer = export.load(middle)
    assert config.model == convert.from_mamba2(source)[0]
    assert tokenizer is not None
    assert tokenizer.encode("b") == [1]
    assert tokenizers.Tokenizer.from_file(str(back / "tokenizer.json")).to_str() == tokenizer.to_json()
    assert json.loads((back / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 2

    start = ["start-run", str(middle), str(tmp_path / "run")]
    assert convert_command.main(start) == 0
    saved = checkpoint.restore(tmp_path / "run" / "checkpoints")
    assert (saved.step, saved.config.model, saved.tokenizer_json) == (0, config.model, tokenizer.to_json())
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, saved.params, params)))
    ready = tm.load_config(tmp_path / "run" / "config.yaml")
    assert (ready.model, ready.workdir) == (config.model, str(tmp_path / "run"))
    assert data.load_tokenizer(ready.data.tokenizer).to_json() == tokenizer.to_json()

    capsys.readouterr()
    assert convert_command.main(["to-mamba2", str(middle), str(back)]) == 2
    error = capsys.readouterr().err
    assert "already holds model.safetensors, config.json, tokenizer.json, tokenizer_config.json" in error
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        assert convert_command.main(["to-mamba2", str(middle), str(tmp_path / name)]) == 2
        assert f"already holds {name}; name a new folder" in capsys.readouterr().err
        assert [path.read_text() for path in (tmp_path / name).iterdir()] == ["mine"]
    for command in ("to-mamba2", "start-run"):
        assert convert_command.main([command, str(middle), "/proc"]) == 2
        assert capsys.readouterr().err.startswith("cannot ")
    assert convert_command.main(start) == 2
    assert "already holds step 0" in capsys.readouterr().err
    for name in ("metrics.jsonl", "tensorboard", "report"):
        (tmp_path / f"of {name}" / name).mkdir(parents=True)
        assert convert_command.main(["start-run", str(middle), str(tmp_path / f"of {name}")]) == 2
        assert f"already holds {name}; name a new folder" in capsys.readouterr().err
