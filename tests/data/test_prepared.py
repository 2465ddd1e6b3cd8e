"""TFDS manners: prepared sets are found on disk, and nothing ever asks the network."""

import json
import shutil
from pathlib import Path

import pytest

from transmamba_jax.config import DataConfig
from transmamba_jax.data import prepared
from transmamba_jax.data.sources import open_documents


def describe(root: Path, folder: str, file_format: str = "array_record") -> None:
    """Write the description of a prepared set that has no splits."""
    directory = root / folder
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").write_text(json.dumps({"fileFormat": file_format, "splits": []}))


def test_newest_version_and_the_only_config(tmp_path):
    for folder in ("c4/en/3.0.1", "c4/en/3.10.0", "lm1b/1.1.0"):
        describe(tmp_path, folder)
    assert str(prepared.find("c4/en", tmp_path)) == "c4/en:3.10.0"
    assert str(prepared.find("c4", tmp_path)) == "c4/en:3.10.0"
    assert prepared.find("c4/en:3.0.1", tmp_path).directory == tmp_path / "c4/en/3.0.1"
    assert prepared.find("lm1b", tmp_path).config is None


def test_several_configs_have_to_be_chosen_from(tmp_path):
    for folder in ("wiki40b/en/1.3.0", "wiki40b/de/1.3.0"):
        describe(tmp_path, folder)
    with pytest.raises(ValueError, match=r"several prepared configs .* name one of de, en"):
        prepared.find("wiki40b", tmp_path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("spec", ["c4/en", "c4/en:3.0.1", "lm1b", "nonsense"])
def test_not_prepared_fails_at_once(tmp_path, spec):
    describe(tmp_path, "lm1bb/1.1.0")
    with pytest.raises(ValueError, match="is not prepared under") as failure:
        open_documents(DataConfig(source=f"tfds:{spec}", cache_dir=str(tmp_path)), "train")
    message = str(failure.value)
    assert repr(spec) in message
    assert str(tmp_path) in message
    assert "prepared there: lm1bb:1.1.0" in message
    assert f"tfds build {spec} --file_format=array_record --data_dir={tmp_path}" in message


def test_near_names_and_missing_roots_are_said(tmp_path):
    describe(tmp_path, "lm1b/1.1.0")
    with pytest.raises(ValueError, match=r"did you mean 'tfds:lm1b'"):
        prepared.find("lmb1", tmp_path)
    with pytest.raises(ValueError, match="that directory does not exist"):
        prepared.find("lm1b", tmp_path / "nowhere")


@pytest.mark.usefixtures("no_network")
def test_tfrecord_is_refused_with_the_command(tmp_path):
    describe(tmp_path, "lm1b/1.1.0", file_format="tfrecord")
    with pytest.raises(ValueError, match=r"format tfrecord.*tfds build lm1b --file_format=array_record"):
        open_documents(DataConfig(source="tfds:lm1b", cache_dir=str(tmp_path)), "train")


def test_misspelt_source(tmp_path):
    with pytest.raises(ValueError, match=r"must be 'tfds:<name>\[/config\]\[:version\]', found 'tfds:a b'"):
        prepared.find("a b", tmp_path)


def test_environment_names_the_root(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=str(tmp_path)):
        open_documents(DataConfig(source="tfds:lm1b"), "train")


@pytest.mark.usefixtures("no_network")
def test_a_prepared_set_is_read(stdlib_cache):
    config = DataConfig(source="tfds:python_stdlib", cache_dir=str(stdlib_cache))
    documents = open_documents(config, "validation")
    same = open_documents(DataConfig(cache_dir=str(stdlib_cache)), "validation")
    assert [documents[i] for i in range(len(documents))] == [same[i] for i in range(len(same))]
    part = open_documents(config, "train[:10%]")
    assert 0 < len(part) < 0.2 * len(open_documents(config, "train"))


def test_missing_and_damaged_files_of_a_prepared_set(stdlib_cache, tmp_path):
    shutil.copytree(stdlib_cache / "python_stdlib", tmp_path / "python_stdlib")
    config = DataConfig(source="tfds:python_stdlib", cache_dir=str(tmp_path))
    (shard,) = tmp_path.rglob("*-train.*")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"example 0 of split 'train' in .* cannot be read: "):
        open_documents(config, "train")[0]
    shard.unlink()
    for split in ("train", "train[:10%]", "validation+train"):
        with pytest.raises(ValueError, match=r"split 'train' .* has 0 of its 1 files, .*-train\..*-of-00001; copy it"):
            open_documents(config, split)
    assert open_documents(config, "validation")[0]
    with pytest.raises(ValueError, match=r"no split 'vaildation' of .* did you mean 'validation'"):
        open_documents(config, "test+vaildation")
    (description,) = tmp_path.rglob("dataset_info.json")
    description.write_text("{")
    with pytest.raises(ValueError, match=f"description of {description.parent} cannot be read: "):
        open_documents(config, "validation")


def test_wrong_split_and_field_of_a_prepared_set(stdlib_cache):
    config = DataConfig(source="tfds:python_stdlib", cache_dir=str(stdlib_cache), text_field="txt")
    with pytest.raises(ValueError, match=r"no split 'trian' of .* did you mean 'train'"):
        open_documents(config, "trian")
    with pytest.raises(ValueError, match=r"no data\.text_field 'txt' in .* there are path, text; did you mean 'text'"):
        open_documents(config, "train")
