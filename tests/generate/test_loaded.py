"""Text in, text out: models that are loaded from a run, its checkpoints, one step, and an exported folder."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests.generate.decoding import SMALL, random_params
from tests.generate.test_command import State
from transmamba_jax import checkpoint, data, export
from transmamba_jax.config import Config, DataConfig
from transmamba_jax.config_io import to_yaml

# A padded vocabulary, and a TransPoint that the texts cross.
CONFIG = Config(
    model=dataclasses.replace(SMALL, vocab_size=300, transpoints=(12,)), data=DataConfig(seq_len=16, batch_size=2)
)
TEXTS = ["def main(", "ä", "import sys\n"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with two steps of a byte model."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    writer = checkpoint.Checkpointer(workdir / "checkpoints", CONFIG.checkpoint)
    for step in (2, 3):
        params = jax.tree.map(lambda leaf, step=step: leaf + (3 - step), random_params(CONFIG.model))
        tokenizer = data.load_tokenizer("bytes").to_json()
        writer.save(step, State(params=params, step=jnp.int32(step)), {}, to_yaml(CONFIG), tokenizer)
        writer.wait()
    writer.close()
    return workdir


@pytest.fixture(scope="module")
def lm(run: Path) -> tm.LanguageModel:
    return tm.load(run)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    folder = run.parent / "exported"
    lm = tm.load(run)
    export.save(folder, lm.config, lm.params, lm.tokenizer)
    return folder


def _equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.slow
def test_a_run_its_checkpoints_a_step_and_an_exported_folder_are_the_same_model(
    run: Path, lm: tm.LanguageModel, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _equal(lm.params, random_params(CONFIG.model))
    monkeypatch.chdir(run.parent)
    for path in (str(run), run / "checkpoints", run / "checkpoints" / "3", "tiny", Path("tiny/checkpoints"), exported):
        again = tm.load(path)
        assert _equal(again.params, lm.params)
        assert (again.config, again.model.config) == (CONFIG, CONFIG.model)
        assert again.tokenizer.to_json() == lm.tokenizer.to_json()
    for older in (tm.load(run, step=2), tm.load(run / "checkpoints" / "2")):
        assert not _equal(older.params, lm.params)


def test_a_text_gives_a_text_and_a_list_a_list(lm: tm.LanguageModel) -> None:
    prompts = [list(text.encode()) for text in TEXTS]
    options: dict[str, Any] = {"stop": [[0]], "vocab_size": 256}
    new = tm.generate(lm.model, lm.params, prompts, 9, **options)
    expected = [bytes(row).decode(errors="replace") for row in new]
    assert lm.generate(TEXTS, max_new_tokens=9) == expected
    assert lm.generate(tuple(TEXTS), 9) == expected
    assert [lm.generate(text, max_new_tokens=9) for text in TEXTS] == expected
    assert lm.generate([], max_new_tokens=9) == []
    assert lm.generate("", 4) == lm.generate([""], 4)[0]  # the beginning of a document
    new = tm.generate(lm.model, lm.params, prompts, 9, temperature=2.0, top_k=40, key=jax.random.key(5), **options)
    sampled = [bytes(row).decode(errors="replace") for row in new]
    assert lm.generate(TEXTS, 9, temperature=2.0, top_k=40, key=jax.random.key(5)) == sampled
    assert lm.generate(TEXTS, 9, temperature=2.0, key=jax.random.key(0)) == lm.generate(TEXTS, 9, temperature=2.0)


def test_a_stop_string_is_left_out(lm: tm.LanguageModel) -> None:
    whole = lm.generate(TEXTS[0], 40, temperature=2.0)
    place = next(index for index in range(6, len(whole) - 1) if whole.index(whole[index : index + 2]) == index)
    stop = whole[place : place + 2]
    for form in (stop, [stop], ("no such text", stop)):
        assert lm.generate(TEXTS[0], 40, temperature=2.0, stop=form) == whole[:place]


def test_a_stream_joined_is_what_generate_returns(lm: tm.LanguageModel) -> None:
    for text in TEXTS:
        pieces = list(lm.stream(text, 30, temperature=3.0))
        assert len(pieces) > 2
        assert all(pieces)
        assert "".join(pieces) == lm.generate(text, 30, temperature=3.0)


@pytest.mark.slow
def test_scores_are_the_log_likelihoods_of_the_bytes(lm: tm.LanguageModel) -> None:
    def expected(context: list[int], tokens: list[int]) -> float:
        row = np.array([context + tokens])
        logits = np.asarray(lm.model.apply({"params": lm.params}, row), np.float64)[0, len(context) - 1 : -1]
        return float((logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(tokens)), tokens].sum())

    assert lm.score("hello") == pytest.approx(expected([0], list(b"hello")), rel=1e-5)
    found = lm.score(["lo", "ä€"], context="hel")
    assert found == pytest.approx([expected(list(b"hel"), list(text.encode())) for text in ("lo", "ä€")], rel=1e-5)
    assert lm.score("") == 0.0
    assert lm.score([]) == []
    long = "a long text, which is read in several windows of sixteen bytes"
    assert lm.score(long) < lm.score(long[:30]) < 0


def test_the_inside_of_the_layers_is_that_of_the_tokens(lm: tm.LanguageModel) -> None:
    tokens = jnp.array([list(b"def f(")], jnp.int32)
    found, expected = lm.inspect("def f(", layers=[0]), tm.inspect(lm.model, lm.params, tokens, layers=[0])
    assert _equal(vars(found), vars(expected))
    with pytest.raises(ValueError, match=r"text must be one text, found list .*; tm.inspect takes tokens"):
        lm.inspect(["a"])  # type: ignore[arg-type]


def test_a_model_is_shown_in_a_few_lines(lm: tm.LanguageModel, run: Path) -> None:
    assert repr(lm) == (
        f"LanguageModel of {run / 'checkpoints'}, step 3\n"
        f"  {sum(leaf.size for leaf in jax.tree.leaves(lm.params)):,} parameters in 20 arrays, tokenizer of 256 ids\n"
        "  1 layers, d_model 16, TransPoints 12"
    )
    deep = dataclasses.replace(CONFIG.model, num_layers=99, transpoints=tuple(range(99)))
    model = dataclasses.replace(lm, config=dataclasses.replace(CONFIG, model=deep))
    assert len(repr(model)) < 300


def test_a_checkpoint_is_shown_in_a_few_lines(run: Path) -> None:
    light = tm.restore(run / "checkpoints", params_only=True)
    size = sum(leaf.size for leaf in jax.tree.leaves(light.params))
    assert repr(light) == f"Checkpoint of step 3\n  params: 20 arrays, {size:,} numbers\n  state: not read"
    assert repr(tm.restore(run / "checkpoints")).splitlines()[-1] == "  state: 1 arrays"


@pytest.mark.parametrize("call", ["generate", "stream", "score"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"must be .*text.*, found .*1"),
        ([[1, 2]], r"must be .*text.*, found .*\[1, 2\]"),
        (np.array([1, 2]), "must be .*text.*, found ndarray"),
        (b"bytes", "must be .*text.*, found bytes"),
        (3, "must be .*text.*, found int 3"),
        (None, "must be .*text.*, found NoneType"),
        ("\udcff", r"must be text in UTF-8, found '\\udcff' in it"),
    ],
)
def test_what_is_no_text_is_refused(lm: tm.LanguageModel, call: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(lm, call)(value)


@pytest.mark.usefixtures("unchecked")
def test_options_are_refused_when_called(lm: tm.LanguageModel) -> None:
    for options, message in (
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 0, found -1"),
        ({"temperature": -1.0}, "temperature must be >= 0, found -1.0"),
        ({"stop": ""}, r"stop\[0\] is empty"),
        ({"stop": [1]}, "stop must be a text or a list of texts, found int 1"),
        ({"key": 3, "temperature": 1.0}, r"key must be a random key such as jax.random.key\(0\), found 3"),
    ):
        for method in (lm.generate, lm.stream):
            with pytest.raises(ValueError, match=message):
                method("a", **options)
    with pytest.raises(ValueError, match=r"prompt must be one text, found list .*; generate takes a list of texts"):
        lm.stream(["a"])


def test_a_folder_without_a_tokenizer_has_parameters_only(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    lm = tm.load(tmp_path / "bare")
    assert lm.tokenizer is None
    assert "no tokenizer" in repr(lm)
    for call in (lm.generate, lm.stream, lm.score):
        with pytest.raises(ValueError, match=r"has no tokenizer, so text cannot be read; tm.generate\(lm.model"):
            call("a")
    assert len(tm.generate(lm.model, lm.params, [[1, 2]], 3)[0]) == 3


def test_what_is_not_there_is_said_with_what_is(run: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for path, options, message in (
        (run.parent / "tyni", {}, rf"there is no {run.parent}/tyni; {run.parent} holds .*tiny/"),
        (run.parent / "a" / "b" / "c", {}, rf"there is no .*/a/b/c; {run.parent} holds .*tiny/"),
        (run.parent, {}, rf"{run.parent} must be a run, .*no complete checkpoint in it; {run.parent} holds .*tiny/"),
        (tmp_path / "empty", {}, "no complete checkpoint in it; .*/empty holds nothing"),
        (tmp_path / "config.json", {}, "config.json is a file; give a run"),
        (tmp_path, {}, "holds Mamba-2 weights; python -m transmamba_jax.convert from-mamba2"),
        (run, {"step": 7}, r"no complete checkpoint of step 7 in .*: its complete steps are 2, 3"),
        (run / "checkpoints" / "2", {"step": 3}, "step=3 is not the step of .*/2; give .*/checkpoints"),
        (exported, {"step": 3}, "step=3 names a step of a run, and .* is an exported folder"),
    ):
        with pytest.raises(ValueError, match=message):
            tm.load(path, **options)
