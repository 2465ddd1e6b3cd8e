"""Configuration: accepted values, refused values, and the messages of refusals."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import transmamba_jax as tm
from transmamba_jax import config_io
from transmamba_jax.training import __main__ as training_command

_FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(set(_FOLDER.rglob("*.yaml")) - set(_FOLDER.glob("studies/*")))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return path


def test_defaults_and_file_name(tmp_path: Path) -> None:
    config = tm.load_config(write(tmp_path, ""))
    assert config == tm.Config(workdir="runs/experiment")


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {d_model: 128, transpoints: [0, 4]}\noptimizer: {learning_rate: 3e-4}\n")
    config = tm.load_config(path, ["--train.steps", "500", "--model.d-model", "64", "--model.tie-embeddings", "False"])
    assert config.model.d_model == 64
    assert config.model.transpoints == (0, 4)
    assert config.model.tie_embeddings is False
    assert config.optimizer.learning_rate == 3e-4
    assert config.train.steps == 500
    assert tm.load_config(path, ["--model.transpoints", "1", "2", "3"]).model.transpoints == (1, 2, 3)
    assert tm.load_config(path, ["--kernels.ssd", "sequential"]).kernels == tm.KernelsConfig(ssd="sequential")


NAMED = "model: {num_layers: 4, transpoints: log_spaced}\ndata: {seq_len: 256}\n"


@pytest.mark.parametrize(
    ("overrides", "points"),
    [
        ([], (0, 64, 128, 256)),
        (["--data.seq-len", "1024"], (0, 256, 512, 1024)),
        (["--model.num-layers", "3"], (0, 128, 256)),
        (["--model.transpoints", "descending", "--data.seq-len", "64"], (64, 32, 16, 0)),
        (["--model.transpoints=hybrid_first", "--model.num-layers", "2"], (256, 0)),
        (["--model.transpoints", "1", "2"], (1, 2)),
        (["--model.transpoints", "v1", "--model.transpoints", "7"], (7,)),
    ],
)
def test_a_schedule_by_name_follows_the_rows_and_the_layers(tmp_path: Path, overrides: list[str], points: Any) -> None:
    path = write(tmp_path, NAMED)
    config = tm.load_config(path, overrides)
    assert config.model.transpoints == points
    assert config_io.from_yaml(config_io.to_yaml(config)) == config  # the integers are stored
    assert yaml.safe_load(config_io.to_yaml(config))["model"]["transpoints"] == list(points)
    assert training_command.parse(["--config", str(path), *overrides]).experiment == config
    assert config.warnings() == []


def test_a_schedule_by_name_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experiment.yaml: model.transpoints: v9 has 8 TransPoints, .* has 4 layers"):
        tm.load_config(write(tmp_path, NAMED.replace("log_spaced", "v9")))
    with pytest.raises(ValueError, match=r"model.transpoints: unknown schedule 'v10'; the names are transformer"):
        tm.load_config(write(tmp_path, NAMED), ["--model.transpoints", "v10"])


def test_a_literal_schedule_for_other_rows_is_warned_of() -> None:
    config = tm.load_config("tiny")
    assert config.model.transpoints == (0, 64, 128, 256)
    assert config.warnings() == []
    (warning,) = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=512)).warnings()
    assert "model.transpoints=0, 64, 128, 256 is log_spaced for rows of 256 tokens, and data.seq_len=512" in warning


def test_yaml_merges_are_no_second_key(tmp_path: Path) -> None:
    text = "eval: &often {every: 5}\ncheckpoint: {<<: *often, every: 6, keep_latest: 3}\n"
    config = tm.load_config(write(tmp_path, text))
    assert (config.eval.every, config.checkpoint.every, config.checkpoint.keep_latest) == (5, 6, 3)


def test_a_mapping_of_names_reads_from_yaml_and_options_and_goes_back(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {lr_multipliers: {embedding: 1, 'layers/*': 5e-1}}\n")
    config = tm.load_config(path)
    assert config.optimizer.lr_multipliers == (("embedding", 1.0), ("layers/*", 0.5))
    assert hash(config) == hash(tm.load_config(path))
    assert tm.OptimizerConfig(lr_multipliers={"embedding": 1, "layers/*": 0.5}) == config.optimizer
    assert yaml.safe_load(config_io.to_yaml(config))["optimizer"]["lr_multipliers"] == {"embedding": 1, "layers/*": 0.5}
    assert config_io.from_yaml(config_io.to_yaml(config)) == config
    assert config_io.from_tree(config_io.to_tree(tm.Config())) == tm.Config()
    with pytest.raises(ValueError, match=r"lr_multipliers has the pattern 'a' more than once"):
        tm.OptimizerConfig(lr_multipliers=(("a", 1.0), ("*", 2.0), ("a", 0.5)))
    other = tm.load_config(path, ["--optimizer.lr-multipliers", "*", "2", "embedding", "0.1"])
    assert other.optimizer.lr_multipliers == (("*", 2.0), ("embedding", 0.1))
    assert config_io.differences(tm.Config(workdir=config.workdir), config) == [
        "optimizer.lr_multipliers: {} -> {'embedding': 1.0, 'layers/*': 0.5}"
    ]


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = tm.load_config(write(tmp_path, "kernels: {ssd: reference, chunk_size: 16}\ndata: {source: 'text:*.md'}\n"))
    assert tm.load_config(write(tmp_path, config_io.to_yaml(config))) == config


@pytest.mark.parametrize(
    ("save", "measure", "keep", "count"),
    [(4, 6, 1, 0), (4, 5, 1, 1), (5, 4, 2, 1), (20, 5, 1, 0), (4, 0, 1, 0), (0, 5, 1, 0), (4, 5, 0, 0), (4, 20, 1, 1)],
)
def test_a_best_checkpoint_that_cannot_be_is_warned_of(save: int, measure: int, keep: int, count: int) -> None:
    checkpoint = tm.CheckpointConfig(every=save, keep_best=keep)
    config = tm.Config(train=tm.TrainConfig(steps=20), checkpoint=checkpoint, eval=tm.EvalConfig(every=measure))
    assert len(config.warnings()) == count
    assert all(f"keep_best={keep} will keep none" in warning for warning in config.warnings())


def test_differences_name_the_fields() -> None:
    old = tm.Config()
    new = dataclasses.replace(old, train=dataclasses.replace(old.train, steps=7), workdir="elsewhere")
    assert config_io.differences(old, new) == ["train.steps: 1000 -> 7", "workdir: 'runs/default' -> 'elsewhere'"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "unknown option 'modle'; did you mean 'model'?"),
        ("model: {num_head: 4}", "unknown option 'model.num_head'; did you mean 'num_heads'?"),
        ("model: {d_model: '64'}", r"model.d_model must be of type int \(decimal, .*\), found '64' of type str"),
        (
            "train: {steps: 010}",
            r"must be of type int \(decimal, without leading zeros\), found '010' of type str",
        ),
        ("train: {steps: 1:30}", "found '1:30' of type str"),
        ("train: {steps: 0x10}", "found '0x10' of type str"),
        ("model: {d_model: 64.0}", r"model.d_model must be of type int .*, found 64.0 of type float"),
        ("model: {d_model: true}", r"model.d_model must be of type int .*, found True of type bool"),
        ("model: {use_d_skip: 1}", "model.use_d_skip must be of type bool, found 1 of type int"),
        ("model: {remat: some}", "model.remat must be one of 'none', 'dots', 'full', found 'some'"),
        ("model: 3", "model must be a mapping of options, found 3"),
        ("model: {num_heads: 4, num_groups: 3}", r"num_groups must divide .* num_groups=3, num_heads=4; .*\[1, 2, 4\]"),
        ("model: {transpoints: [0, -1]}", r"model.transpoints\[1\] must be >= 0 \(a number of tokens\), found -1"),
        ("model: {transpoints: 8}", "model.transpoints must be a list, found 8"),
        ("model: {transpoints: [v9]}", r"model.transpoints\[0\] must be of type int .* found 'v9'"),
        ("model: {num_layers: 2}", "8 entries but the model has num_layers=2"),
        ("model: {state_dim: 7}", "model.state_dim must be even"),
        ("kernels: {ssd: sequentiel}", "kernels.ssd must be null .* found 'sequentiel'; did you mean 'sequential'?"),
        ("kernels: {ssd: cuda}", "kernels.ssd .*; the names are reference, associative, sequential, pallas_tpu,"),
        ("kernels: {attention: flash}", "kernels.attention .* found 'flash'; did you mean 'splash'?"),
        ("kernels: {attention: xla}", "kernels.attention .*; the names are reference, blockwise, cudnn, splash"),
        ("kernels: {chunk_size: 0}", "kernels.chunk_size must be >= 1, found 0"),
        ("model: {kernel: reference}", "unknown option 'model.kernel'"),
        (
            "train: {steps: 1}\nmodel: {}\ntrain: {}",
            r"(?s)not plain YAML: 'train' is given here.* line 1, .*and again.* line 3, ",
        ),
        ("model: {d_model: 8, num_layers: 8, d_model: 8}", "'d_model' is given here"),
        ("model: {d_model: 0}", "model.d_model must be >= 1, found 0"),
        ("data: {source: 'books/*.txt'}", "data.source must be .* found 'books/\\*.txt'"),
        ("model: {num_layers: 1_000_000_000}", "model.num_layers must be <= 10000, found 1000000000"),
        ("model: {vocab_size: 10000000000}", "model.vocab_size must be <= 2147483647, found 10000000000"),
        (
            "model: {d_model: 2000000000, mlp_dim: 2000000000}",
            "d_model=2000000000 times the widest layer .* 3.2e",
        ),
        ("model: {num_heads: 2000000000, num_groups: 3}", r"must divide .*use one of \[1, 2, 4, .*2000000000\]"),
        ("model: {transpoints: [99999999999]}", r"model.transpoints\[0\] must be below 2\*\*31"),
        ("model: {norm_eps: .nan}", "model.norm_eps must be positive and finite, found nan"),
        ("model: {rope_theta: .inf}", "model.rope_theta must be positive and finite, found inf"),
        ("data: {seq_len: 10000000000}", "data.seq_len must be <= 2147483647, found 10000000000"),
        ("data: {source: 'text:'}", "data.source must be"),
        ("data: {end_of_document: </s>}", "data.end_of_document is for a tokenizer.json: .* found '</s>'"),
        (
            "data: {batch_size: 6}\ntrain: {accumulation: 4}",
            r"train.accumulation=4 must divide data.batch_size=6; .*\[1, 2, 3, 6\]",
        ),
        ("train: {seed: 4294967296}", r"train.seed must be <= 4294967295, found 4294967296"),
        ("optimizer: {lr_multipliers: [a]}", r"optimizer.lr_multipliers must be a mapping, found \['a'\]"),
        ("optimizer: {lr_multipliers: {a: x}}", r"optimizer.lr_multipliers\['a'\] must be of type float, found 'x'"),
        ("optimizer: {learning_rate: -1}", "optimizer.learning_rate must be positive, found -1"),
        ("optimizer: {final_learning_rate: 1}", "final_learning_rate=1.0 must not exceed"),
        ("optimizer: {beta1: 1}", r"optimizer.beta1 must be in \[0, 1\), found 1"),
        ("mesh: {data: 0}", "mesh.data must be >= 1, or -1"),
        ("mesh: {data: -1, fsdp: -1}", "at most one axis of mesh may be -1"),
        ("checkpoint: {keep_latest: 0}", "checkpoint.keep_latest must be >= 1, found 0"),
        ("eval: {every: -1}", "eval.every must be >= 0, found -1"),
        ("model: !!python/object/apply:os.getcwd []", "is not plain YAML"),
        ("model: {? [d_model] : 8}", "(?s)is not plain YAML: .*found unhashable key"),
        ("model: [", "is not plain YAML"),
        ("- 1", "the config must be a mapping of options"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tm.load_config(write(tmp_path, text))
    assert "experiment.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tm.ModelConfig(num_layers=True), "model.num_layers must be of type int .*, found True of type bool"),
        (lambda: tm.ModelConfig(d_model=np.int64(64)), r"model.d_model must be of type int .* of type int64"),
        (lambda: tm.ModelConfig(num_heads=4.0), "model.num_heads must be of type int .*, found 4.0 of type float"),
        (lambda: tm.ModelConfig(remat="some"), "model.remat must be one of 'none', 'dots', 'full', found 'some'"),
        (lambda: tm.ModelConfig(dtype="float16"), "model.dtype must be one of 'float32', 'bfloat16', found 'float16'"),
        (lambda: tm.ModelConfig(transpoints=8), "model.transpoints must be a list, found 8"),
        (lambda: tm.DataConfig(shuffle=1), "data.shuffle must be of type bool, found 1 of type int"),
        (
            lambda: tm.OptimizerConfig(learning_rate="3e-4"),
            "learning_rate must be of type float, found '3e-4'",
        ),
        (lambda: tm.TrainConfig(steps=1e3), "train.steps must be of type int .*, found 1000.0 of type float"),
        (lambda: tm.Config(model=tm.DataConfig()), "config.model must be of type ModelConfig, found DataConfig"),
    ],
)
def test_wrong_types_in_python_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_python_may_write_lists_whole_floats_and_paths(tmp_path: Path) -> None:
    config = tm.Config(
        model=tm.ModelConfig(transpoints=[0, 8], norm_eps=1),
        data=tm.DataConfig(tokenizer=tmp_path / "tokenizer.json"),
        workdir=tmp_path,
    )
    assert config.model.transpoints == (0, 8)
    assert isinstance(config.model.norm_eps, float)
    assert (config.data.tokenizer, config.workdir) == (str(tmp_path / "tokenizer.json"), str(tmp_path))
    assert config_io.from_yaml(config_io.to_yaml(config)) == config
    assert hash(config.model) == hash(dataclasses.replace(config.model))


def test_the_source_of_another_program_is_read_and_not_trained_on(tmp_path: Path) -> None:
    """A config names the source of the program that wrote it; only opening its documents needs that program."""
    path = write(tmp_path, "data: {source: 'txt:a'}")
    assert config_io.from_yaml(config_io.to_yaml(tm.load_config(path))).data.source == "txt:a"
    message = (
        r"data\.source must be .* found 'txt:a'; did you mean 'text'\?"
        r".*call transmamba_jax\.register_source\('txt', \.\.\.\) in this process first"
    )
    with pytest.raises(ValueError, match=message):
        training_command.parse(["--config", str(path)])
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        tm.train(tm.load_config(path, ["--workdir", str(workdir)]))
    assert not workdir.exists()


def test_help_describes_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training_command.parse(["--help"])
    shown = re.findall(r"\w+", capsys.readouterr().out)
    for field in dataclasses.fields(tm.Config):
        if dataclasses.is_dataclass(field.default):
            heading = [field.name, "options", *re.findall(r"\w+", type(field.default).__doc__ or "")]
            assert " ".join(heading) in " ".join(shown)
    assert "noqa" not in shown


def test_missing_file_lists_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ValueError, match=r"cannot read the config .*tiny.yaml.*No such file.*are experiment.yaml$"):
        tm.load_config(tmp_path / "tiny.yaml")
    with pytest.raises(ValueError, match=r"No such file or directory; did you mean 'experiment\.yaml'\?"):
        tm.load_config(tmp_path / "experimnt.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.stepz", "5"], r"'--train.stepz', '5'\]: Unrecognized options: --train.stepz, 5 .*--train.steps"),
        (["--train.steps", "five"], "--train.steps"),
        (["--model.num-groups", "3"], "num_groups must divide"),
        (["--train.steps"], "--train.steps"),
        (["--model.remat", "some"], "'none', 'dots', 'full'"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tm.load_config(write(tmp_path, ""), overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_validate_and_have_shapes(path: Path) -> None:
    config = tm.load_config(path)
    tokens = jax.ShapeDtypeStruct((1, config.data.seq_len), jnp.int32)
    model = tm.TransMamba(config.model)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    logits = jax.eval_shape(model.apply, params, tokens)
    assert logits.shape == (1, config.data.seq_len, config.model.vocab_size)


def test_there_are_shipped_configs() -> None:
    assert "tiny" in [path.stem for path in CONFIGS]
    assert len([path for path in CONFIGS if path.parent.name == "paper"]) == 8


def test_the_config_of_a_run_means_that_run_wherever_it_is(tmp_path, monkeypatch):
    run = tmp_path / "moved" / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("workdir: runs/experiment\n", encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert tm.load_config("../moved/run/config.yaml").workdir == "../moved/run"
    assert tm.load_config(run / "config.yaml").workdir == str(run)
    assert tm.load_config(run / "config.yaml", ["--workdir", "fork"]).workdir == "fork"
    # A folder without checkpoints is no run: an exported one, or one that a person made.
    (run / "checkpoints").rmdir()
    assert tm.load_config(run / "config.yaml").workdir == "runs/experiment"
