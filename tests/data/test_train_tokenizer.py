"""The command that trains a tokenizer, and how light the package is to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from transmamba_jax.data import load_tokenizer
from transmamba_jax.data.train_tokenizer import main


def write_config(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(f"data: {{source: 'text:{folder}/*.txt', train_split: all}}\n")
    return path


def test_the_same_text_gives_the_same_file(tmp_path, write_corpus, capsys):
    texts = write_corpus(40)
    arguments = ["--config", str(write_config(tmp_path)), "--vocab-size", "300", "--output"]
    for name in ("one.json", "two.json"):
        main([*arguments, str(tmp_path / name)])
    assert "300 ids" in capsys.readouterr().out
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    tokenizer = load_tokenizer(str(tmp_path / "one.json"))
    assert tokenizer.vocab_size == 300
    assert tokenizer.end_of_document == 0
    text = texts[0].decode()
    assert len(tokenizer.encode(text)) < len(texts[0])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_file_in_a_bucket_needs_no_folder(tmp_path, write_corpus, bucket):
    write_corpus(40)
    main(["--config", str(write_config(tmp_path)), "--vocab-size", "300", "--output", "gs://bucket/no/folder/bpe.json"])
    assert list(bucket.objects("no/")) == ["no/folder/bpe.json"]
    assert load_tokenizer("gs://bucket/no/folder/bpe.json").vocab_size == 300


def test_overrides_and_limits_reach_the_source(tmp_path, write_corpus):
    write_corpus(40)
    output = tmp_path / "tokenizer.json"
    arguments = ["--config", str(write_config(tmp_path)), "--output", str(output), "--vocab-size", "400"]
    main([*arguments, "--max-bytes", "1"])
    assert load_tokenizer(str(output)).vocab_size < 300
    with pytest.raises(SystemExit, match=r"no split 'tarin'.*did you mean 'train'"):
        main([*arguments, "--data.train-split", "tarin"])


@pytest.mark.parametrize("size", ["256", "0"])
def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path, write_corpus, size):
    write_corpus(3)
    with pytest.raises(SystemExit, match="--vocab-size must be >= 257"):
        main(["--config", str(write_config(tmp_path)), "--vocab-size", size, "--output", str(tmp_path / "t.json")])


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(SystemExit, match=r"--output .* is a folder; name a file in it"):
        main(["--config", str(tmp_path / "none.yaml"), "--output", str(tmp_path)])
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(SystemExit, match=f"Not a directory: .*{file.name}|File exists: .*{file.name}"):
        main(["--config", str(write_config(tmp_path)), "--output", str(file / "x.json")])


def test_the_folder_of_the_output_is_made(tmp_path, write_corpus):
    write_corpus(3)
    output = tmp_path / "runs" / "tokenizers" / "t.json"
    assert main(["--config", str(write_config(tmp_path)), "--vocab-size", "300", "--output", str(output)]) == 0
    assert load_tokenizer(str(output)).vocab_size <= 300


def test_options_are_not_abbreviated(tmp_path, write_corpus):
    write_corpus(3)
    arguments = ["--config", str(write_config(tmp_path)), "--output", str(tmp_path / "t.json")]
    with pytest.raises(SystemExit, match="--vocab"):
        main([*arguments, "--vocab", "300"])


def test_help_has_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert "(default: 4096)" in text
    assert "--max-bytes" in text


def test_a_tokenizer_needs_neither_grain_nor_tfds():
    code = (
        "import sys; from transmamba_jax.data import load_tokenizer; load_tokenizer('bytes'); "
        "print([m for m in ('grain', 'tensorflow_datasets', 'array_record') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
