"""Classes of tokens against a search by hand, planted repeats, and intervals over rows."""

import json

import jax
import numpy as np
import pytest

import transmamba_jax as tm
from transmamba_jax import data
from transmamba_jax.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from transmamba_jax.evaluate import Evaluator
from transmamba_jax.evaluate import __main__ as command
from transmamba_jax.evaluate.lengths import with_length
from transmamba_jax.evaluate.token_classes import _mean, class_losses, classes, copy_distances, planted_rows

MODEL = ModelConfig(
    vocab_size=8, num_layers=2, d_model=16, num_heads=2, num_groups=1, head_dim=8, state_dim=8, mlp_dim=0,
    transpoints=(0, 16), dtype="float32",
)  # fmt: skip


def test_copies_are_found_as_by_comparing_every_pair_of_ngrams():
    for seed, ngram in ((0, 2), (1, 3), (2, 5)):
        row = np.random.default_rng(seed).integers(3, size=60, dtype=np.int32)
        expected = []
        for target in range(1, 60):
            ends = [
                end
                for end in range(ngram - 1, target)
                if target >= ngram - 1
                and (row[end - ngram + 1 : end + 1] == row[target - ngram + 1 : target + 1]).all()
            ]
            expected.append(target - max(ends) if ends else 0)
        assert copy_distances(row, ngram=ngram).tolist() == expected
        assert max(expected) > 0


def test_classes_partition_the_targets():
    distances = np.array([[0, 1, 32, 33, 128, 129, 512, 513, 2048, 2049]])
    found = {name: mask[0].nonzero()[0].tolist() for name, mask in classes(distances).items()}
    assert found == {
        "all": list(range(10)),
        "no_copy": [0],
        "copy": list(range(1, 10)),
        "copy_1_32": [1, 2],
        "copy_33_128": [3, 4],
        "copy_129_512": [5, 6],
        "copy_513_2048": [7, 8],
        "copy_2049_on": [9],
    }


def test_a_copy_is_of_the_same_document():
    row = np.array([1, 2, 1, 2, 3, 1, 2, 1, 2, 1, 2], np.int32)
    segments = np.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3], np.int32)
    assert copy_distances(row, ngram=2).tolist() == [0, 0, 2, 0, 0, 3, 5, 2, 2, 2]
    assert copy_distances(row, segments, ngram=2).tolist() == [0, 0, 2, 0, 0, 0, 0, 2, 0, 0]
    assert copy_distances(row, np.ones_like(segments), ngram=2).tolist() == copy_distances(row, ngram=2).tolist()


def test_planted_targets_repeat_the_span_at_their_distance():
    rows, targets = planted_rows(100, 50, 1000)
    assert (targets.sum(1) == 31).all()
    for row, target in zip(rows, targets, strict=True):
        places = target.nonzero()[0] + 1
        np.testing.assert_array_equal(row[places], row[places - 50])
        distances = copy_distances(row)
        assert set(distances[target][4:]) == {50}
        assert not distances[~target].any()


def test_an_interval_is_over_rows_and_weighs_tokens():
    rng = np.random.default_rng(0)
    rows = rng.normal(3, 1, size=(200, 1))
    found = _mean("all", np.repeat(rows, 50, axis=1), np.ones((200, 50)))
    half = 1.96 * rows.std() / np.sqrt(200)  # 50 equal tokens of a row are no 50 observations
    assert (found.low, found.high) == pytest.approx((rows.mean() - half, rows.mean() + half), abs=0.03)
    weighted = _mean("copy", np.array([[1.0, 2.0], [3.0, 9.0]]), np.array([[1, 1], [2, 0]]))
    assert (weighted.loss, weighted.tokens) == (pytest.approx(9 / 4), 3)
    assert _mean("copy", np.ones((1, 2)), np.zeros((1, 2))) is None


@pytest.mark.slow
def test_the_class_of_all_tokens_has_the_held_out_loss():
    config = Config(
        model=MODEL,
        data=DataConfig(source="synthetic:recall?keys=4&values=4", seq_len=64, batch_size=4),
        eval=EvalConfig(windows=6, batch_size=4),
    )
    model, tokenizer = tm.TransMamba(MODEL), data.open_tokenizer(config.data)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    found = {each.name: each for each in class_losses(model, config, tokenizer, params)}
    whole = Evaluator(model, config, tokenizer)(params)
    assert found["all"].loss == pytest.approx(whole.loss, rel=1e-6)
    assert found["all"].tokens == whole.tokens == found["copy"].tokens + found["no_copy"].tokens
    assert "planted_32" in found
    assert "planted_64" not in found


def test_rows_of_another_length_keep_or_scale_the_transpoints():
    config = Config(model=MODEL, data=DataConfig(seq_len=16))
    for scaled, points in ((False, (0, 16)), (True, (0, 64))):
        longer = with_length(config, 64, scaled)
        assert (longer.data.seq_len, longer.model.transpoints) == (64, points)


@pytest.mark.slow
def test_the_command_measures_longer_rows_and_classes(tmp_path, capsys):
    config = Config(
        model=MODEL,
        data=DataConfig(source="synthetic:recall?keys=4&values=4", seq_len=16, batch_size=4),
        train=TrainConfig(steps=1, sample_tokens=0),
        eval=EvalConfig(every=0, windows=4, batch_size=4),
        workdir=str(tmp_path),
    )
    assert tm.train(config) == 0
    capsys.readouterr()
    options = ["--checkpoint", str(tmp_path), "--row-length", "64", "--scale-transpoints", "--classes", "--json"]
    assert command.main(options) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["seq_len"], found["transpoints"]) == (64, [0, 64])
    assert {"all", "copy_1_32", "planted_32"} <= {each["name"] for each in found["classes"]}
    assert command.main([*options[:2], "--scale-transpoints"]) == 2
    assert "--scale-transpoints is for --row-length" in capsys.readouterr().err
