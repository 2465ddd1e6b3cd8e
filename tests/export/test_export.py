"""An exported folder: read without orbax, run without this package, at any batch and length."""

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import safetensors

import transmamba_jax as tm
from tests.oracle import relative_error
from transmamba_jax import checkpoint, config_io, data, export
from transmamba_jax.checkpoint import command_options as serving_options
from transmamba_jax.config import Config
from transmamba_jax.export import __main__ as export_command
from transmamba_jax.runtime import tensor_files

CONFIG = tm.ModelConfig(
    vocab_size=256, num_layers=3, d_model=16, num_heads=4, num_groups=2, head_dim=8, state_dim=8, mlp_dim=12,
    transpoints=(0, 11, 600), dtype="float32", tie_embeddings=False, dt_limit=(0.0, 0.05),
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 256, (3, 530), np.int32)  # two blocks of attention
SHORT = 29


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: Any
    step: jax.Array


@pytest.fixture(scope="module", autouse=True)
def _symbolic_sizes() -> Iterator[None]:
    """Turn the checks of annotations off: sizes are symbols of `jax.export` here, where annotations say int."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def params() -> Any:
    """Parameters at which every part of the model matters."""
    rng = np.random.default_rng(0)
    spread = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 3, leaf.dtype)
    return jax.tree.map(spread, export.abstract_params(CONFIG))


@pytest.fixture(scope="module")
def folder(params: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for a checkpoint."""
    config = Config(model=CONFIG, workdir="runs/mine")
    root = tmp_path_factory.mktemp("run")
    writer = checkpoint.Checkpointer(root / "checkpoints", config.checkpoint)
    state = State(params, jnp.int32(3))
    writer.save(3, state, {}, config_io.to_yaml(config), data.load_tokenizer("bytes").to_json())
    writer.close()
    assert export_command.main(["--checkpoint", str(root / "checkpoints"), "--output", str(root / "exported")]) == 0
    return root / "exported"


@pytest.fixture(scope="module")
def expected(params: Any) -> np.ndarray:
    """The model's own logits. What follows a token does not change them, so they serve shorter rows too."""
    return np.asarray(jax.jit(tm.TransMamba(CONFIG).apply)({"params": params}, TOKENS))


@pytest.mark.slow
def test_a_folder_is_read_in_one_line(folder: Path, params: Any) -> None:
    config, read, tokenizer = tm.export.load(folder)
    assert config == Config(model=CONFIG, workdir="runs/mine")
    assert tm.load_config(folder / "config.yaml") == config
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, read, params)))
    assert tokenizer.decode(tokenizer.encode("text")) == "text"


ALONE = """
import sys
import jax, numpy as np
from safetensors.numpy import load_file
folder = sys.argv[1]
program = jax.export.deserialize(bytearray(open(folder + "/forward.jax", "rb").read()))
params = {}
for path, leaf in load_file(folder + "/model.safetensors").items():
    *parents, name = path.split("/")
    node = params
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = leaf
np.save(sys.argv[3], program.call(params, np.load(sys.argv[2])))
assert not [name for name in sys.modules if name.startswith(("transmamba_jax", "flax", "orbax"))]
import transmamba_jax as tm
tm.export.load(folder)
assert not [name for name in sys.modules if name.startswith(("orbax", "grain", "transmamba_jax.training"))]
"""


