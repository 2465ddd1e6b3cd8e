"""Frozen parameters and factors of the learning rate: against optax by hand, and over a whole run."""

import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from tests.training.runs import assert_same_end, train
from tests.training.support import Little, little_config, packed_batch
from transmamba_jax import checkpoint, data, sharding
from transmamba_jax.report import charts
from transmamba_jax.runtime.tree_paths import flatten
from transmamba_jax.training.loss import loss_and_gradient
from transmamba_jax.training.optimizer import learning_rate_schedule, make_optimizer
from transmamba_jax.training.preemption import EXIT_PREEMPTED
from transmamba_jax.training.step import TrainState, make_train_step

RATES = {"warmup_steps": 0, "learning_rate": 1e-2, "muon_learning_rate": 3e-2, "weight_decay": 0.3}
FREEZE = ("embedding", "layers/mlp/u*")
FROZEN = {"embedding", "layers/mlp/up/kernel"}
PATHS = {*FROZEN, "layers/mlp/down/kernel", "layers/mixer/a_log"}


def _run(config, steps=3):
    """Take steps on packed batches; return the first and last parameters by path, and the last state and gradients."""
    model, mesh = Little(config.model), sharding.make_mesh(config.mesh, jax.devices()[:1])
    state = TrainState.create(config, model, mesh)
    step, first = make_train_step(config, model, make_optimizer(config), mesh), jax.device_get(state.params)
    gradients, metrics = [], {}
    for seed in range(steps):
        batch = jax.tree.map(jnp.asarray, packed_batch(seed))
        accumulation = config.train.accumulation
        gradients.append(flatten(loss_and_gradient(state.params, model, batch, accumulation, 24)[1]))
        state, metrics = step(state, batch)
    return flatten(first), flatten(jax.device_get(state.params)), state, gradients, metrics


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_keep_their_bits_and_the_others_move_as_if_they_were_all(name, accumulation):
    train_section = {"steps": 10, "loss_chunk": 24, "accumulation": accumulation, "freeze": FREEZE}
    config = little_config(optimizer={**RATES, "name": name, "clip_norm": 0.05}, train=train_section)
    first, last, state, gradients, metrics = _run(config)
    assert set(first) == PATHS
    for path in PATHS:
        assert np.array_equal(first[path].view(np.int32), last[path].view(np.int32)) == (
            path in FROZEN or path == "layers/mixer/a_log"  # its gradient is 0 and it does not decay
        ), path
    # The same rule by hand, for the two others alone.
    rate = lambda peak: learning_rate_schedule(config, peak)
    adamw = optax.adamw(
        rate(1e-2), b1=0.9, b2=0.95, weight_decay=0.3, mask=lambda p: {path: "kernel" in path for path in p}
    )
    dimensions = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = contrib.muon(
        rate(3e-2), weight_decay=0.3, muon_weight_dimension_numbers=lambda p: jax.tree.map(lambda _: dimensions, p)
    )
    labels = {path: "muon" if "kernel" in path and name == "muon" else "adamw" for path in PATHS - FROZEN}
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.partition({"adamw": adamw, "muon": muon}, labels))
    params = {path: jnp.asarray(first[path]) for path in PATHS - FROZEN}
    opt_state = tx.init(params)
    for gradient in gradients:
        updates, opt_state = tx.update({path: gradient[path] for path in params}, opt_state, params)
        params = optax.apply_updates(params, updates)
    for path, leaf in params.items():
        np.testing.assert_allclose(last[path], leaf, rtol=2e-5, atol=1e-7, err_msg=path)
    norm = np.sqrt(sum(np.sum(np.square(gradients[-1][path])) for path in params))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert not [path for path in flatten(state.opt_state) for frozen in FROZEN if path.endswith(frozen)]


@pytest.mark.parametrize(("name", "moments"), [("adamw", {2}), ("muon", {1, 2})])
def test_there_is_no_optimizer_state_for_frozen_parameters(name, moments):
    whole, part = (
        flatten(_run(little_config(optimizer={"name": name}, train={"freeze": freeze}), steps=0)[2].opt_state)
        for freeze in ((), FREEZE)
    )
    assert part.keys() < whole.keys()  # the others are where they were
    gone = [re.sub(r".*?(embedding|layers/)", r"\1", path) for path in whole.keys() - part.keys()]
    assert set(gone) == FROZEN
    assert {gone.count(path) for path in FROZEN} == moments


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_multipliers_scale_rate_and_decay_of_what_they_match(name, accumulation):
    pairs = (("layers/*", 0.25), ("*/down/kernel", 3.0))
    run = lambda scale, multipliers: _run(
        little_config(
            optimizer={**RATES, "name": name, "lr_multipliers": multipliers, "learning_rate_scale": scale},
            train={"steps": 10, "loss_chunk": 24, "accumulation": accumulation},
        ),
        steps=1,
    )
    first, found, state, _, metrics = run(1.0, pairs)
    plain = run(1.0, ())
    assert flatten(state.opt_state).keys() == flatten(plain[2].opt_state).keys()
    assert float(metrics["learning_rate"]) == float(plain[4]["learning_rate"])
    for path, scale in {"embedding": 1.0, "layers/mlp/up/kernel": 0.25, "layers/mlp/down/kernel": 3.0}.items():
        expected = run(scale, ())[1][path] - first[path]
        assert np.any(expected)
        np.testing.assert_allclose(found[path] - first[path], expected, rtol=1e-3, atol=2e-7, err_msg=path)


