"""The evaluation against float64 arithmetic on the model's own logits, and the command that runs it."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from transmamba_jax import checkpoint, data, evaluate
from transmamba_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig, MeshConfig, TrainConfig
from transmamba_jax.config_io import to_yaml
from transmamba_jax.data.tokenizers import ByteTokenizer
from transmamba_jax.evaluate import __main__ as evaluate_command
from transmamba_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
SEQ_LEN = 21
MODEL = tm.ModelConfig(
    vocab_size=256,
    num_layers=2,
    d_model=8,
    num_heads=2,
    num_groups=1,
    head_dim=4,
    state_dim=4,
    mlp_dim=12,
    transpoints=(0, 9),
    dtype="float32",
)
PEOPLE = ("Ada", "Grace", "Emmy", "Sofia", "Hedy", "Rosalind", "Chien-Shiung")


class RunningMean(nn.Module):
    """A causal model that compiles in no time: the mean embedding of the document so far."""

    config: tm.ModelConfig

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(2.0), (256, 8))

    def __call__(self, tokens, segment_ids=None):
        return self.logits(self.hidden(tokens, segment_ids))

    def hidden(self, tokens, segment_ids=None):
        ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        seen = jnp.tril(jnp.ones((tokens.shape[1],) * 2))[None] * (ids[:, :, None] == ids[:, None, :])
        return jnp.einsum("bts,bsd->btd", seen, self.embedding[tokens]) / jnp.sum(seen, -1, keepdims=True)

    def logits(self, hidden):
        return hidden @ self.embedding.T


class UnevenTokenizer(ByteTokenizer):
    """Bytes, with lengths that tell a sum over targets from a count of them."""

    def encode_counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(ids, ids % 3 + 1) for ids, _ in super().encode_counted(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number, name in enumerate(PEOPLE):
        (folder / f"{number}.txt").write_text(f"{name} wrote note {number} of {len(PEOPLE)}.\n" * (number % 3 + 1))
    return folder


def config_of(folder: Path, **changes: Any) -> Config:
    source = DataConfig(
        source=f"text:{folder}/*.txt", train_split="all", eval_split="all", seq_len=SEQ_LEN, batch_size=4
    )
    config = Config(
        model=MODEL, data=source, train=TrainConfig(loss_chunk=33), eval=EvalConfig(windows=0, batch_size=5)
    )
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(config, **sections)


@pytest.fixture(scope="module")
def params() -> Any:
    return RunningMean(MODEL).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def oracle(config: Config, params: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negative log-likelihood, weight and bytes of every target in float64, [windows, T]."""
    (batch,) = data.eval_batches(config.data, UnevenTokenizer(), config.eval.windows, 1000)
    tokens, segments = batch["tokens"], batch.get("segment_ids")
    inputs = (tokens[:, :-1],) if segments is None else (tokens[:, :-1], segments[:, :-1])
    logits = RunningMean(config.model).apply({"params": params}, *inputs)
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    log_probabilities = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    targets = tokens[:, 1:]
    nll = -np.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
    weights = np.repeat(batch["weights"][:, None], SEQ_LEN, 1).astype(np.float64)
    if segments is not None:
        weights *= segments[:, 1:] == segments[:, :-1]
    assert not (batch["bytes"][:, 1:] == 1).all()
    return nll, weights, batch["bytes"][:, 1:].astype(np.float64)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("loss_chunk", [1, 33, 10_000])
def test_agrees_with_float64_arithmetic(folder, params, packing, loss_chunk):
    config = config_of(folder, data={"packing": packing}, train={"loss_chunk": loss_chunk})
    result = evaluate.Evaluator(RunningMean(MODEL), config, UnevenTokenizer())(params)
    nll, weights, sizes = oracle(config, params)
    assert weights.sum(1).astype(bool).sum() % config.eval.batch_size, "the last batch must be filled up"
    assert (weights.min() < 1) == (packing == "first_fit") or weights[-1].sum() == 0
    weighted = nll * weights
    assert result.tokens == weights.sum()
    assert result.loss == pytest.approx(weighted.sum() / weights.sum(), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(weighted.sum() / math.log(2) / (sizes * weights).sum(), rel=1e-6)
    assert [(span.start, span.stop) for span in result.by_position] == [
        (0, 1),
        (1, 2),
        (2, 4),
        (4, 8),
        (8, 16),
        (16, 21),
    ]
    for span in result.by_position:
        cut = np.s_[:, span.start : span.stop]
        assert span.loss == pytest.approx(weighted[cut].sum() / weights[cut].sum(), rel=2e-6)


def test_bucket_edges():
    assert evaluate.spans(1) == [(0, 1)]
    assert evaluate.spans(2) == [(0, 1), (1, 2)]
    assert evaluate.spans(9) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 9)]