@pytest.mark.slow
def test_neither_orbax_nor_this_package_is_needed(folder: Path, expected: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", TOKENS[:1, :SHORT])
    arguments = [str(folder), str(tmp_path / "tokens.npy"), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-W", "error", "-c", ALONE, *arguments], check=True, cwd=Path(__file__).parents[2])
    assert relative_error(np.load(tmp_path / "logits.npy"), expected[:1, :SHORT]) < 2e-6


@pytest.mark.slow
def test_the_forward_serves_any_batch_and_length(folder: Path, params: Any, expected: np.ndarray) -> None:
    """The other shape is that of the test before."""
    program = export.load_program(folder, "forward")
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert relative_error(program.call(params, TOKENS), expected) < 2e-6


def test_an_ablation_which_cannot_decode_is_refused(params: Any) -> None:
    config = tm.ModelConfig(num_layers=1, transpoints=(0,), ablation="gated_attention")
    with pytest.raises(ValueError, match=r"model\.ablation must be 'none' to decode, found 'gated_attention'"):
        export.programs(config, params)


def test_programs_call_no_library(folder: Path) -> None:
    """What a platform's own libraries would serve runs on that platform alone."""
    for name in export.PROGRAMS:
        called = set(re.findall(r"custom_call @(\w+)", export.load_program(folder, name).mlir_module()))
        assert called <= {"shape_assertion"}


@pytest.mark.slow
def test_the_decode_step_serves_rows_of_different_lengths(folder: Path, params: Any, expected: np.ndarray) -> None:
    tokens, logits = TOKENS[:, :SHORT], expected[:, :SHORT]
    weights = export.load_program(folder, "pack_weights").call(params)
    step = jax.jit(export.load_program(folder, "decode").call)
    cache = export.new_cache(CONFIG, 3, capacity=SHORT)
    assert [layer["keys"].shape[2] for layer in cache["layers"] if "keys" in layer] == [11, SHORT]
    caches = []
    for position in range(SHORT):
        caches.append(cache)
        found, cache = step(weights, cache, tokens[:, position])
        assert relative_error(found, logits[:, position]) < 5e-6, position
    # Rows at 3, 11 (the TransPoint) and 20 tokens continue together.
    starts = np.array([3, 11, 20])
    pick = lambda *leaves: jnp.stack([leaves[start][row] for row, start in enumerate(starts)])
    cache = jax.tree.map(pick, *caches)
    for _ in range(3):
        found, cache = step(weights, cache, tokens[np.arange(3), starts])
        assert relative_error(found, logits[np.arange(3), starts]) < 5e-6
        starts = starts + 1
    assert cache["lengths"].tolist() == starts.tolist()


def test_programs_compute_in_the_models_dtype() -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16", num_layers=1, transpoints=(3,), tie_embeddings=True)
    written = export.programs(config, export.abstract_params(config))
    assert [aval.dtype for aval in written["forward"].out_avals] == [jnp.float32]
    assert "bf16" in written["forward"].mlir_module()
    logits, cache = jax.tree.unflatten(written["decode"].out_tree, written["decode"].out_avals)
    assert (logits.dtype, cache["layers"][0]["keys"].dtype, cache["layers"][0]["state"].dtype) == (
        jnp.float32, jnp.bfloat16, jnp.float32,
    )  # fmt: skip


@pytest.mark.slow
def test_what_does_not_fit_is_refused(folder: Path, params: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(
        ValueError, match=r"already holds model\.safetensors, config\.yaml, tokenizer\.json; name a new"
    ):
        export.save(folder, Config(model=CONFIG), params, None)
    for missing, found in ((tmp_path / "nowhere", "no such folder"), (folder.parent, "checkpoints, exported")):
        with pytest.raises(ValueError, match=f"{missing} must hold config.yaml and model.safetensors.*found {found}"):
            export.load(missing)
    export.save(tmp_path / "other", Config(model=dataclasses.replace(CONFIG, tie_embeddings=True)), params, None)
    with pytest.raises(ValueError, match=r"missing: none\n  unexpected: lm_head \(16, 256\)"):
        export.load(tmp_path / "other")
    with pytest.raises(ValueError, match="name must be one of forward, pack_weights, decode, found 'train'"):
        export.load_program(folder, "train")
    with pytest.raises(ValueError, match=r"must hold forward.jax, found config.yaml, model.safetensors"):
        export.load_program(tmp_path / "other", "forward")
    (tmp_path / "other" / "forward.jax").write_bytes((folder / "forward.jax").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"forward\.jax is damaged"):
        export.load_program(tmp_path / "other", "forward")
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold model.safetensors or .*found config.yaml, forward.jax"):
        export.load(tmp_path / "other")
    broken = shutil.copytree(folder, tmp_path / "broken")
    for text in (b'{"version": ', b"\xff"):
        (broken / export.TOKENIZER).write_bytes(text)
        with pytest.raises(ValueError, match=r"broken/tokenizer.json cannot be read"):
            export.load(broken)
    with pytest.raises(ValueError, match=r"cannot make the folder .*config.yaml: File exists"):
        export.save(broken / export.CONFIG, Config(model=CONFIG), params, None)
    assert export_command.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "no complete checkpoint in" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"platforms must be some of cpu, cuda, tpu and rocm, found gpu"):
        export.programs(CONFIG, params, ["gpu"])
    wrong = [
        "--checkpoint",
        str(folder.parent / "checkpoints"),
        "--output",
        str(tmp_path / "out"),
        "--platforms",
        "gpu",
    ]
    assert export_command.main(wrong) == 2
    assert "platforms must be some of" in capsys.readouterr().err
    again = ["--checkpoint", str(folder.parent / "checkpoints"), "--output", str(tmp_path / "out"), "--platforms"]
    assert export_command.main([*again, "gpu"]) == 2
    assert "platforms must be some of" in capsys.readouterr().err
    assert export_command.main([*again, "--seq-len", "64"]) == 2
    assert "--seq-len=64 scales --schedule, and there is none" in capsys.readouterr().err
    assert export_command.main([*again, "--schedule", "mamba2"]) == 0  # what was refused left nothing in the way
    assert export.load(tmp_path / "out").config.model.transpoints == (0,)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [tensor_files.FILE, export.CONFIG, export.TOKENIZER]
    )


@pytest.mark.parametrize("name", [export.CONFIG, export.TOKENIZER, "decode.jax"])
def test_a_work_directory_keeps_its_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    assert export_command.main(["--checkpoint", str(folder.parent / "checkpoints"), "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} already holds {name}; name a new folder" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_written_to_is_an_error_in_a_line(
    folder: Path, params: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert export_command.main(["--checkpoint", str(folder.parent / "checkpoints"), "--output", "/proc"]) == 2
    assert capsys.readouterr().err.startswith("cannot write /proc: ")

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    for error in (safetensors.SafetensorError("I/O error: no space"), OSError(28, "No space left on device")):
        with pytest.raises(ValueError, match=r"cannot write .*model.safetensors: .*o space"):
            export.save(tmp_path / type(error).__name__, Config(model=CONFIG), params, None)


def test_a_folder_of_weights_is_no_folder_of_checkpoints(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"no checkpoints; python -m transmamba_jax.convert start-run {folder} WORKDIR"
    ):
        serving_options.restore(folder, None)
    (tmp_path / "config.json").touch()
    (tmp_path / tensor_files.FILE).touch()
    with pytest.raises(ValueError, match=rf"convert from-mamba2 {tmp_path} FOLDER, then .* start-run FOLDER WORKDIR"):
        serving_options.restore(tmp_path, None)
