"""Data and exported folders on S3, against moto's server; see tests/faults/test_bucket_runs.py for work directories."""

import jax
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from tests.models import CONFIG
from transmamba_jax import data, export
from transmamba_jax.checkpoint import complete_steps
from transmamba_jax.config import Config, DataConfig
from transmamba_jax.data.sources import open_documents
from transmamba_jax.export.folder import abstract_params
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.runtime.storage import bucket as buckets
from transmamba_jax.runtime.storage import s3


@pytest.fixture(name="folder", scope="module")
def _folder():
    """Return a folder of a bucket of a server of S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        buckets.filesystem("s3").mkdir("s3://bucket-of-s3")
        yield expand_path("s3://bucket-of-s3/folder")
    server.stop()


def test_text_is_read(folder, tmp_path):
    for index in range(25):
        (folder / f"text/{index:02}.txt").write_text(f"text {index}")
    config = DataConfig(source=f"text:{folder}/text/*.txt", cache_dir=str(tmp_path))
    assert list(open_documents(config, "all")) == [b"text %d" % index for index in range(25)]


def test_an_exported_folder_is_written_and_read(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = Config(model=CONFIG)
    leaves, tree = jax.tree.flatten(abstract_params(config.model))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [rng.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in leaves])
    export.save(folder / "export", config, params, data.load_tokenizer("bytes"))
    assert sorted(path.name for path in (folder / "export").iterdir()) == [
        "config.yaml",
        "model.safetensors",
        "tokenizer.json",
    ]
    loaded = export.load(str(folder / "export"))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.config.model == config.model
    with pytest.raises(ValueError, match=r"already holds model\.safetensors, config\.yaml, tokenizer\.json"):
        export.save(folder / "export", config, params, None)


def test_missing_credentials_are_one_error_that_says_what_to_do(folder, tmp_path, monkeypatch):
    for name in "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY":
        monkeypatch.delenv(name)
    for name in "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE":
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    files = s3.filesystem(skip_instance_cache=True)
    monkeypatch.setattr(buckets, "filesystem", lambda _: files)
    message = "Unable to locate credentials. Give this machine credentials for the bucket: aws configure"
    with pytest.raises(ValueError, match=f"data.source 'text:{folder}/text/.*: cannot copy {folder}/text .*{message}"):
        open_documents(DataConfig(source=f"text:{folder}/text/*.txt", cache_dir=str(tmp_path)), "all")
    with pytest.raises(ValueError, match=f"cannot read '{folder}/tokenizer.json': {message}"):
        data.load_tokenizer(f"{folder}/tokenizer.json")


def test_checkpoints_are_refused(folder):
    with pytest.raises(ValueError, match="checkpoints are in folders and on gs://, orbax refuses s3://"):
        complete_steps(folder)