def test_windows_bound_what_is_read_and_batches_do_not_matter(folder, params):
    few = config_of(folder, eval={"windows": 5})
    result = evaluate.Evaluator(RunningMean(MODEL), few, UnevenTokenizer())(params)
    assert result.tokens == 5 * SEQ_LEN
    other = evaluate.Evaluator(
        RunningMean(MODEL), config_of(folder, eval={"windows": 5, "batch_size": 3}), UnevenTokenizer()
    )(params)
    assert other.loss == pytest.approx(result.loss, rel=1e-6)


def test_stops_between_batches(folder, params):
    evaluator = evaluate.Evaluator(RunningMean(MODEL), config_of(folder), UnevenTokenizer())
    answers = iter([False, True])
    with pytest.raises(evaluate.EvaluationStopped, match="after 1 of"):
        evaluator(params, lambda: next(answers))
    assert list(answers) == []


def test_compiles_once(folder, params):
    calls = []

    class Counted(RunningMean):
        def hidden(self, tokens, segment_ids=None):
            calls.append(tokens.shape)
            return super().hidden(tokens, segment_ids)

    evaluator = evaluate.Evaluator(Counted(MODEL), config_of(folder), UnevenTokenizer())
    assert evaluator(params) == evaluator(params)
    assert calls == [(5, SEQ_LEN)]


EIGHT_DEVICES = """
import sys
from tests.evaluate.test_evaluate import *
assert len(jax.devices()) == 8
folder = Path(sys.argv[1])
from jax.sharding import NamedSharding, PartitionSpec
config, model = config_of(folder, mesh={"data": 2, "fsdp": 4}), RunningMean(MODEL)
params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
alone = evaluate.Evaluator(model, config, UnevenTokenizer())(params)
mesh = make_mesh(config.mesh)
spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec("fsdp", None)))
together = evaluate.Evaluator(model, config, UnevenTokenizer(), mesh)(spread)
assert together.tokens == alone.tokens
np.testing.assert_allclose(together.loss, alone.loss, rtol=1e-6)
np.testing.assert_allclose(
    [span.loss for span in together.by_position], [span.loss for span in alone.by_position], rtol=1e-5
)
"""


@pytest.mark.slow
def test_rows_split_over_eight_devices_give_the_same(folder):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-W", "error", "-c", EIGHT_DEVICES, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_metrics_name_what_a_metrics_line_holds(folder, params):
    result = evaluate.Evaluator(
        RunningMean(MODEL), config_of(folder), UnevenTokenizer(), make_mesh(MeshConfig(), jax.devices()[:1])
    )(params)
    metrics = result.metrics()
    assert list(metrics) == ["eval/loss", "eval/bits_per_byte", "eval/tokens", "eval/by_position"]
    assert metrics["eval/by_position"][3] == [4, 8, result.by_position[3].loss]


@functools.cache
def weights() -> Any:
    shapes = jax.eval_shape(tm.TransMamba(MODEL).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.3, leaf.shape), leaf.dtype), shapes)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory) -> Path:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        params: Any
        step: Any

    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    writer = checkpoint.Checkpointer(directory, CheckpointConfig())
    writer.save(7, State(weights(), jnp.int32(7)), {}, to_yaml(config_of(folder)), ByteTokenizer().to_json())
    writer.close()
    return directory


