"""What `python -m transmamba_jax.checkpoint` prints."""

from tests.checkpoint.test_checkpointer import save
from transmamba_jax.checkpoint import __main__ as checkpoint_command
from transmamba_jax.config import CheckpointConfig


def test_list_and_inspect(tmp_path, capsys):
    save(tmp_path, 3, 8, losses=(2.0, 4.0))
    assert checkpoint_command.main(["list", str(tmp_path)]) == 0
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [(row[0], row[-1]) for row in rows] == [("3", "2.0000"), ("8", "4.0000")]
    assert checkpoint_command.main(["inspect", str(tmp_path), "--step", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kinds = [line.rpartition("  ")[0] for line in lines]
    assert "params/layers/kernel  bfloat16[2,4,5]" in kinds
    assert "state/key/threefry2x32  uint32[2]" in kinds
    assert "params: 3 arrays, 71 numbers, 0.00 MiB" in lines
    assert checkpoint_command.main(["inspect", str(tmp_path), "--step", "4"]) == 2
    assert "no complete checkpoint of step 4" in capsys.readouterr().err


def test_the_commands_say_what_is_wrong_with_a_step(tmp_path, capsys):
    save(tmp_path, 1, 2, 3, config=CheckpointConfig(keep_latest=3))
    (tmp_path / "1" / "manifest.json").unlink()
    (tmp_path / "2" / "commit_success.txt").unlink()
    (tmp_path / "3" / "manifest.json").write_text("{}", encoding="utf-8")
    assert checkpoint_command.main(["list", str(tmp_path)]) == 0
    _, first, second, third = capsys.readouterr().out.splitlines()
    assert "it has no manifest.json: its save did not finish, or the file was deleted" in first
    assert "not complete: verify says what is missing" in second
    assert "manifest.json is damaged: its checksum differs" in third
    assert checkpoint_command.main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"step 3 of {tmp_path} is not what was saved: manifest.json is damaged")
    assert checkpoint_command.main(["list", str(tmp_path / "3" / "manifest.json")]) == 2
    assert f"no complete checkpoint in {tmp_path}/3/manifest.json: it is a file" in capsys.readouterr().err
