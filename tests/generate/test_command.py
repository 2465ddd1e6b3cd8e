"""The command that continues a text: its output, its session in a terminal, and what it says of what is wrong."""

import dataclasses
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transmamba_jax as tm
from tests.generate.decoding import SMALL, random_params
from tests.generate.test_generate import held
from transmamba_jax import checkpoint, data
from transmamba_jax.config import Config
from transmamba_jax.config_io import to_yaml
from transmamba_jax.generate import __main__ as command
from transmamba_jax.generate.decode import DecodeState
from transmamba_jax.generate.text import TextStream


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: Any
    step: Any


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained byte model of one layer, as training writes them."""
    config = Config(model=dataclasses.replace(SMALL, vocab_size=256, transpoints=(20,)))
    state = State(params=random_params(config.model), step=jnp.int32(3))
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    writer = checkpoint.Checkpointer(directory, config.checkpoint)
    writer.save(3, state, {}, to_yaml(config), data.load_tokenizer("bytes").to_json())
    writer.close()
    return directory


def test_command_continues_the_prompt(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--checkpoint", str(saved), "--max-new-tokens", "8"]
    assert command.main([*arguments, "--prompt", "def f"]) == 0
    shown = capsys.readouterr().out
    restored = checkpoint.restore(saved, params_only=True)
    model = tm.TransMamba(restored.config.model)
    options = {"temperature": 0.8, "key": jax.random.key(0), "stop": [[0]]}
    (new,) = tm.generate(model, restored.params, [list(b"def f")], 8, **options)
    assert shown == "def f" + bytes(new).decode(errors="replace") + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("def f"))
    assert command.main([*arguments, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == shown
    assert command.main([*arguments, "--prompt", "def f", "--schedule", "mamba2"]) == 0
    (new,) = tm.generate(model, restored.params, [list(b"def f")], 8, **options, transpoints=(0,))
    assert capsys.readouterr().out == "def f" + bytes(new).decode(errors="replace") + "\n"


def test_command_holds_one_cache(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, add = [], TextStream.add

    def counted(text: TextStream, *arguments: Any, **options: Any) -> str:
        counts.append(held((1, 1, 20, 4)))  # keys up to the TransPoint
        return add(text, *arguments, **options)

    before = held((1, 1, 20, 4))
    monkeypatch.setattr(TextStream, "add", counted)
    assert command.main(["--checkpoint", str(saved), "--max-new-tokens", "8", "--prompt", "def f"]) == 0
    assert {count - before for count in counts} == {1}


def talk(saved: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> list[DecodeState]:
    """Type lines into a session and return the state after each turn."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter(lines)

    def read(_prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    after = []
    turn = command.Terminal.turn

    def turned(terminal: command.Terminal, state: DecodeState, line: str) -> DecodeState:
        after.append(turn(terminal, state, line))
        return after[-1]

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", Terminal())
        patch.setattr("builtins.input", read)
        patch.setattr(command.Terminal, "turn", turned)
        assert command.main(["--checkpoint", str(saved), "--max-new-tokens", "8", "--seed", "1"]) == 0
    return after


def test_session_goes_on_and_forgets(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["", "def f", "", ":back", "", ":back", ":back", ":back", "def f"]
    after = talk(saved, monkeypatch, lines)
    shown = capsys.readouterr().out
    assert shown.startswith("A line is added to the text")
    assert shown.count("There is no turn to forget.") == 1
    # After "def f", after an empty line, after the same line again, and after a fresh start.
    first, second, again, anew = (int(state.lengths[0]) for state in after)
    assert 5 < first == anew < second == again
    np.testing.assert_array_equal(after[1].logits, after[2].logits)
    np.testing.assert_array_equal(after[0].logits, after[3].logits)
    # Only so many turns are kept.
    monkeypatch.setattr(command, "_TURNS", 1)
    assert len(talk(saved, monkeypatch, ["def f", "", ":back", ":back", ""])) == 3
    assert capsys.readouterr().out.count("There is no turn to forget.") == 1


def test_session_outlives_ctrl_c_and_a_line_that_is_no_text(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = talk(saved, monkeypatch, ["def f", ""])
    show, turns = command.Terminal.show, itertools.count(1)

    def interrupted(*arguments: Any) -> tuple[list[int], DecodeState | None]:
        shown = show(*arguments)
        if next(turns) == 2:
            raise KeyboardInterrupt
        return shown

    monkeypatch.setattr(command.Terminal, "show", interrupted)
    capsys.readouterr()
    disturbed = talk(saved, monkeypatch, ["def f", "x", "\udcff", ""])
    for state, expected in zip(disturbed, undisturbed, strict=True):
        np.testing.assert_array_equal(state.logits, expected.logits)
    shown = capsys.readouterr().out
    assert shown.count("\nStopped; this turn is forgotten.\n") == 1
    assert shown.count("the line must be text in UTF-8, found another byte at character 0\n") == 1


def test_a_turn_ends_where_its_text_ends(saved: Path) -> None:
    terminal = command.Terminal(command._parser().parse_args(["--checkpoint", str(saved), "--max-new-tokens", "8"]))
    read = lambda tokens: terminal.decoder.prefill([[*b"def f", *tokens]])
    shown, _ = terminal.show(read([]), b"def f")
    assert shown[0] not in shown[1:3] != shown[:2]
    for end in (shown[2], shown[0]):  # after two tokens, and at once
        terminal.tokenizer.end_of_document = end
        kept = shown[: shown.index(end)]
        state = terminal.turn(terminal.decoder.start(1), "def f")
        assert state.lengths.tolist() == [5 + len(kept)]
        np.testing.assert_allclose(state.logits, read(kept).logits, rtol=1e-5, atol=1e-5)


def test_a_turn_ends_before_its_stop_string(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(saved), "--max-new-tokens", "40", "--temperature", "2"]
    terminal = command.Terminal(command._parser().parse_args(arguments))
    new, _ = terminal.show([list(b"def f")], b"def f")
    text = capsys.readouterr().out.removesuffix("\n")
    # A stop string within the text that begins with a whole character.
    place = next(index for index in range(8, len(text)) if text[index].isascii() and text.index(text[index]) == index)
    terminal.stop = [text[place : place + 2]]
    state = terminal.turn(terminal.decoder.start(1), "def f")
    assert capsys.readouterr().out == text[:place] + "\n"
    kept = next(count for count in range(len(new)) if bytes(new[:count]).decode(errors="replace") == text[:place])
    expected = terminal.decoder.prefill([[*b"def f", *new[:kept]]])
    assert state.lengths.tolist() == [5 + kept]
    np.testing.assert_allclose(state.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--stop", ""], "--stop is empty; it needs at least one character"),
        (["--prompt", "\udcff"], "the prompt must be text in UTF-8, found another byte at character 0"),
        (["--prompt", "-"], "standard input must be text in UTF-8: "),
        (["--prompt", "a", "--top-p", "2"], r"top_p must be in (0, 1], found 2.0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be >= 1, found 0"),
        (["--prompt", "a", "--prefill-chunk-size", "0"], "--prefill-chunk-size must be >= 1, found 0"),
        (["--prompt", "a", "--seed", "-1"], "--seed must be in 0..4294967295, found -1"),
        (["--prompt", "a", "--seed", str(2**64)], "--seed must be in 0..4294967295, found 18446744073709551616"),
        (["--prompt", "a", "--schedule", "v0"], "unknown schedule 'v0'"),
        (
            ["--prompt", "a", "--schedule", "v8"],
            "--schedule: v8 has 5 TransPoints, one per layer in turn, and the",
        ),
        (["--prompt", "a", "--schedule", "v1", "--seq-len", "0"], "seq_len must be at least 1, found 0"),
        (["--prompt", "a", "--seq-len", "64"], "--seq-len=64 scales --schedule, and there is none"),
        (["--prompt", "a", "--step", "4"], "no complete checkpoint of step 4"),
        (["--prompt", "a", "--checkpoint", "/nowhere"], "no complete checkpoint in /nowhere"),
        ([], "--prompt is needed"),
    ],
)
def test_command_reports_what_is_wrong(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert command.main(["--checkpoint", str(saved), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_reports_closed_input_and_a_full_disk(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--checkpoint", str(saved)]
    monkeypatch.setattr("sys.stdin", None)
    for more in ([], ["--prompt", "-"]):
        assert command.main([*arguments, *more]) == 2
        assert capsys.readouterr().err == "--prompt TEXT is needed: standard input is closed\n"
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert command.main([*arguments, "--prompt", "def f"]) == 1
    assert capsys.readouterr().err == "[Errno 28] No space left on device\n"


def test_command_does_not_wait_for_the_interpreters_end_after_ctrl_c() -> None:
    program = """if True:
        import atexit, runpy, sys
        from transmamba_jax.checkpoint import command_options
        def interrupted(*arguments):
            print("text", end="")
            raise KeyboardInterrupt
        command_options.restore = interrupted
        atexit.register(print, "the interpreter is taken down")
        sys.argv = ["generate", "--checkpoint", "anywhere", "--prompt", "a"]
        runpy.run_module("transmamba_jax.generate", run_name="__main__", alter_sys=True)
    """
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (130, "text\n")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_command_ends_quietly_when_nobody_reads_on(saved: Path) -> None:
    arguments = ["--checkpoint", str(saved), "--prompt", "def f", "--max-new-tokens", "2"]
    program = [sys.executable, "-m", "transmamba_jax.generate", *arguments]
    reading, writing = os.pipe()
    os.close(reading)
    root = Path(__file__).parents[2]
    result = subprocess.run(program, cwd=root, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