@pytest.mark.slow
def test_command_prints_what_the_evaluator_measures(saved, folder, capsys):
    assert evaluate_command.main(["--checkpoint", str(saved)]) == 0
    output = capsys.readouterr().out
    config = config_of(folder)
    expected = evaluate.Evaluator(tm.TransMamba(MODEL), config, ByteTokenizer())(weights())
    assert f"loss {expected.loss:.4f} nats/token, {expected.bits_per_byte:.4f} bits per byte" in output
    assert "TransPoints 0, 9 of 21 tokens" in output
    rows = [line.split() for line in output.splitlines() if line.endswith(" of 2")]
    assert [row[-3:] for row in rows[:4]] == [["1", "of", "2"]] * 4
    assert rows[4] == ["8", "-", "16", f"{expected.by_position[4].loss:.4f}", "1", "to", "0", "of", "2"]
    peers = data.baselines(data.training_text(config.data), data.held_out_text(config.data))
    assert list(peers) == [f"{name}_bits_per_byte" for name in ("order2", "gzip", "xz", "brotli")]
    for name, value in peers.items():
        assert f"{name.replace('_', ' ')}: {value:.4f}" in output

    assert evaluate_command.main(["--checkpoint", str(saved), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.pop("by_position") == [dataclasses.asdict(span) for span in expected.by_position]
    assert report == {
        "step": 7,
        "source": config.data.source,
        "split": config.data.eval_split,
        "seq_len": 21,
        "transpoints": [0, 9],
        "tokens": expected.tokens,
        "loss": expected.loss,
        "bits_per_byte": expected.bits_per_byte,
        "baselines": peers,
    }


@pytest.mark.parametrize("choice", [["transformer", "--seq-len", "32"], ["32", "32"]], ids=["name", "integers"])
def test_command_takes_another_schedule_data_and_number_of_windows(saved, folder, tmp_path, capsys, choice):
    longer = config_of(folder, data={"seq_len": 40}, model={"d_model": 16, "transpoints": (3,)})
    (tmp_path / "longer.yaml").write_text(to_yaml(longer))
    arguments = ["--config", str(tmp_path / "longer.yaml"), "--windows", "3"]
    arguments += ["--schedule", *choice]
    assert evaluate_command.main(["--checkpoint", str(saved), *arguments]) == 0
    output = capsys.readouterr().out
    assert "TransPoints 32, 32 of 40 tokens" in output
    model = tm.TransMamba(dataclasses.replace(MODEL, transpoints=(32,)))
    config = config_of(folder, data={"seq_len": 40}, eval={"windows": 3})
    expected = evaluate.Evaluator(model, config, ByteTokenizer())(weights())
    assert f"120 tokens: loss {expected.loss:.4f}" in output


def test_a_config_file_without_a_schedule_on_the_command_line_brings_its_own(folder, tmp_path):
    (tmp_path / "other.yaml").write_text(to_yaml(config_of(folder, model={"d_model": 16, "transpoints": (3,)})))
    arguments = ["--checkpoint", str(tmp_path), "--config", str(tmp_path / "other.yaml")]
    options = evaluate_command._parser().parse_args(arguments)
    config = evaluate_command._configured(config_of(folder), options)
    assert (config.model.transpoints, config.model.d_model) == ((3,), MODEL.d_model)


def test_batches_of_a_config_file_need_not_fit_the_accumulation_of_the_run(folder, tmp_path):
    (tmp_path / "other.yaml").write_text(to_yaml(config_of(folder, data={"batch_size": 3})))
    options = evaluate_command._parser().parse_args(
        ["--checkpoint", str(tmp_path), "--config", str(tmp_path / "other.yaml")]
    )
    saved = config_of(folder, data={"batch_size": 4}, train={"accumulation": 4})
    assert evaluate_command._configured(saved, options).data.batch_size == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "v99"], "unknown schedule 'v99'"),
        (
            ["--schedule", "v8"],
            "--schedule: v8 has 5 TransPoints, one per layer in turn, and the model has 2 layers",
        ),
        (["--seq-len", "64"], "--seq-len=64 scales --schedule, and there is none"),
        (["--step", "8"], "no complete checkpoint of step 8"),
        (["--search", "2"], "--search must be a share in [0, 1], found 2.0"),
    ],
)
def test_command_reports_what_is_wrong(saved, capsys, arguments, message):
    assert evaluate_command.main(["--checkpoint", str(saved), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--classes"], ["--search", "0.5"]])
def test_classes_and_search_of_a_mixture_are_refused_before_the_evaluation(saved, folder, tmp_path, capsys, option):
    mixed = config_of(folder, data={"source": "stdlib", "mixture": {"stdlib": 1, f"text:{folder}/*": 1}})
    (tmp_path / "mixed.yaml").write_text(to_yaml(mixed))
    assert evaluate_command.main(["--checkpoint", str(saved), "--config", str(tmp_path / "mixed.yaml"), *option]) == 2
    assert f"{option[0]} read one source, found the mixture of stdlib, text:" in capsys.readouterr().err


def test_options_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate_command.main(["--checkpoint", "here", "--window", "3"])
    assert "unrecognized arguments: --window 3" in capsys.readouterr().err
