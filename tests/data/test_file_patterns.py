"""Test the files that a glob names: each real file once, and what to type where there is none."""

import os
from pathlib import Path

import pytest

from transmamba_jax.config import DataConfig
from transmamba_jax.data.file_patterns import find_files, fixed_part
from transmamba_jax.data.sources import open_documents
from transmamba_jax.data.splits import SPLITS


def plant(root: Path, *names: str) -> None:
    """Write files that hold their own names."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names_of(pattern: str | Path) -> list[str]:
    return list(find_files("text", str(pattern)).values())


@pytest.fixture(name="corpus")
def _corpus(tmp_path: Path) -> Path:
    plant(tmp_path, *(f"part{number % 3}/{number}.txt" for number in range(200)))
    return tmp_path


def read_every_split(source: str) -> dict[str, list[bytes]]:
    opened = {split: open_documents(DataConfig(source=source), split) for split in (*SPLITS, "all")}
    return {split: [documents[i] for i in range(len(documents))] for split, documents in opened.items()}


def test_links_to_parents_and_copies_of_paths_change_no_split(corpus: Path):
    source = f"text:{corpus}/**/*.txt"
    before = read_every_split(source)
    assert len(before["all"]) == 200
    assert all(before.values())
    (corpus / "part0" / "up").symlink_to("..")
    (corpus / "part1" / "up").symlink_to(corpus)
    (corpus / "0").symlink_to("part0")  # before the real folder in order
    (corpus / "part0" / "above").symlink_to(corpus.parent)
    (corpus / "0.txt").symlink_to("part1/1.txt")
    os.link(corpus / "part2" / "2.txt", corpus / "part2" / "deeper.txt")
    (corpus / "dangling.txt").symlink_to("nowhere.txt")
    assert read_every_split(source) == before
    assert len(names_of(corpus / "**" / "**" / "*.txt")) == 200
    assert len(names_of(corpus / "**" / "part*" / "**" / "*.txt")) == 200


def test_a_corpus_behind_a_link_is_read(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("other")
    (other / "linked").symlink_to(corpus)
    assert names_of(other / "linked" / "**" / "*.txt") == names_of(corpus / "**" / "*.txt")
    assert names_of(other / "**" / "1.txt") == ["linked/part1/1.txt"]
    (other / "copy.txt").symlink_to(corpus / "part1" / "1.txt")
    assert names_of(other / "*.txt") == ["copy.txt"]


def test_patterns_match_as_those_of_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant(tmp_path, "a.txt", "b.md", ".hidden.txt", "in/a.txt", "in/deep/b.txt", ".git/c.txt", "in/c[1].txt")
    monkeypatch.chdir(tmp_path)
    assert list(find_files("text", "**/*.txt")) == ["a.txt", "in/a.txt", "in/c[1].txt", "in/deep/b.txt"]
    assert list(find_files("text", "**")) == ["a.txt", "b.md", "in/a.txt", "in/c[1].txt", "in/deep/b.txt"]
    assert list(find_files("text", "./in/*.txt")) == ["in/a.txt", "in/c[1].txt"]
    assert list(find_files("text", "in/**/deep/*")) == ["in/deep/b.txt"]
    assert list(find_files("text", "?.md")) == ["b.md"]
    assert list(find_files("text", "in/c[[]1].txt")) == ["in/c[1].txt"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant(tmp_path, "books/a.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("text", "~/books/*.txt") == {f"{tmp_path}/books/a.txt": "a.txt"}


def test_the_fixed_part_ends_above_the_first_wildcard():
    assert [fixed_part(pattern) for pattern in ("*.txt", "a/b.txt", "/d/*/e/*", "d/e?/f")] == [".", "a", "/d", "d"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "books",
            r"text:.*books' is a folder; for the files in it \(2 \.txt, 1 \.md\) write 'text:.*books/\*\*/\*\.txt'",
        ),
        ("books/", r"is a folder; .* write 'text:.*books/\*\*/\*\.txt'"),
        ("empty", "is a folder; there is no file in it"),
        ("b*", r"matches 1 folders and no file, the first is .*books; for the files in it"),
        ("a[1].txt", r"matches no file: \[.* wildcards\. For the file of that name, write 'text:.*/a\[\[\]1\]\.txt'"),
        ("nowhere/*.txt", r"matches no file: there is no folder .*/nowhere \(searched from "),
        ("books/*.{txt,md}", r"matches no file: braces are no wildcards"),
        ("loop/*.rst", r"matches no file \(searched from .*loop and the folders in it have 1 \.txt"),
        ("books/*.rst", r"matches no file \(searched from .*books and the folders in it have 2 \.txt, 1 \.md"),
    ],
)
def test_a_pattern_without_a_file_is_answered_with_one_to_type(tmp_path: Path, pattern: str, message: str):
    plant(tmp_path, "books/in/a.txt", "books/in/b.txt", "books/in/c.md", "a[1].txt")
    (tmp_path / "empty").mkdir()
    plant(tmp_path, "loop/a.txt")
    os.symlink("b.txt", tmp_path / "loop" / "c.txt")
    os.symlink("c.txt", tmp_path / "loop" / "b.txt")
    with pytest.raises(ValueError, match=message):
        find_files("text", f"{tmp_path}/{pattern}")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "https://host/books/*.txt",
            "text:https://host/.*' is an address, .*; copy the files here, or mount the bucket",
        ),
        ("file:///books/*.txt", r"is an address, and files are read from folders .*; write 'text:/books/\*\.txt'"),
    ],
)
def test_an_address_is_refused_with_what_to_do(pattern: str, message: str):
    with pytest.raises(ValueError, match=message):
        find_files("text", pattern)


def test_what_a_message_says_to_type_works(tmp_path: Path):
    plant(tmp_path, "books/in/a.txt", "a[1].txt")
    for pattern, name in (("books", "books/in/a.txt"), ("a[1].txt", "a[1].txt")):
        with pytest.raises(ValueError, match="write 'text:") as refusal:
            find_files("text", f"{tmp_path}/{pattern}")
        typed = str(refusal.value).split("write 'text:")[1].removesuffix("'")
        assert list(find_files("text", typed)) == [f"{tmp_path}/{name}"]


def test_names_that_are_not_utf8_are_read_and_escaped(tmp_path: Path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    plant(folder, *(f"{number}.txt" for number in range(30)))
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    documents = open_documents(DataConfig(source=f"text:{tmp_path}/*/*.txt"), "all")
    assert len(documents) == 31
    with pytest.raises(ValueError, match=r"/caf\\xe9/\\xff\.txt is not UTF-8: .* at byte offset 0") as refusal:
        documents[30]
    assert str(refusal.value).isprintable()
    (folder / os.fsdecode(b"\xff.txt")).unlink()
    with pytest.raises(ValueError, match=r"/caf\\xe9/\\xff\.txt cannot be read: No such file") as refusal:
        documents[30]
    assert str(refusal.value).isprintable()
    with pytest.raises(ValueError, match=r"there is no folder .*caf\\xe9/nowhere") as refusal:
        find_files("text", f"{folder}/nowhere/*")
    assert str(refusal.value).isprintable()
