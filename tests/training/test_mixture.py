"""Test runs on mixtures: the held-out loss of each source and in all, and what lines of metrics say of the data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import transmamba_jax as tm
from tests.training.support import Little, little_config
from transmamba_jax.config import Config
from transmamba_jax.training import metrics


def lines_of(config: Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_on_a_mixture_resumes_and_says_what_it_read(tmp_path: Path) -> None:
    words = {"numbers": "one two three four", "letters": "abcdefghijklm"}
    for name, text in words.items():
        rows = [{"text": f"{text} {number}"} for number in range(60)] + [{"txt": "broken"}] * 2
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = [f"jsonl:{tmp_path}/{name}.jsonl" for name in words]
    shares = dict(zip(names, (3.0, 1.0), strict=True))
    config = little_config(
        model={"vocab_size": 256},
        data={"mixture": shares, "cache_dir": str(tmp_path / "cache"), "on_error": "skip"},
        train={"steps": 6},
        eval={"every": 3, "windows": 5, "batch_size": 4},
        checkpoint={"every": 3},
        workdir=str(tmp_path / "run"),
    )
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    short = dataclasses.replace(short, optimizer=dataclasses.replace(config.optimizer, schedule="constant"))
    config = dataclasses.replace(config, optimizer=short.optimizer)
    assert tm.train(short, model=Little(config.model)) == 0
    assert tm.train(config, model=Little(config.model)) == 0
    whole = dataclasses.replace(config, workdir=str(tmp_path / "whole"))
    assert tm.train(whole, model=Little(config.model)) == 0
    plain = lambda line: {name: value for name, value in line.items() if name not in metrics.TIMING}
    assert [plain(line) for line in lines_of(config)] == [plain(line) for line in lines_of(whole)]

    training = [line for line in lines_of(config) if "loss" in line]
    assert [line["data/skipped_rows"] for line in training] == [4] * 6
    for line in training:  # 8 rows per step, of one length
        assert [line[f"data/share/{name}"] for name in names] == [0.75, 0.25]
    for line in (line for line in lines_of(config) if "eval/loss" in line):
        losses = [line[f"eval/{name}/loss"] for name in names]
        assert losses[0] != losses[1]
        assert line["eval/loss"] == pytest.approx(np.dot([0.75, 0.25], losses), rel=1e-12)
        assert line["eval/tokens"] == sum(line[f"eval/{name}/tokens"] for name in names)
        # One byte per token here, so the mean of bits per byte is that of the losses.
        assert line["eval/bits_per_byte"] == pytest.approx(line["eval/loss"] / np.log(2), rel=1e-12)
        assert not [name for name in line if name.startswith("baseline/")]
