"""The lm-evaluation-harness runs local tasks on a model of this package, without a network."""

import json
import re
import socket
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.evaluate.test_scoring import Spelling
from tests.generate.decoding import TWO, make, random_params
from transmamba_jax import checkpoint, data
from transmamba_jax.config import Config, DataConfig
from transmamba_jax.config_io import load_config
from transmamba_jax.evaluate import scoring

CHOICES = [
    {"text": "abc", "choices": ["de", "fghij", "k"], "answer": 1},
    {"text": "lmnop", "choices": ["q", "rs", "tuv"], "answer": 0},
]
TEXTS = [{"text": "abcdefgh"}, {"text": "ABCDEFGHIJKLMNOPQRSTUVW"}]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choice": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "perplexity": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ),
    "continuation": (
        CHOICES,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Iterator[Path]:
    """A folder of tasks; whoever opens a connection fails."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    folder = tmp_path_factory.mktemp("tasks")
    for name, (documents, fields) in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / f"{name}.jsonl")}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "train", **source, **fields}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(socket.socket, "connect", refuse)
        yield folder


@pytest.fixture
def saved(monkeypatch) -> None:
    """What restoring a checkpoint gives, without one."""
    config = Config(model=TWO, data=DataConfig(seq_len=16))
    restored = types.SimpleNamespace(config=config, params=make(TWO)[1], tokenizer_json="spelling")
    monkeypatch.setattr(checkpoint, "restore", lambda *_, **__: restored)
    monkeypatch.setattr(data, "tokenizer_from_json", lambda _: Spelling())


@pytest.mark.slow
@pytest.mark.usefixtures("saved")
def test_the_harness_runs_local_tasks(offline):
    import lm_eval
    from lm_eval.tasks import TaskManager

    from transmamba_jax.evaluate import lm_eval_adapter  # noqa: F401 registers the model

    results = lm_eval.simple_evaluate(
        "transmamba",
        {"checkpoint": "nowhere", "schedule": "v1"},
        tasks=list(TASKS),
        batch_size=3,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(offline), include_defaults=False),
    )
    scorer = scoring.load("nowhere", schedule="v1", batch_size=3)
    encode = scorer.tokenizer.encode

    pairs = [(encode(item["text"]), encode(choice)) for item in CHOICES for choice in item["choices"]]
    scores = np.array([score for score, _ in scorer.log_likelihoods(pairs)]).reshape(2, 3)
    found = [[response[0][0] for response in sample["resps"]] for sample in results["samples"]["choice"]]
    np.testing.assert_array_equal(found, scores)
    right = [scores[index].argmax() == item["answer"] for index, item in enumerate(CHOICES)]
    assert results["results"]["choice"]["acc,none"] == np.mean(right)

    total = sum(scorer.document_log_likelihoods([encode(item["text"]) for item in TEXTS]))
    size = sum(len(item["text"]) for item in TEXTS)
    assert results["results"]["perplexity"]["bits_per_byte,none"] == pytest.approx(-total / size / np.log(2))

    texts = scorer.continuations([item["text"] for item in CHOICES], max_tokens=5)
    assert [sample["resps"][0][0] for sample in results["samples"]["continuation"]] == texts
    assert {len(text) for text in texts} == {5}


@pytest.mark.usefixtures("offline", "saved")
def test_model_arguments_are_checked():
    from transmamba_jax.evaluate.lm_eval_adapter import TransMambaLM

    model = TransMambaLM.create_from_arg_string("checkpoint=nowhere,max_length=100,seed=3", {"device": "cuda:0"})
    assert (model.max_length, model.max_gen_toks, model.scorer.batch_size) == (100, 50, 8)
    for text, message in {
        "step=3": "needs checkpoint=DIR",
        "checkpoint=a,max_lenght=3": "max_lenght",
        "checkpoint=a,batch_size=auto": "batch_size must be a whole number, found 'auto'",
    }.items():
        with pytest.raises(ValueError, match=message):
            TransMambaLM.create_from_arg_string(text)


@pytest.mark.usefixtures("offline")
def test_the_documented_arguments_fit_the_model_of_the_first_command(monkeypatch):
    from transmamba_jax.evaluate import lm_eval_adapter

    root = Path(__file__).parents[2]
    config = load_config(root / "configs" / "tiny.yaml")
    tokenizer = data.load_tokenizer("bytes").to_json()
    restored = types.SimpleNamespace(config=config, params=random_params(config.model), tokenizer_json=tokenizer)
    monkeypatch.setattr(checkpoint, "restore", lambda *_, **__: restored)
    for text in (lm_eval_adapter.__doc__, (root / "docs" / "evaluation.md").read_text()):
        (arguments,) = re.findall(r"--model_args (\S+)", text)
        model = lm_eval_adapter.TransMambaLM.create_from_arg_string(arguments)
        assert model.max_length == 256
        with pytest.raises(ValueError, match=r"schedule: v9 has 8 TransPoints, .* has 4 layers; .* mamba2, .*, v1, "):
            lm_eval_adapter.TransMambaLM.create_from_arg_string(arguments.replace("v7", "v9"))


@pytest.mark.usefixtures("offline")
def test_the_command_says_in_a_line_what_is_refused(monkeypatch, capsys, tmp_path):
    from transmamba_jax.evaluate import lm_eval_adapter

    def answer(arguments: str) -> int:
        monkeypatch.setattr(lm_eval_adapter, "cli_evaluate", lambda: create(arguments))
        return lm_eval_adapter.main()

    create = lm_eval_adapter.TransMambaLM.create_from_arg_string
    model = lm_eval_adapter.TransMambaLM(scoring.Scorer(*make(TWO), Spelling(), max_length=100))
    for arguments, message in {
        f"checkpoint={tmp_path}": f"no complete checkpoint in {tmp_path}",
        "chekpoint=a": "needs checkpoint=DIR",
    }.items():
        assert answer(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for method in ("apply_chat_template", "chat_template"):
        monkeypatch.setattr(lm_eval_adapter, "cli_evaluate", lambda: getattr(model, method)(True))  # noqa: B023
        assert lm_eval_adapter.main() == 2
        assert capsys.readouterr().err == "the model transmamba has no chat template; leave out --apply_chat_template\n"
    # What is wrong in the harness keeps its traceback.
    monkeypatch.setattr(lm_eval_adapter, "cli_evaluate", lambda: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        lm_eval_adapter.main()


@pytest.mark.usefixtures("offline")
def test_each_way_of_generating_gets_its_requests_and_its_options(monkeypatch):
    from lm_eval.api.instance import Instance

    from transmamba_jax.evaluate.lm_eval_adapter import TransMambaLM
    from transmamba_jax.generate.sampling import Sampling

    scorer = scoring.Scorer(*make(TWO), Spelling(), max_length=100)
    calls = []

    def answer(prompts, until, max_tokens, sampling):
        calls.append((until, max_tokens, sampling))
        return [prompt.upper() for prompt in prompts]

    monkeypatch.setattr(scorer, "continuations", answer)
    asked = [
        ("a", {"until": "\n", "max_gen_toks": 3}),
        ("b", {"until": [".", ""], "do_sample": True, "temperature": 0.5, "top_p": 0.9}),
        ("c", {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}),
        ("d", {}),
    ]
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=arguments, idx=index)
        for index, arguments in enumerate(asked)
    ]
    assert TransMambaLM(scorer).generate_until(requests) == ["A", "B", "C", "D"]
    assert calls == [
        (["\n"], 3, Sampling()),
        (["."], 50, Sampling(temperature=0.5, top_p=0.9)),
        ([], 50, Sampling()),
    ]
    # Options as other models of the harness take them: None is not given, top_k 0 and -1 are all tokens.
    calls.clear()
    sampled = {"do_sample": True, "temperature": "0.5", "max_gen_toks": "4"}
    for options in ({"temperature": None, "until": None}, {**sampled, "top_k": 0}, {**sampled, "top_k": -1}):
        asked = [Instance(request_type="generate_until", doc={}, arguments=("a", options), idx=0)]
        assert TransMambaLM(scorer).generate_until(asked) == ["A"]
    warm = ([], 4, Sampling(temperature=0.5))
    assert calls == [([], 50, Sampling()), warm, warm]
    wrong = Instance(request_type="generate_until", doc={}, arguments=("a", {"num_beams": 4}), idx=0)
    with pytest.raises(ValueError, match="generation_kwargs has num_beams"):
        TransMambaLM(scorer).generate_until([wrong])


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_odd_documents_do_not_end_an_evaluation():
    """Contexts of spaces, no continuation, no text at all, more tokens than the model reads."""
    from lm_eval.api.instance import Instance

    from transmamba_jax.evaluate.lm_eval_adapter import TransMambaLM

    class Spaced(Spelling):
        letters = "\0abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU \n"

    scorer = scoring.Scorer(*make(TWO), Spaced(), max_length=20, batch_size=4)
    asked = [(" ", "hello"), ("", " hello"), ("\n", "hello"), ("", "\nhello"), ("", ""), ("  \n", ""), ("a ", "b" * 90)]
    ask = lambda kind, pairs: [
        Instance(request_type=kind, doc={}, arguments=pair, idx=index) for index, pair in enumerate(pairs)
    ]
    model = TransMambaLM(scorer)
    found = model.loglikelihood(ask("loglikelihood", asked))
    # Each by itself: without AVX-512, XLA sums the rows of one batch in different orders, which shows in the last bit.
    alone = [model.loglikelihood(ask("loglikelihood", [pair]))[0] for pair in asked]
    assert alone[0] == alone[1]
    assert alone[2] == alone[3]
    assert alone[0] != alone[2]
    assert alone[4] == (0.0, True)
    assert alone[5] == scorer.text_log_likelihoods([("", "  \n")])[0]
    assert [sure for _, sure in found] == [sure for _, sure in alone]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], rel=1e-6)
    assert all(-1e4 < score <= 0 for score, _ in found)
    long = scorer.document_log_likelihoods([scorer.tokenizer.encode("a " + "b" * 90)])
    assert found[6][0] == pytest.approx(long[0] - scorer.text_log_likelihoods([("", "a")])[0][0], rel=0.05)
    assert model.loglikelihood_rolling(ask("loglikelihood_rolling", [("",), (" ",)]))[0] == 0.0
    texts = model.generate_until(ask("generate_until", [("a", {"max_gen_toks": 20}), (" ", {"max_gen_toks": 500})]))
    assert [len(text) for text in texts] == [10, 10]
