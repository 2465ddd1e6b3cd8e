"""Runs that go on with another config, optimizer or state: what changes is said, what does not fit is refused."""

import dataclasses
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests.training.runs import lines_of, steps_of, train
from tests.training.support import Little
from transmamba_jax import checkpoint, config_io, export
from transmamba_jax.config import Config, KernelsConfig
from transmamba_jax.convert.mamba2 import start_run


@pytest.mark.slow
def test_a_longer_run_continues_and_names_what_changed(make, capsys):
    train(make(train={"steps": 6}))
    capsys.readouterr()
    settings = make(train={"steps": 9}, optimizer={"beta2": 0.99}, kernels={"chunk_size": 7})
    assert train(settings) == 0
    output = capsys.readouterr().out
    assert "train.steps: 6 -> 9" in output
    assert "optimizer.beta2: 0.95 -> 0.99" in output
    assert "continuing from step 6" in output
    assert "kernels" not in output
    assert checkpoint.restore(f"{settings.workdir}/checkpoints", params_only=True).config.kernels == KernelsConfig()
    assert [line["step"] for line in lines_of(settings) if "loss" in line] == list(range(1, 10))
    assert config_io.read_config_file(Path(settings.workdir) / "config.yaml") == settings


def test_a_run_of_a_version_with_other_options_continues(make, monkeypatch, capsys):
    settings = make(train={"steps": 2}, eval={"every": 0})
    train(settings)
    (Path(settings.workdir) / "config.yaml").unlink()  # as the refusal to read it says

    def unknown(_: str) -> None:
        raise ValueError("unknown option 'train.old'")

    monkeypatch.setattr(config_io, "from_yaml", unknown)
    assert train(make(train={"steps": 3}, eval={"every": 0})) == 0
    output = capsys.readouterr().out
    assert "rates before and after step 2 cannot be compared: unknown option 'train.old'" in output


def test_a_checkpoint_of_another_run_is_refused_and_kept(make, monkeypatch):
    earlier = make(train={"steps": 2}, eval={"every": 0})
    train(earlier)
    refused = [
        (
            {"model": {"d_model": 16}},
            r"model\.d_model: 8 -> 16; \d+ arrays differ, the first is params/embedding: float32\[256,8\] there, "
            r"float32\[256,16\] here",
        ),
        ({"optimizer": {"name": "muon"}}, r"name: 'adamw' -> 'muon'; .* state/opt_state/.* --checkpoint.partial True"),
        ({"data": {"seq_len": 10}}, "seq_len: saved 12, now 10"),
        ({"data": {"batch_size": 4}}, r"rows: saved 8, now 4.* --checkpoint\.partial True"),
    ]
    for sections, message in refused:
        with pytest.raises(ValueError, match=message):
            train(make(**{"train": {"steps": 4}, "eval": {"every": 0}, **sections}))
    monkeypatch.setattr("transmamba_jax.data.tokenizers.ByteTokenizer.to_json", lambda _: "another")
    with pytest.raises(ValueError, match=r"data\.tokenizer differs"):
        train(earlier)
    assert config_io.read_config_file(Path(earlier.workdir) / "config.yaml") == earlier
    assert steps_of(earlier) == [2]


class Refused(Little):
    """Stands in for a kernel that does not serve the shapes that it is given."""

    def hidden(self, tokens, segment_ids=None):
        if tokens.shape[0] > 1:
            raise ValueError("this kernel serves one row")
        return super().hidden(tokens, segment_ids)


def test_what_is_refused_while_compiling_leaves_the_earlier_config(make):
    settings = make(train={"steps": 2}, eval={"every": 0})
    train(settings)
    kept = [Path(settings.workdir) / name for name in ("config.yaml", "kernels.json")]
    before = [file.read_bytes() for file in kept]
    longer = make(train={"steps": 4}, eval={"every": 0}, kernels={"chunk_size": 7})
    with pytest.raises(ValueError, match="serves one row"):
        tm.train(longer, model=Refused(longer.model))
    with pytest.raises(ValueError, match=r"eval\.schedules needs a TransMamba, found Little"):
        train(make(train={"steps": 4}, eval={"every": 1, "schedules": ("mamba2",)}))
    assert [file.read_bytes() for file in kept] == before


