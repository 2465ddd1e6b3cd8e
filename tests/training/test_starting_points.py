"""Runs that start from parameters which are there already: every kind of source, forks, misfits, provenance."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import train as command
import transmamba_jax as tm
from tests.training.conftest import configs_in
from tests.training.runs import metrics_of, train
from tests.training.support import Little, little_config
from transmamba_jax import checkpoint, config_io, convert, data, export, sharding
from transmamba_jax.config import Config
from transmamba_jax.convert.mamba2 import start_run
from transmamba_jax.runtime import logs
from transmamba_jax.runtime.tree_paths import flatten
from transmamba_jax.training import starting_points
from transmamba_jax.training.loss import loss_and_gradient
from transmamba_jax.training.step import TrainState, abstract_state

MAMBA2 = Path(__file__).parents[1] / "golden" / "mamba2"


def _flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten(jax.device_get(tree)).items()}


def _params(workdir: str, step: int | None = None):
    return _flat(checkpoint.restore(Path(workdir) / "checkpoints", step, params_only=True).params)


@pytest.fixture(name="sources", scope="module")
def _sources(tmp_path_factory):
    """Return name -> folder of one small Mamba-2 model, stored in bfloat16, and its config and parameters."""
    folder = tmp_path_factory.mktemp("sources")
    model, params = convert.from_mamba2(MAMBA2 / "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    export.save(folder / "exported", Config(model=model), params, None)
    start_run(folder / "exported", folder / "run")
    places = {
        "Mamba-2": MAMBA2 / "bfloat16",
        "exported": folder / "exported",
        "run": folder / "run",
        "run@step": f"{folder / 'run'}@0",
        "checkpoints": folder / "run" / "checkpoints",
        "step": folder / "run" / "checkpoints" / "0",
    }
    return places, model, params


def test_a_started_run_is_the_same_from_every_folder(sources, tmp_path, monkeypatch):
    places, _, _ = sources
    monkeypatch.chdir(tmp_path)
    start_run(places["exported"], "run")
    assert tm.load_config(tmp_path / "run" / "config.yaml").workdir == str(tmp_path / "run")


KINDS = ("Mamba-2", "exported", "run", "run@step", "checkpoints", "step")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_source_gives_its_parameters_as_float32(sources, tmp_path, name):
    places, model, params = sources
    # A schedule, dtypes and kernels are no part of the parameters.
    own = dataclasses.replace(model, transpoints=(0, 16), dtype="float32", param_dtype="float32")
    config = dataclasses.replace(little_config(train={"init_from": str(places[name])}), model=own)
    config = starting_points.with_origin(config, tmp_path)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    module = tm.TransMamba(config.model, config.kernels)
    targets = abstract_state(config, module, mesh).params
    leaves = starting_points.read(config, targets, data.load_tokenizer("bytes"))
    found = flatten(starting_points.apply(TrainState.create(config, module, mesh), leaves, name).params)
    expected = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert (leaf.dtype, leaf.sharding) == (jnp.float32, flatten(targets)[path].sharding)
        np.testing.assert_array_equal(leaf, expected[path])


@pytest.fixture(name="trained", scope="module")
def _trained(tmp_path_factory):
    """Return the work directory of a finished run with checkpoints of steps 8 and 10."""
    config = configs_in(tmp_path_factory.mktemp("trained"))("old")
    train(config)
    return config.workdir


@pytest.fixture(name="old")
def _old(make, trained):
    """Return the config of a copy of it."""
    config = make("old")
    shutil.copytree(trained, config.workdir)
    return config


EIGHT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from transmamba_jax import sharding
from transmamba_jax.config import MeshConfig
from transmamba_jax.data import load_tokenizer
from transmamba_jax.runtime.tree_paths import flatten, nest
from transmamba_jax.training import starting_points
from transmamba_jax.training.step import TrainState
from tests.training.support import little_config

config = little_config(train={"init_from": sys.argv[1], "init_partial": True})
mesh = sharding.make_mesh(MeshConfig(1, 8, 1, 1))
shapes = {"embedding": (264, 8), "layers/mlp/up/kernel": (2, 8, 8), "final_norm/scale": (8,)}
state = lambda: {path: jnp.full(shape, -7.0) for path, shape in shapes.items()}
own = jax.device_put(nest(state()), sharding.parameter_shardings(nest(state()), mesh))
targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), own)
leaves = starting_points.read(config, targets, load_tokenizer("bytes"))
none = jnp.zeros(())
found = starting_points.apply(TrainState(own, {}, none, none, none, none), leaves, "source").params
same = jax.tree.map(lambda leaf, before: leaf.sharding == before.sharding, found, own)
parts = found["embedding"].addressable_shards[0].data.size
print(json.dumps({"same": jax.tree.all(same), "parts": parts}))
np.savez(sys.argv[2], **{path.replace("/", "."): leaf for path, leaf in flatten(found).items()})
"""


