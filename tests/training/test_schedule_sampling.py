"""Training under random schedules: the draws, that a step runs what was drawn, and exact resumption."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import transmamba_jax as tm
from tests.training.support import relative
from transmamba_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from transmamba_jax.training import schedule_sampling
from transmamba_jax.training.loss import distilled_loss_and_gradient, loss_and_gradient

MODEL = ModelConfig(
    vocab_size=8, num_layers=2, d_model=16, num_heads=2, num_groups=1, head_dim=8, state_dim=8, mlp_dim=0,
    transpoints=(0, 16), dtype="float32",
)  # fmt: skip
POOL = ("transformer", "mamba2", "4, 8")


def config_of(sampling="pool", pool=POOL, **sections):
    return Config(
        model=MODEL,
        data=DataConfig(source="synthetic:recall?keys=4&values=4", seq_len=16, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=6, log_every=1, schedule_sampling=sampling, schedule_pool=pool),
        checkpoint=CheckpointConfig(every=3),
        **{"eval": EvalConfig(every=0), **sections},
    )


def test_a_pool_has_names_and_lists():
    assert schedule_sampling.pool(config_of()) == [(16, 16), (0, 0), (4, 8)]
    with pytest.raises(ValueError, match=r"train\.schedule_pool: 'v9': v9 has 8 TransPoints"):
        schedule_sampling.pool(config_of(pool=("v9",)))
    with pytest.raises(ValueError, match=r"needs train\.schedule_pool"):
        config_of(pool=())
    with pytest.raises(ValueError, match=r"is for train\.schedule_sampling pool or rows"):
        config_of("none")


def test_draws_follow_seed_and_step_and_are_even():
    config = config_of()
    draws = [schedule_sampling.of_step(config, step) for step in range(3000)]
    assert draws[:20] == [schedule_sampling.of_step(config, step) for step in range(20)]
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert draws[:50] != [schedule_sampling.of_step(other, step) for step in range(50)]
    assert np.bincount(draws).min() > 900
    assert {schedule_sampling.of_step(config_of("none", ()), step) for step in range(9)} == {0}


def test_rows_draw_zero_powers_of_two_and_the_whole_row():
    rows = np.concatenate([schedule_sampling.of_rows(config_of("rows", ()), step) for step in range(200)])
    assert rows.shape == (1600, 2)
    values, counts = np.unique(rows, return_counts=True)
    assert values.tolist() == [0, 1, 2, 4, 8, 16]
    assert counts.min() > 0.8 * rows.size / 6
    from_pool = schedule_sampling.of_rows(config_of("rows"), 0)
    assert {tuple(row) for row in from_pool} <= {(16, 16), (0, 0), (4, 8)}


def test_processes_draw_the_same_and_take_their_rows():
    config = config_of("rows", ())
    batch = {"tokens": np.zeros((4, 17), np.int32)}
    parts = [schedule_sampling.with_transpoints(config, batch, 5, part, 2)["transpoints"] for part in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), schedule_sampling.of_rows(config, 5))
    assert schedule_sampling.with_transpoints(config_of(), batch, 5, 0, 2) is batch


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_rows_of_a_batch_run_under_their_own_transpoints(accumulation):
    model = tm.TransMamba(MODEL)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 8, (4, 17), dtype=np.int32)
    points = np.array([[0, 16], [16, 16], [4, 8], [0, 0]], np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    run = jax.jit(lambda batch, count: loss_and_gradient(params, model, batch, count, 1024), static_argnums=1)
    mixed = run({"tokens": tokens, "transpoints": points}, accumulation)
    alone = []
    for row, schedule in zip(tokens, points, strict=True):
        under = model.clone(config=dataclasses.replace(MODEL, transpoints=tuple(map(int, schedule))))
        alone.append(
            jax.jit(lambda row, under=under: loss_and_gradient(params, under, {"tokens": row}, 1, 1024))(row[None])
        )
    assert relative(mixed, jax.tree.map(lambda *parts: sum(parts) / 4, *alone)) < 1e-5


def _rows_of_schedules():
    model, rng = tm.TransMamba(MODEL), np.random.default_rng(0)
    tokens, weights = rng.integers(0, 8, (4, 17), dtype=np.int32), rng.random((4, 17), np.float32)
    points = np.array([[0, 16], [16, 16], [4, 8], [0, 0]], np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    params = {**params, "embedding": 10 * params["embedding"]}  # so that the schedules differ
    return model, params, {"tokens": tokens, "weights": weights, "transpoints": points}


def _distilled(chunk=24):
    model, params, batch = _rows_of_schedules()
    teacher = model.clone(config=dataclasses.replace(MODEL, transpoints=(16,)))
    run = lambda params, batch, count: distilled_loss_and_gradient(params, teacher, model, batch, count, chunk, 0.25)
    return jax.jit(run, static_argnums=2), params, batch


@pytest.mark.slow
def test_distillation_equals_its_definition_in_float64():
    run, params, batch = _distilled()
    losses, gradient = run(params, batch, 1)
    model, tokens, points = tm.TransMamba(MODEL), batch["tokens"], batch["transpoints"]
    logits = jax.jit(lambda params, points: model.apply({"params": params}, tokens[:, :-1], points))
    student = np.asarray(logits(params, points.T), np.float64)
    taught = np.asarray(logits(params, np.full((2, 4), 16, np.int32)), np.float64)
    log_q, log_p = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (student, taught))
    weights = batch["weights"][:, 1:].astype(np.float64)
    mean = lambda values: float((values * weights).sum() / weights.sum())
    nll = lambda log: mean(-np.take_along_axis(log, tokens[:, 1:, None], axis=-1)[..., 0])
    expected = {
        "loss": nll(log_q),
        "teacher_loss": nll(log_p),
        "distillation": mean((np.exp(log_p) * (log_p - log_q)).sum(-1)),
    }
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)
    assert expected["distillation"] > 0.01

    def objective(params):
        log_q, log_p = (jax.nn.log_softmax(logits(params, p)) for p in (points.T, np.full((2, 4), 16, np.int32)))
        target, soft = jax.nn.one_hot(tokens[:, 1:], 8), jax.lax.stop_gradient(jax.numpy.exp(log_p))
        by_token = -((target * log_p).sum(-1) + ((0.75 * target + 0.25 * soft) * log_q).sum(-1)) / 2
        return (by_token * batch["weights"][:, 1:]).sum() / batch["weights"][:, 1:].sum()

    assert relative(gradient, jax.jit(jax.grad(objective))(params)) < 1e-5


@pytest.mark.slow
def test_distillation_over_microbatches_equals_the_large_batch():
    run, params, batch = _distilled()
    assert relative(run(params, batch, 2), run(params, batch, 1)) < 1e-6


def test_a_teacher_must_be_a_schedule_of_the_model():
    def config(**options):
        return dataclasses.replace(config_of(), train=dataclasses.replace(config_of().train, **options))

    model = tm.TransMamba(MODEL)
    teacher = schedule_sampling.teacher(config(schedule_distillation=0.5), model)
    assert (teacher.config.transpoints, teacher.config.d_model) == ((16, 16), 16)
    with pytest.raises(ValueError, match=r"train\.schedule_teacher: 'v9': v9 has 8 TransPoints"):
        schedule_sampling.programs(config(schedule_distillation=0.5, schedule_teacher="v9"), model)
    with pytest.raises(ValueError, match=r"train\.schedule_distillation must be in \[0, 1\], found 2"):
        config(schedule_distillation=2)


def test_the_last_steps_run_the_schedule_of_the_config():
    train = dataclasses.replace(config_of().train, schedule_sampling_steps=4)
    config = dataclasses.replace(config_of(), train=train)
    found = [under.config.transpoints for _, under in schedule_sampling.programs(config, tm.TransMamba(MODEL))]
    assert found == [(16, 16), (0, 0), (4, 8), (0, 16)]
    drawn = [schedule_sampling.of_step(config, step) for step in range(6)]
    assert drawn[:4] == [schedule_sampling.of_step(config_of(), step) for step in range(4)]
    assert drawn[4:] == [3, 3]
    never = dataclasses.replace(config, train=dataclasses.replace(train, schedule_sampling_steps=6))
    assert len(schedule_sampling.programs(never, tm.TransMamba(MODEL))) == 3
    rows = dataclasses.replace(config, train=dataclasses.replace(train, schedule_sampling="rows"))
    assert [schedule_sampling.of_step(rows, step) for step in range(6)] == [0, 0, 0, 0, 1, 1]
    batch = {"tokens": np.zeros((8, 17), np.int32)}
    assert "transpoints" in schedule_sampling.with_transpoints(rows, batch, 3, 0, 1)
    assert schedule_sampling.with_transpoints(rows, batch, 4, 0, 1) is batch
    with pytest.raises(ValueError, match=r"schedule_sampling_steps=4 is for train\.schedule_sampling pool or rows"):
        dataclasses.replace(train, schedule_sampling="none", schedule_pool=())


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "share"), [("rows", 0.0), ("pool", 0.5)])
def test_the_last_steps_equal_a_run_that_goes_on_under_one_schedule(tmp_path, sampling, share):
    config = config_of(sampling)
    options = {"schedule_sampling_steps": 3, "schedule_distillation": share}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **options))
    assert tm.train(dataclasses.replace(config, workdir=str(tmp_path / "whole"))) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain/checkpoints/6")
    assert tm.train(dataclasses.replace(config_of("none", ()), workdir=str(tmp_path / "plain"))) == 0
    ends = [tm.restore(tmp_path / name / "checkpoints").params for name in ("whole", "plain")]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "share"), [("pool", 0.0), ("rows", 0.0), ("pool", 0.5)])
def test_a_resumed_run_equals_the_run_without_a_break(tmp_path, sampling, share):
    schedules = EvalConfig(every=6, windows=8, schedules=("transformer", "mamba2") if sampling == "pool" else ())
    config = config_of(sampling, eval=schedules)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, schedule_distillation=share))

    def train(name):
        assert tm.train(dataclasses.replace(config, workdir=str(tmp_path / name))) == 0
        text = (tmp_path / name / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()], tm.restore(tmp_path / name / "checkpoints").params

    whole, params = train("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoints/6")
    lines, resumed = train("broken")
    jax.tree.map(np.testing.assert_array_equal, params, resumed)
    losses = lambda lines: {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses(lines) == losses(whole)
    assert len(losses(whole)) == 6
    # 0 where the drawn schedule is the teacher's.
    assert max(line["distillation"] if share else 1 for line in whole if "loss" in line) > 1e-5
    if sampling == "pool":
        (result,) = [line for line in whole if "eval/loss" in line]
        # The config's own schedule is (0, T): neither of the others.
        assert len({result[f"eval/{name}loss"] for name in ("", "transformer/", "mamba2/")}) == 3
        assert 0 <= result["eval/mamba2/accuracy"] <= 1
        assert {"eval/transformer/by_position", "eval/transformer/answers_by_query"} <= result.keys()