def test_an_optimizer_that_begins_in_the_middle_of_a_run_logs_the_rate_that_it_uses(make, capsys):
    rates = {"schedule": "constant", "learning_rate": 0.01, "muon_learning_rate": 0.02, "warmup_steps": 4}
    run = lambda steps, **more: train(
        make(
            train={"steps": steps, "log_every": 1},
            eval={"every": 0},
            checkpoint={"every": 0, "partial": True},
            optimizer={**rates, **more},
        )
    )
    assert run(6) == 0
    capsys.readouterr()
    assert run(8, name="muon") == 0
    said = "of step 7 changes from 0.01 to 0.0025: the optimizer state was not loaded, and begins its warm-up"
    assert f"the learning rate {said}" in capsys.readouterr().out
    assert _rates(make()) == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.0025, 0.005])
    assert run(10, name="muon") == 0  # its state is loaded now
    assert "rate of step 9" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_extending_a_finished_run_says_how_the_rate_changes_and_a_restart_or_constant_rate_does_not(
    make, capsys, schedule, name
):
    optimizer = {"schedule": schedule, "name": name, "warmup_steps": 2, "muon_learning_rate": 0.05}
    run = lambda steps, **more: train(
        make(train={"steps": steps}, eval={"every": 0}, checkpoint={"every": 0}, optimizer={**optimizer, **more})
    )
    run(6)
    shutil.copytree(make().workdir, f"{make().workdir}-plain")
    capsys.readouterr()
    plain = make(train={"steps": 12}, eval={"every": 0}, checkpoint={"every": 0}, optimizer=optimizer)
    assert train(dataclasses.replace(plain, workdir=f"{plain.workdir}-plain")) == 0
    # The new schedule of 12 steps has left its warm-up, and the old one had reached its final rate.
    at = {"wsd": "0.01", "cosine": f"{1e-3 + 9e-3 * (1 + math.cos(math.pi * 5 / 10)) / 2:.3g}"}[schedule]
    assert f"the learning rate of step 7 changes from 0.001 to {at}: train.steps" in capsys.readouterr().out
    assert run(12, restart_step=6) == 0  # the warm-up has two steps: half of it is above the final rate
    said = [line for line in capsys.readouterr().out.splitlines() if " rate of step 7 changes from " in line]
    assert [re.search("the (.*) of step", line).group(1) for line in said] == [
        "learning rate",
        *(["muon learning rate"] if name == "muon" else []),
    ]
    after = _rates(make())
    np.testing.assert_allclose(after[6:8], [0.0055, 0.01], rtol=1e-5)
    assert after[-1] == pytest.approx(1e-3)
    assert run(14, schedule="constant", learning_rate=1e-3) == 0
    assert "learning rate of step 13" not in capsys.readouterr().out.replace("muon learning rate", "")
    assert _rates(make())[12:] == pytest.approx([1e-3, 1e-3])
    assert run(15, schedule="constant", learning_rate=1e-3, learning_rate_scale=2.0) == 0
    assert "the learning rate of step 15 changes from 0.001 to 0.002: train.steps or" in capsys.readouterr().out


def _rates(settings: Config):
    return [line["learning_rate"] for line in lines_of(settings) if "loss" in line]


@pytest.mark.slow
def test_bfloat16_weights_train_in_float32_from_the_start_and_from_a_converted_checkpoint(tmp_path, make):
    small = {"head_dim": 4, "state_dim": 4, "mlp_dim": 12, "param_dtype": "bfloat16"}
    rates = {"learning_rate": 3e-4, "warmup_steps": 0, "schedule": "constant"}
    settings = make(
        model={**small, "num_layers": 1, "transpoints": (6,)},
        optimizer=rates,
        train={"steps": 20},
        eval={"every": 0},
        checkpoint={"partial": True, "every": 0},
    )
    model = tm.TransMamba(settings.model)
    params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    assert params["final_norm"]["scale"].dtype == jnp.bfloat16
    export.save(tmp_path / "weights", settings, params, None)
    for workdir, begin in (("new", None), ("converted", tmp_path / "weights")):
        config = dataclasses.replace(settings, workdir=str(tmp_path / workdir))
        if begin is not None:
            start_run(begin, config.workdir)
            whole = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, partial=False))
            message = r"hold weights and no optimizer state, .* add --checkpoint\.partial True"
            with pytest.raises(ValueError, match=message):
                tm.train(whole, model=model)
        tm.train(config, model=model)
        saved = checkpoint.restore(tmp_path / workdir / "checkpoints")
        assert saved.step == 20
        scales = [
            leaf for path, leaf in jax.tree.leaves_with_path(saved.params) if "scale" in jax.tree_util.keystr(path)
        ]
        assert len(scales) == 4
        for scale in scales:
            assert scale.dtype == jnp.float32
            assert np.all(np.asarray(scale) != 1.0)
        floats = [leaf for leaf in jax.tree.leaves(saved.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
        # The checkpoint is a run's own from here on: nothing differs when it is continued.
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=21))
        tm.train(
            dataclasses.replace(longer, checkpoint=dataclasses.replace(config.checkpoint, partial=False)), model=model
        )


def _replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


@pytest.mark.parametrize(
    ("change", "sections", "outcome"),
    [
        (lambda folder: (folder / "metrics.jsonl").unlink(), {}, 0),
        (lambda folder: (folder / "config.yaml").unlink(), {}, 0),
        (lambda folder: (folder / "config.yaml").write_text(""), {}, 0),
        (lambda folder: (folder / "config.yaml").write_text("a: 1"), {}, "unknown option 'a'.* delete it to continue"),
        (lambda folder: _replace_by_file(folder / "report"), {}, "step 6 of 6 is saved, but the report is not written"),
        (lambda folder: _replace_by_file(folder / "tensorboard"), {}, 0),
        (lambda folder: _replace_by_file(folder / "checkpoints"), {}, "File exists: .*checkpoints"),
        (lambda _: None, {"optimizer": {"clip_norm": 0.0}}, 0),
        (lambda _: None, {"train": {"steps": 6, "accumulation": 4}}, 0),
        (lambda _: None, {"model": {"transpoints": (0,)}}, 0),
        (lambda _: None, {"model": {"vocab_size": 300}}, r"params/embedding: float32\[256,8\] there"),
        (lambda _: None, {"data": {"shuffle": False}}, "shuffle: saved True, now False.* --checkpoint.partial True"),
    ],
)
def test_unusual_states_of_a_run_that_is_resumed(make, change, sections, outcome):
    once = {"train": {"steps": 4}, "eval": {"every": 0}, "checkpoint": {"every": 0}}
    settings = make(**once)
    train(settings)
    change(Path(settings.workdir))
    longer = make(**{**once, "train": {"steps": 6}, **sections})
    if outcome == 0:
        assert train(longer) == 0
        assert steps_of(longer) == [4, 6]
    else:
        with pytest.raises((ValueError, OSError), match=outcome):
            train(longer)