@pytest.mark.slow
def test_parameters_are_cut_over_the_devices_as_the_runs_own(trained, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", EIGHT, f"{trained}@10", str(tmp_path / "found.npz")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"same": True, "parts": 264 * 8 // 8}
    found, expected = np.load(tmp_path / "found.npz"), _params(trained)
    np.testing.assert_array_equal(found["embedding"][:256], expected["embedding"])
    assert np.all(found["embedding"][256:] == -7)
    np.testing.assert_array_equal(found["layers.mlp.up.kernel"], expected["layers/mlp/up/kernel"])
    assert np.all(found["final_norm.scale"] == -7)


@pytest.mark.slow
def test_a_fork_starts_anew_from_the_parameters_of_a_step(make, old, capsys):
    fork = make("fork", train={"steps": 4, "init_from": f"{old.workdir}@8"}, optimizer={"name": "muon"})
    assert train(fork) == 0
    said = capsys.readouterr().out
    assert f"starting from {old.workdir}@8: 4 of 4 parameters\n" in said
    # The first loss is that of the old parameters on the first batch of all.
    tokens = data.train_batches(old.data, data.load_tokenizer("bytes"))
    batch = {name: jnp.asarray(rows) for name, rows in next(tokens).items() if name != "bytes"}
    params = checkpoint.restore(f"{old.workdir}/checkpoints", 8, params_only=True).params
    loss, _ = loss_and_gradient(params, Little(old.model), batch, 1, 24)
    first, *_ = metrics_of(Path(fork.workdir))
    assert (first["step"], first["loss"]) == (1, pytest.approx(float(loss), rel=1e-6))
    assert first["learning_rate"] == pytest.approx(5e-3)  # warms up again
    assert checkpoint.complete_steps(Path(fork.workdir) / "checkpoints") == [4]
    state = checkpoint.restore(f"{fork.workdir}/checkpoints").state
    assert int(state["step"]) == 4
    counts = [int(leaf) for path, leaf in flatten(state["opt_state"]).items() if path.endswith("count")]
    assert set(counts) == {4}


def test_the_source_is_named_in_the_config_and_not_read_again(make, old, capsys, monkeypatch):
    monkeypatch.chdir(Path(old.workdir).parent)
    fork = make("fork", train={"steps": 4, "init_from": "old"})
    assert train(fork) == 0
    saved = lambda: config_io.read_config_file(Path(fork.workdir) / "config.yaml").train.init_from
    assert saved() == f"{old.workdir}@10"
    shutil.rmtree(old.workdir)
    capsys.readouterr()
    for steps, given in ((6, "old"), (7, None), (8, f"{old.workdir}@10"), (9, "elsewhere@3")):
        assert train(make("fork", train={"steps": steps, "init_from": given})) == 0
        assert saved() == f"{old.workdir}@10"
        said = capsys.readouterr().out
        assert ("is not read" in said) == (given == "elsewhere@3")
        assert "train.init_from:" not in said
        assert "starting from" not in said
    assert f"train.init_from=elsewhere@3 is not read: the run in {fork.workdir} began from {old.workdir}@10" in said
    stored = checkpoint.restore(f"{fork.workdir}/checkpoints", params_only=True).config
    assert stored.train.init_from == f"{old.workdir}@10"
    plain = make("plain", train={"steps": 1})
    train(plain)
    train(make("plain", train={"steps": 2, "init_from": fork.workdir}))
    assert "began with fresh parameters and continues from its own checkpoint" in capsys.readouterr().out


def test_a_fork_that_was_killed_before_its_first_checkpoint_starts_from_the_same_step(make, old, monkeypatch):
    fork = make("fork", train={"steps": 2, "init_from": old.workdir})
    with monkeypatch.context() as patch:
        patch.setattr(data.BatchIterator, "__next__", lambda _: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            train(fork)
    train(make("old", train={"steps": 12}))  # the old run has gone on
    saved = config_io.read_config_file(Path(fork.workdir) / "config.yaml")
    assert saved.train.init_from == f"{old.workdir}@10"
    assert train(saved) == 0
    assert config_io.read_config_file(Path(fork.workdir) / "config.yaml") == saved


def test_what_does_not_fit_is_refused_in_a_table_before_compilation(make, old, capsys):
    wide = make("wide", model={"d_model": 16}, train={"init_from": old.workdir})
    with pytest.raises(ValueError, match="do not fit") as error:
        train(wide)
    assert "compiling" not in capsys.readouterr().out
    assert str(error.value).splitlines() == [
        f"train.init_from={old.workdir}@10: its parameters do not fit this model:",
        "  parameter               this model  source",
        "  embedding               [256,16]    [256,8]  shape mismatch",
        "  layers/mlp/down/kernel  [2,16,16]   [2,8,8]  shape mismatch",
        "  layers/mlp/up/kernel    [2,16,16]   [2,8,8]  shape mismatch",
        "  options that differ from the source: model.d_model: 8 -> 16",
        "  Use the model of the source; or take what fits, and the vocabulary rows that both have, with "
        "--train.init-partial True",
    ]
    assert not (Path(wide.workdir) / "config.yaml").exists()
    targets = {
        "embedding": jax.ShapeDtypeStruct((300, 8), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0])),
        "lm_head": jax.ShapeDtypeStruct((8, 300), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0])),
    }
    config = make("wide", train={"init_from": f"{old.workdir}@8"})
    with pytest.raises(ValueError, match="do not fit") as error:
        starting_points.read(config, targets, data.load_tokenizer("bytes"))
    table = [line.split("  ")[-1] for line in str(error.value).splitlines()[2:7]]
    assert table == ["shape mismatch, 256 vocabulary rows in both", "missing", *["unexpected"] * 3]


