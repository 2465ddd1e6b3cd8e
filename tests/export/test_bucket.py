"""The commands that run a checkpoint, with the checkpoint in a bucket."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import transmamba_jax as tm
from tests.models import CONFIG
from transmamba_jax import data, export
from transmamba_jax.checkpoint.__main__ import main as checkpoint_command
from transmamba_jax.config import Config, DataConfig, EvalConfig, TrainConfig
from transmamba_jax.convert import mamba2
from transmamba_jax.convert.__main__ import main as convert_command
from transmamba_jax.evaluate.__main__ import main as evaluate
from transmamba_jax.export.__main__ import main as export_command
from transmamba_jax.export.folder import abstract_params
from transmamba_jax.generate.__main__ import main as generate
from transmamba_jax.report.__main__ import main as report
from transmamba_jax.runtime import tree_paths
from transmamba_jax.training import starting_points
from transmamba_jax.training.__main__ import main as train


@pytest.fixture(name="folder", scope="session")  # of the bucket: tests of other modules may run between those here
def _folder(bucket, tmp_path_factory):
    """Write a run at step 0, an exported folder and a text into a bucket; return the exported folder here."""
    here = tmp_path_factory.mktemp("exported")
    for index in range(40):
        bucket.put(f"commands/text/{index:02}.txt", f"document {index} of a small text\n".encode() * 3)
    config = Config(
        model=dataclasses.replace(CONFIG, vocab_size=257),
        data=DataConfig(source="text:gs://bucket/commands/text/*.txt", seq_len=16, batch_size=2, cache_dir=str(here)),
        eval=EvalConfig(windows=2),
    )
    leaves, tree = jax.tree.flatten(abstract_params(config.model))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [0.1 * rng.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in leaves])
    for folder in (here / "export", "gs://bucket/commands/export"):
        export.save(folder, config, params, data.load_tokenizer("bytes"))
    mamba2.start_run("gs://bucket/commands/export", "gs://bucket/commands/run")
    return here / "export"


@pytest.mark.slow
def test_generate_and_load_say_the_same_from_here_and_from_there(folder, capsys):
    texts = [
        tm.load(place).generate("abc", max_new_tokens=4)
        for place in (folder, "gs://bucket/commands/export", "gs://bucket/commands/run")
    ]
    assert texts[0] == texts[1] == texts[2]
    arguments = ["--checkpoint", "gs://bucket/commands/run", "--prompt", "abc", "--max-new-tokens", "4"]
    assert generate(arguments) == 0
    assert capsys.readouterr().out.startswith("abc")


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_evaluate_reads_checkpoint_and_text(capsys):
    assert evaluate(["--checkpoint", "gs://bucket/commands/run/checkpoints/0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] > 0


def test_export_writes_what_it_reads(folder):
    arguments = ["--checkpoint", "gs://bucket/commands/run", "--output", "gs://bucket/commands/again", "--platforms"]
    assert export_command(arguments) == 0
    first, second = export.load(folder), export.load("gs://bucket/commands/again")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.config.model == second.config.model


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (checkpoint_command, ["verify", "gs://bucket/commands/run"]),
        (checkpoint_command, ["list", "gs://bucket/commands/run"]),
        (evaluate, ["--checkpoint", "gs://bucket/commands/run"]),
        (export_command, ["--checkpoint", "gs://bucket/commands/run", "--output", "{}/export"]),
        (convert_command, ["start-run", "gs://bucket/commands/export", "gs://bucket/commands/other"]),
        (report, ["gs://bucket/commands/run"]),
        (train, ["--config", "gs://bucket/commands/run/config.yaml"]),
        (train, ["--config", "gs://bucket/commands/run/config"]),
    ],
)
def test_a_bucket_that_refuses_ends_a_command_with_one_line(bucket, tmp_path, capsys, command, arguments):
    with bucket.accident(before=lambda _: 403):
        assert command([argument.format(tmp_path) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert "Forbidden: GET bucket" in said.err
    assert "gcloud auth application-default login" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_starting_point_that_the_bucket_refuses_is_named(bucket, tmp_path):
    for given in "gs://bucket/commands/run", "gs://bucket/commands/run@4":
        config = Config(train=TrainConfig(init_from=given))
        with (
            bucket.accident(before=lambda _: 403),
            pytest.raises(ValueError, match=f"train.init_from={given} cannot be read: Forbidden: GET bucket"),
        ):
            starting_points.with_origin(config, tmp_path / "new")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("gs://bucket/commands/run", "gs://bucket/commands/run@0"),
        ("gs://bucket/commands/run@0", "gs://bucket/commands/run@0"),
        ("gs://bucket/commands/export", "gs://bucket/commands/export"),
    ],
)
def test_a_starting_point_may_be_in_a_bucket(given, name, tmp_path):
    config = Config(model=dataclasses.replace(CONFIG, vocab_size=257), train=TrainConfig(init_from=given))
    named = starting_points.with_origin(config, tmp_path / "new")
    assert named.train.init_from == name
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = jax.tree.map(lambda leaf: leaf.update(sharding=here), abstract_params(config.model))
    leaves = starting_points.read(named, targets, data.load_tokenizer("bytes"))
    assert leaves.keys() == tree_paths.flatten(targets).keys()