@pytest.mark.slow
def test_multipliers_equal_a_chain_by_hand():
    config = little_config(optimizer={**RATES, "clip_norm": 0.05, "lr_multipliers": (("embedding", 0.1),)})
    first, last, _, gradients, _ = _run(config)
    rate, decays = learning_rate_schedule(config, 1e-2), {path: path != "layers/mixer/a_log" for path in PATHS}
    factor = {path: 0.1 if path == "embedding" else 1.0 for path in PATHS}
    tx = optax.chain(
        optax.clip_by_global_norm(0.05),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.3, decays),
        optax.scale_by_learning_rate(rate),
        optax.stateless(lambda updates, _: {path: factor[path] * leaf for path, leaf in updates.items()}),
    )
    params = jax.tree.map(jnp.asarray, first)
    opt_state = tx.init(params)
    for gradient in gradients:
        updates, opt_state = tx.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    for path, leaf in params.items():
        np.testing.assert_allclose(last[path], leaf, rtol=2e-5, atol=1e-7, err_msg=path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"freeze": ("embeddings",)}}, r"(?s)train\.freeze: 'embeddings' matches no .*\n  layers/mlp/up/ker"),
        (
            {"optimizer": {"lr_multipliers": (("*", 2.0), ("layers/mlp", 2.0))}},
            r"(?s)optimizer\.lr_multipliers: 'layers/mlp' matches no parameter; the parameters are\n  embedding\n",
        ),
        ({"train": {"freeze": ("layers/*", "e*")}}, r"train\.freeze=layers/\* e\* freezes every parameter"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused_before_compilation(make, capsys, sections, message):
    with pytest.raises(ValueError, match=message):
        train(make(**sections))
    assert "compiling" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"lr_multipliers\['a'\] must be positive, found 0\.0; train\.freeze keeps"):
        make(optimizer={"lr_multipliers": (("a", 0.0),)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_with_frozen_parameters_resumes_bit_for_bit_and_thaws_in_part(make, monkeypatch, capsys, name):
    sections = {
        "optimizer": {"name": name, "lr_multipliers": (("*/down/*", 0.5),)},
        "train": {"freeze": FREEZE, "accumulation": 2},
        "checkpoint": {"every": 0},
    }
    straight, stopped = make("straight", **sections), make("stopped", **sections)
    assert train(straight) == 0
    said = capsys.readouterr().out
    saved = checkpoint.restore(f"{straight.workdir}/checkpoints").state["opt_state"]
    size = charts.byte_count(sum(leaf.nbytes for leaf in jax.tree.leaves(saved)))
    assert f"2,310 parameters (9.02 KiB), 2,176 of them frozen, optimizer state {size}\n" in said
    original, batches = data.BatchIterator.__next__, []

    def strike(iterator):
        batches.append(None)
        if len(batches) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(iterator)

    monkeypatch.setattr(data.BatchIterator, "__next__", strike)
    assert train(stopped) == EXIT_PREEMPTED
    assert train(stopped) == 0
    assert_same_end(Path(stopped.workdir), Path(straight.workdir), 10)
    with pytest.raises(ValueError, match=r"train\.freeze: \['embedding', .*\] -> \[\]; \d+ arrays differ, the first"):
        train(make("stopped", **{**sections, "train": {"steps": 12}}))
    thawed = make("stopped", **{**sections, "train": {"steps": 12}, "checkpoint": {"partial": True}})
    assert train(thawed) == 0
    said = capsys.readouterr().out
    assert "missing: state/opt_state/" in said
    assert "begins its warm-up" not in said  # the count of updates was loaded
    before, after = (
        checkpoint.restore(f"{each.workdir}/checkpoints", params_only=True).params for each in (straight, thawed)
    )
    assert not np.array_equal(before["embedding"], after["embedding"])