def test_a_grown_vocabulary_keeps_its_rows_and_the_new_ones_are_fresh(make, old, capsys):
    sections = {"model": {"vocab_size": 300}, "optimizer": {"learning_rate": 1e-30, "final_learning_rate": 0.0}}
    grown = make("grown", **sections, train={"steps": 1, "init_from": old.workdir, "init_partial": True})
    assert train(grown) == 0
    said = capsys.readouterr().out
    assert "starting from" in said
    assert "[300,8]     [256,8]  shape mismatch, 256 vocabulary rows in both" in said
    fresh = make("fresh", **sections, train={"steps": 1})
    assert train(fresh) == 0
    found, before, new = _params(grown.workdir), _params(old.workdir), _params(fresh.workdir)
    np.testing.assert_array_equal(found["embedding"][:256], before["embedding"])
    np.testing.assert_array_equal(found["embedding"][256:], new["embedding"][256:])
    np.testing.assert_array_equal(found["layers/mlp/up/kernel"], before["layers/mlp/up/kernel"])
    shrunk = make("shrunk", train={"steps": 1, "init_from": grown.workdir, "init_partial": True}, optimizer=RATE)
    assert train(shrunk) == 0
    np.testing.assert_array_equal(_params(shrunk.workdir)["embedding"], before["embedding"])


RATE = {"learning_rate": 1e-30, "final_learning_rate": 0.0}


def test_another_tokenizer_is_refused_unless_in_part(make, old, capsys, monkeypatch):
    monkeypatch.setattr("transmamba_jax.data.tokenizers.ByteTokenizer.to_json", lambda _: "another")
    begin = {"steps": 1, "init_from": old.workdir}
    with pytest.raises(ValueError, match=r"@10: data\.tokenizer differs from the tokenizer of .*--train\.init-"):
        train(make("new", train=begin))
    assert train(make("new", train={**begin, "init_partial": True})) == 0
    assert "data.tokenizer differs from the tokenizer of the source" in capsys.readouterr().out


def test_the_parameters_of_a_programs_own_model_are_not_taken_for_plain_ones(make, old, monkeypatch, capsys):
    read = starting_points.checkpoint.restore

    def own(*arguments, **options):
        saved = read(*arguments, **options)
        given = dataclasses.replace(saved.config.train, given_model="TransMamba(attention=linear)")
        return dataclasses.replace(saved, config=dataclasses.replace(saved.config, train=given))

    monkeypatch.setattr(starting_points.checkpoint, "restore", own)
    words = r"are those of TransMamba\(attention=linear\), and the model here is a plain one"
    with pytest.raises(ValueError, match=words + ". --train.init-partial True starts nevertheless"):
        train(make("new", train={"init_from": old.workdir}))
    assert train(make("new", train={"init_from": old.workdir, "init_partial": True, "steps": 1})) == 0
    assert re.search(words, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none", "train.init_from: there is no .*none"),
        ("old@9", r"old@9 must be a run, .* no complete checkpoint of step 9 in .*: its complete steps are 8, 10"),
        (".", "must be a run, a checkpoint, an exported folder or a folder of Mamba-2 safetensors: no complete check"),
        ("new", "train.init_from=new is the work directory of this run: give another --workdir"),
        (f"{MAMBA2 / 'tied'}@4", "tied is a folder of safetensors, which has no steps"),
    ],
)
def test_a_source_that_is_none_is_refused(make, old, monkeypatch, place, message):
    monkeypatch.chdir(Path(old.workdir).parent)
    with pytest.raises(ValueError, match=message):
        train(make("new", train={"init_from": place}))


def test_a_source_with_a_nan_is_refused_by_name(old):
    params = checkpoint.restore(f"{old.workdir}/checkpoints", params_only=True).params
    state = TrainState(params, {}, *[jnp.zeros(())] * 4)
    leaves = flatten(params) | {"layers/mixer/a_log": jnp.full((2, 3), jnp.nan)}
    with pytest.raises(ValueError, match="init_from=old: layers/mixer/a_log has values that are not finite"):
        starting_points.apply(state, leaves, "old")


def test_the_command_line_forks(old, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(config_io.to_yaml(old), encoding="utf-8")
    options = ["--workdir", str(tmp_path / "fork"), "--train.init-from", f"{old.workdir}@8", "--train.steps", "2"]
    with logs.shown():
        assert command.main(["--config", str(path), *options], model=Little) == 0
    assert config_io.read_config_file(tmp_path / "fork" / "config.yaml").train.init_from == f"{old.workdir}@8"
