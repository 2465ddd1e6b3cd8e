"""Paths of a bucket against the HTTP API: what they do, and how requests that fail are repeated and told."""

import importlib
import logging
import re
import threading
import time
from pathlib import Path

import pytest

from tests.buckets import Request
from transmamba_jax.runtime import storage
from transmamba_jax.runtime.paths import expand_path
from transmamba_jax.runtime.storage import bucket as buckets


@pytest.fixture(name="folder")
def _folder(bucket, request):
    """Return a folder of the bucket that no other test uses."""
    assert bucket.url
    name = re.sub(r"[^a-z0-9]", "-", request.node.name)
    return expand_path(f"gs://bucket/{name}")


@pytest.fixture(name="quick")
def _quick(monkeypatch):
    """Repeat requests without long delays."""
    from transmamba_jax.runtime.storage import gcs

    monkeypatch.setattr(gcs, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(gcs, "_RETRIES", 4)


def first(count: int, status: int):
    """Answer the first requests with a status."""
    seen: list[Request] = []

    def accident(request: Request) -> int | None:
        seen.append(request)
        return status if len(seen) <= count else None

    return accident


def test_objects_are_written_listed_read_renamed_and_deleted(folder):
    assert not folder.exists()
    assert not folder.is_dir()
    content = bytes(range(256)) * 9
    (folder / "a" / "b.bin").write_bytes(content)
    (folder / "c.txt").write_text("é\n", encoding="utf-8")
    with (folder / "d.csv").open("w", newline="", encoding="utf-8") as file:
        file.write("1,2\r\n")
    assert (folder / "a/b.bin").read_bytes() == content
    assert (folder / "c.txt").read_text(encoding="utf-8") == "é\n"
    assert (folder / "d.csv").read_bytes() == b"1,2\r\n"
    assert (folder.exists(), folder.is_dir(), folder.is_file()) == (True, True, False)
    assert ((folder / "c.txt").is_file(), (folder / "c.txt").is_dir()) == (True, False)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c.txt", "d.csv"]
    assert storage.files_below(folder) == {"a/b.bin": 2304, "c.txt": 3, "d.csv": 5}
    assert [path.name for path in folder.rglob("*.bin")] == ["b.bin"]
    assert [path.name for path in folder.glob("*.txt")] == ["c.txt"]
    assert abs((folder / "c.txt").stat().st_mtime - time.time()) < 60

    (folder / "a").rename(folder / "z")
    assert storage.files_below(folder) == {"c.txt": 3, "d.csv": 5, "z/b.bin": 2304}
    storage.delete(folder / "z")
    (folder / "c.txt").unlink()
    (folder / "c.txt").unlink(missing_ok=True)
    for missing in (folder / "c.txt").unlink, (folder / "c.txt").read_bytes, (folder / "c.txt").stat:
        with pytest.raises(FileNotFoundError, match=r"c\.txt"):
            missing()
    assert list(storage.files_below(folder)) == ["d.csv"]


def test_what_another_process_writes_is_seen_at_once(folder, bucket):
    assert list(folder.parent.iterdir()) is not None
    assert not (folder / "new").exists()
    bucket.put(f"{folder.name}/new", b"there")
    assert (folder / "new").read_bytes() == b"there"
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_a_file_that_an_error_closes_is_not_uploaded(folder):
    def fail():
        with (folder / "half").open("w") as file:
            file.write("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not (folder / "half").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("status", "reason"), [(429, "HTTP 429"), (500, "HTTP 500"), (503, "HTTP 503")])
def test_a_request_that_fails_is_repeated_and_said(folder, bucket, caplog, status, reason):
    with bucket.accident(before=first(3, status)), caplog.at_level(logging.WARNING):
        (folder / "file").write_bytes(b"content")
    assert (folder / "file").read_bytes() == b"content"
    assert [record.message for record in caplog.records if reason in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 3
    assert "attempt 4 of 5" in caplog.messages[-1]


@pytest.mark.usefixtures("quick")
def test_a_request_without_an_answer_is_repeated_and_said(folder, bucket, caplog, monkeypatch):
    monkeypatch.setattr(folder.files, "_seconds", 0.2)
    waiting, seen = threading.Event(), []

    def silent(request: Request) -> None:
        seen.append(request)
        if len(seen) == 1:
            waiting.wait(10)

    with bucket.accident(before=silent), caplog.at_level(logging.WARNING):
        (folder / "file").write_bytes(b"content")
        waiting.set()
    assert (folder / "file").read_bytes() == b"content"
    assert "no answer within 0.2 s; attempt 2 of 5" in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_request_that_never_succeeds_is_an_error_that_says_so(folder, bucket):
    with bucket.accident(before=lambda _: 503), pytest.raises(OSError, match=r"HTTP 503 .*\(5 attempts\)"):
        (folder / "file").write_bytes(b"content")
    with bucket.accident(before=lambda _: 500), pytest.raises(OSError, match="HTTP 500"):
        (folder / "file").exists()  # an error is no answer


@pytest.mark.usefixtures("quick")
def test_a_forbidden_request_is_not_repeated(folder, bucket):
    seen: list[Request] = []
    forbid = lambda request: seen.append(request) or 403
    with bucket.accident(before=forbid), pytest.raises(OSError, match=r"Forbidden: .*accident 403") as caught:
        (folder / "file").write_bytes(b"content")
    assert caught.value.denied
    assert len(seen) == 1


def test_a_version_is_written_once(folder):
    from transmamba_jax.runtime.storage import gcs

    path = str(folder / "object")
    assert gcs.read_versioned(path) == (b"", 0, 0.0)
    made = gcs.write_versioned(path, b"one", 0)
    assert gcs.read_versioned(path) == made
    with pytest.raises(FileExistsError):
        gcs.write_versioned(path, b"two", 0)
    again = gcs.write_versioned(path, b"two", made.generation)
    assert again.generation > made.generation
    with pytest.raises(FileExistsError):
        gcs.delete_versioned(path, made.generation)
    gcs.delete_versioned(path, again.generation)
    assert not (folder / "object").exists()


def test_appended_bytes_are_uploaded_soon_and_all_of_them_at_a_flush(folder, bucket):
    path, before = folder / "lines", len(bucket.requests)
    file = storage.append_to(path)
    for index in range(40):
        file.write(b"%d\n" % index)
    file.flush()
    assert path.read_bytes() == b"".join(b"%d\n" % index for index in range(40))
    assert sum(request.method == "POST" for request in bucket.requests[before:]) <= 3  # forty at once are few uploads
    file.write(b"last\n")
    deadline = time.monotonic() + 20
    while not path.read_bytes().endswith(b"last\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    file.close()
    more = storage.append_to(path)
    more.write(b"more\n")
    more.close()
    assert path.read_bytes().endswith(b"39\nlast\nmore\n")


@pytest.mark.usefixtures("quick")
def test_bytes_that_the_bucket_refuses_wait_and_go_first(folder, bucket):
    path = folder / "lines"
    file = storage.append_to(path)
    with bucket.accident(before=lambda _: 403):
        file.write(b"one\n")
        with pytest.raises(OSError, match="Forbidden"):
            file.flush()
    file.write(b"two\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_copies_are_made_once_and_again_when_an_object_changes(folder, bucket, tmp_path):
    (folder / "sub" / "a").write_bytes(b"first")
    copy = storage.local_copy(folder, tmp_path)
    assert (copy / "sub/a").read_bytes() == b"first"
    reads = lambda: sum(request.query.get("alt") == ["media"] for request in bucket.requests)
    before = reads()
    assert storage.local_copy(folder, tmp_path) == copy
    assert reads() == before
    (folder / "sub" / "a").write_bytes(b"other")
    assert (storage.local_copy(folder, tmp_path) / "sub/a").read_bytes() == b"other"
    assert storage.local_copy(folder / "sub/a", tmp_path).read_bytes() == b"other"
    assert storage.local_copy(tmp_path, tmp_path) == tmp_path


def test_an_object_that_changes_while_it_is_copied_leaves_no_copy(folder, bucket, tmp_path):
    (folder / "a").write_bytes(b"first")

    def replace(request: Request) -> None:
        if request.object.endswith("/a") and request.query.get("alt") == ["media"]:
            bucket.put(f"{folder.name}/a", b"other")

    with bucket.accident(before=replace), pytest.raises(OSError, match="changed while they were copied; try again"):
        storage.local_copy(folder, tmp_path)
    assert (storage.local_copy(folder, tmp_path) / "a").read_bytes() == b"other"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("module", "name", "attempts"),
    [
        ("google.auth.exceptions", "DefaultCredentialsError", 1),
        ("gcsfs.retry", "NonRetryableError", 1),
        ("google.auth.exceptions", "RefreshError", 5),
        ("google.auth.exceptions", "TransportError", 5),
    ],
)
def test_credentials_that_fail_are_an_error_of_the_storage(folder, monkeypatch, module, name, attempts):
    error = getattr(importlib.import_module(module), name)("the credentials failed")
    calls = []

    def fail(*_: object) -> None:
        calls.append(error)
        raise error

    monkeypatch.setattr(folder.files.credentials, "apply", fail)
    with pytest.raises(OSError, match="the credentials failed") as caught:
        (folder / "file").write_bytes(b"content")
    assert len(calls) == attempts
    assert caught.value.denied == (attempts == 1)


def test_what_another_program_wrote_stays_until_it_is_deleted(folder, bucket):
    path = folder / "lines"
    file = storage.append_to(path)
    file.write(b"one\n")
    file.flush()
    bucket.put(f"{folder.name}/lines", b"of another run\n")
    file.write(b"two\n")
    with pytest.raises(OSError, match="lines was written by another program, and is left as it is; delete it"):
        file.flush()
    assert path.read_bytes() == b"of another run\n"
    path.unlink()
    file.flush()
    assert path.read_bytes() == b"one\ntwo\n"
    path.unlink()
    file.write(b"three\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.usefixtures("quick")
def test_appended_bytes_whose_answer_was_lost_are_known(folder, bucket):
    file, lost = storage.append_to(folder / "lines"), []

    def lose(request: Request) -> int | None:
        lost.append(request)
        return 503 if request.writes and len(lost) == 1 else None

    with bucket.accident(after=lose):
        file.write(b"one\n")
        file.flush()
    assert lost[0].writes
    file.write(b"two\n")
    file.close()
    assert (folder / "lines").read_bytes() == b"one\ntwo\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_of_uploads_that_dies_is_an_error_of_the_next_flush(folder, monkeypatch):
    from transmamba_jax.runtime.storage import gcs

    file = storage.append_to(folder / "lines")
    monkeypatch.setattr(gcs, "write_versioned", lambda *_: [][0])
    file.write(b"one\n")
    for _ in range(2):
        with pytest.raises(OSError, match="lines is no longer uploaded"):
            file.flush()
    with pytest.raises(OSError, match="lines is no longer uploaded"):
        file.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://", "names the bucket ''"),
        ("gs:///run", "names the bucket ''"),
        ("gs://Bucket/run", "names the bucket 'Bucket'; a name has 3 to 222 lower-case"),
        ("https://host/run", "must be a path of this machine, gs://BUCKET/"),
        ("GS://bucket/run", "must be a path of this machine, gs://BUCKET/"),
        ("gs://bucket/a/../run", r"gs://bucket/a/\.\./run has '\.\.'"),
        ("gs://bucket/run?", r"gs://bucket/run\? has a wildcard \(\* \? \[\), and must name one place"),
        ("gs://bucket/run[1]/checkpoints", "has a wildcard"),
        ("gs://bucket/run\n", r"'gs://bucket/run\\n' has a control character or a line end"),
        (
            Path("gs://bucket/run"),
            r"path gs:/bucket/run lacks a slash .*: write gs://bucket/run; .*, \./gs:/bucket/run",
        ),
        ("S3:/bucket/run", "write s3://bucket/run"),
    ],
)
def test_a_url_that_names_no_bucket_is_refused_without_a_request(url, message):
    with pytest.raises(ValueError, match=message):
        expand_path(url)


def test_an_empty_object_that_stands_for_a_folder_is_no_file_of_it(folder, bucket, tmp_path):
    (folder / "a" / "file").write_bytes(b"content")
    for name in "", "a/", "b/":
        bucket.put(f"{folder.name}/{name}", b"")
    assert storage.files_below(folder) == {"a/file": 7}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert [path.name for path in storage.local_copy(folder, tmp_path).rglob("*")] == ["a", "file"]
    storage.delete(folder)
    assert bucket.objects(f"{folder.name}/") == {}


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs the package gcsfs: pip install -e '\.\[gcs\]'"):
        expand_path("gs://bucket/run")
    with pytest.raises(ValueError, match=r"needs the package s3fs: pip install -e '\.\[s3\]'"):
        expand_path("s3://bucket/run")
