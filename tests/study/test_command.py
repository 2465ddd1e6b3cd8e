"""The command with real runs in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

from tests.study.support import TREE, study_file
from transmamba_jax.study.spec import merge

ROOT = Path(__file__).parents[2]


def test_two_jobs_search_report_and_write_the_page(tmp_path):
    model = {"num_layers": 1, "d_model": 4, "num_heads": 1, "head_dim": 4}
    axes = {"schedule": {"mixed": {"model": {"transpoints": ["T/2"]}}}}
    config = merge(TREE["config"], {"model": model, "train": {"steps": 2}})
    quick = {"learning_rates": [1e-2], "search_seeds": [0], "seeds": [10, 11]}
    file = study_file(tmp_path, axes=axes, config=config, quick=quick, figures=["curves"])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "transmamba_jax.study", str(file), "--quick", "--jobs", "2", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(out / "index.html")
    records = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["stage"], record["seed"], record["error"]) for record in records] == [
        ("search", 0, None),
        ("report", 10, None),
        ("report", 11, None),
    ]
    splits = [record["config"]["data"]["eval_split"] for record in records]
    assert splits == ["validation", "test", "test"]
    assert "proves that the pipeline works, and no claim" in (out / "table.md").read_text(encoding="utf-8")
