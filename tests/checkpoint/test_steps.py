"""Test the folder of checkpoints: foreign names beside the steps, and the paths that name a step."""

from pathlib import Path

import pytest

from tests.checkpoint.test_checkpointer import make_state, save
from transmamba_jax import checkpoint
from transmamba_jax.checkpoint import __main__ as checkpoint_command
from transmamba_jax.checkpoint import steps
from transmamba_jax.checkpoint.command_options import restore as restore_for_command
from transmamba_jax.config import CheckpointConfig

FOREIGN_FOLDERS = (
    "0004",
    "00",
    "٤",
    "4 (copy)",
    "+4",
    "4.0",
    "1_000",
    "deleting-me",
    "deleting-0004",
    "checkpoints",
    "x.y",
)
FOREIGN_FILES = ("12", "notes.txt", ".DS_Store", "deleting-4x", "saving-later", "4.orbax")


@pytest.fixture(name="crowded")
def _crowded(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    for name in FOREIGN_FOLDERS:
        (folder / name / "params").mkdir(parents=True)
    for name in FOREIGN_FILES:
        (folder / name).write_text("mine", encoding="utf-8")
    return folder


def test_foreign_files_and_folders_never_matter(crowded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint.complete_steps(crowded) == []
    save(crowded, 4, 8)
    save(crowded, 11)
    assert steps.folders(crowded) == checkpoint.complete_steps(crowded) == [8, 11]
    reader = checkpoint.Checkpointer(crowded, CheckpointConfig())
    restored = reader.restore_newest(make_state(11))
    reader.close()
    assert restored is not None
    assert restored.step == checkpoint.restore(crowded).step == 11
    assert checkpoint_command.main(["verify", str(crowded)]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["step 8", "step 11"]
    assert {path.name for path in crowded.iterdir()} == {*FOREIGN_FOLDERS, *FOREIGN_FILES, "8", "11"}
    assert all((crowded / name).read_text(encoding="utf-8") == "mine" for name in FOREIGN_FILES)


def test_a_file_with_the_name_of_a_step_makes_way(crowded: Path) -> None:
    (crowded / "rejected-12").write_text("old", encoding="utf-8")
    (crowded / "saving-12").mkdir()
    save(crowded, 12)
    assert checkpoint.complete_steps(crowded) == [12]
    assert (crowded / "rejected-12").read_text(encoding="utf-8") == "mine"
    assert not (crowded / "saving-12").exists()


def test_a_run_its_checkpoints_and_a_step_are_accepted_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "7"  # the name of a run may look like a step
    folder = run / "checkpoints"
    (run / "2026").mkdir(parents=True)  # and so may that of a folder of one's own in it
    save(folder, 3, 8)
    for path, newest, all_steps in ((run, 8, [3, 8]), (folder, 8, [3, 8]), (folder / "3", 3, [3])):
        assert checkpoint.complete_steps(path) == all_steps
        assert checkpoint.restore(path, params_only=True).step == newest
        assert restore_for_command(path, None).step == newest
        found = {}
        for command in ("list", "inspect", "verify"):
            assert checkpoint_command.main([command, str(path)]) == 0
            found[command] = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
        assert [int(row[0]) for row in found["list"][1:]] == all_steps
        assert found["inspect"][0] == ["step", str(newest)]
        assert found["verify"] == [["step", f"{step}:"] for step in all_steps]
    assert checkpoint.restore(run, 3, params_only=True).step == 3
    assert checkpoint.restore(folder / "3", 3, params_only=True).step == 3
    with pytest.raises(ValueError, match=r"step 8 is asked for, and .*/3 is step 3; name the folder .*/checkpoints"):
        checkpoint.restore(folder / "3", 8)
    with pytest.raises(ValueError, match="step must be an integer, found str '3'"):
        checkpoint.restore(folder, "3")  # type: ignore[arg-type]
    (folder / "8" / "manifest.json").unlink()
    assert checkpoint_command.main(["verify", str(folder / "8")]) == 1
    assert "step 8: DAMAGED: it has no manifest.json" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no complete checkpoint of step 8 in .*: its complete steps are 3$"):
        checkpoint.restore(folder / "8")


def test_a_folder_without_steps_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name, found in (
        ("run", "run/checkpoints: it has no complete step"),
        ("file", "it is a file"),
        ("no", "there is no such folder"),
    ):
        with pytest.raises(ValueError, match=f"no complete checkpoint in .*{found}"):
            checkpoint.restore(tmp_path / name)
