"""Test the paths that options name and the names that messages show."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import transmamba_jax as tm
from tests.study.support import study_file
from transmamba_jax import checkpoint, config_io, convert, data, export
from transmamba_jax.checkpoint import __main__ as checkpoint_command
from transmamba_jax.config import CheckpointConfig, Config, DataConfig
from transmamba_jax.convert import __main__ as convert_command
from transmamba_jax.convert import mamba2
from transmamba_jax.data import sources, train_tokenizer
from transmamba_jax.evaluate import __main__ as evaluate_command
from transmamba_jax.evaluate import scoring
from transmamba_jax.export import __main__ as export_command
from transmamba_jax.export import stablehlo
from transmamba_jax.generate import __main__ as generate_command
from transmamba_jax.report import __main__ as report_command
from transmamba_jax.report import write_report
from transmamba_jax.runtime.paths import expand_path, show_path
from transmamba_jax.study import __main__ as study_command
from transmamba_jax.training import __main__ as train_command
from transmamba_jax.training.loop import train


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("~/runs/a") == Path("/home/me/runs/a")
    assert expand_path("~") == Path("/home/me")
    assert expand_path(Path("~/runs")) == Path("/home/me/runs")
    assert expand_path("runs/~a/~") == Path("runs/~a/~")


def test_a_user_without_a_home_is_refused():
    with pytest.raises(ValueError, match=r"path ~nobody-here/x: there is no home folder '~nobody-here'.* write "):
        expand_path("~nobody-here/x")
    assert expand_path("./~nobody-here") == Path("~nobody-here")


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"caf\xc3\xa9.txt", "café.txt"), (b"a\xff.txt", r"a\xff.txt"), (b"a\nb\x1b[1m", r"a\nb\x1b[1m")],
)
def test_names_in_messages_are_printable(name: bytes, shown: str):
    assert show_path(os.fsdecode(name)) == shown
    assert show_path(Path(os.fsdecode(name))).isprintable()


@pytest.fixture(name="home")
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    return tmp_path


COMMANDS: dict[str, tuple[Callable[[list[str]], Any], list[str]]] = {
    "generate --checkpoint": (generate_command.main, ["--prompt", "a", "--checkpoint"]),
    "evaluate --checkpoint": (evaluate_command.main, ["--checkpoint"]),
    "export --checkpoint": (export_command.main, ["--platforms", "--output", "~/out", "--checkpoint"]),
    "checkpoint list": (checkpoint_command.main, ["list"]),
    "checkpoint inspect": (checkpoint_command.main, ["inspect"]),
    "checkpoint verify": (checkpoint_command.main, ["verify"]),
    "report": (report_command.main, []),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_tilde_in_every_argument_of_a_command(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, arguments = COMMANDS[name]
    assert main([*arguments, "~/missing"]) == 2
    assert f"{home}/missing" in capsys.readouterr().err
    assert not Path("~").exists()


@pytest.mark.parametrize("command", ["from-mamba2", "to-mamba2", "start-run"])
def test_a_tilde_in_the_folders_of_a_conversion(command: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_command.main([command, "~/missing", "~/out"]) == 2
    assert f"{home}/missing" in capsys.readouterr().err
    assert not Path("~").exists()


def test_a_tilde_in_the_folders_of_a_study(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = study_file(home)
    assert study_command.main(["~/little.yaml", "--quick", "--list", "--out", "~/missing"]) == 0
    assert study_command.main([str(file), "--out", "gs://bucket/out"]) == 2
    assert "--out must be a folder of this machine, found gs://bucket/out" in capsys.readouterr().err
    (home / "out").mkdir()
    shutil.copy(file, home / "out")
    for arguments in (["report", "~/missing"], ["report", "~/out", "--publish", "~/published"]):
        capsys.readouterr()
        assert study_command.main(arguments) == 2
        assert f"{home}/" in capsys.readouterr().err
    assert not Path("~").exists()


def test_an_unknown_user_in_an_argument_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        checkpoint_command.main(["list", "~nobody-here/x"])
    assert "there is no home folder '~nobody-here'" in capsys.readouterr().err


def test_an_empty_path_is_refused_and_not_taken_for_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell leaves an unset variable as an empty argument: a run filled the current folder."""
    monkeypatch.chdir(tmp_path)
    message = r"a path must not be empty \(an unset variable\?\); the current folder is '\.'"
    with pytest.raises(ValueError, match=message):
        train(Config(workdir=""))
    with pytest.raises(SystemExit):
        convert_command.main(["start-run", "source", ""])
    assert "a path must not be empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_in_a_config(home: Path) -> None:
    (home / "a.yaml").write_text("workdir: ~/runs/a", encoding="utf-8")
    config = tm.load_config("~/a.yaml")
    assert config == config_io.read_config_file(home / "a.yaml")
    assert train_command.parse(["--config", "~/a.yaml"]).experiment == config
    (home / "runs").touch()  # the run is refused, and says where
    for workdir in (config, Config(workdir="~/runs/b")):
        with pytest.raises(ValueError, match=f"workdir {home}/runs/[ab] cannot be written: Not a directory"):
            train(workdir)


def test_a_tilde_in_the_data_section(home: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.add_special_tokens(["</s>"])
    words.save(str(home / "words.json"))
    assert data.load_tokenizer("~/words.json").encode("b") == [1]
    (home / "text").mkdir()
    for index in range(40):
        (home / "text" / f"{index}.txt").write_text(f"document {index}", encoding="utf-8")
    config = DataConfig(source="text:~/text/*.txt")
    assert len(sources.open_documents(config, "all")) == 40
    (home / "file").touch()
    with pytest.raises(ValueError, match=f"data.cache_dir '{home}/file/x'"):
        sources.open_documents(DataConfig(cache_dir="~/file/x"), "train")
    arguments = ["--config", "tiny", "--data.source", "text:~/text/*.txt", "--vocab-size", "300", "--output"]
    train_tokenizer.main([*arguments, "~/trained.json"])
    assert data.load_tokenizer(str(home / "trained.json")).vocab_size <= 300


def test_a_tilde_in_every_function_that_takes_a_path(home: Path) -> None:
    reads: list[Callable[[str], Any]] = [
        tm.restore, convert.from_mamba2, export.load, write_report, scoring.load,
        lambda path: stablehlo.load_program(path, "forward"), lambda path: mamba2.start_run(path, "~/run"),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(ValueError, match=f"{home}/missing"):
            read("~/missing")
    assert checkpoint.complete_steps("~/missing") == []
    checkpoint.Checkpointer(Path("~/run/checkpoints"), CheckpointConfig()).close()
    assert (home / "run" / "checkpoints").is_dir()
    assert not Path("~").exists()
