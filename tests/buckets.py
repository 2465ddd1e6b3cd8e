"""A server of the Google Cloud Storage API for tests: gcp-storage-emulator, with what it lacks and with accidents.

It lacks versions of objects: the conditions that name one are checked here, under the lock that serves one request at a
time, and downloads say theirs. Accidents are functions of a request: they delay it, answer in its place, or kill who
sent it.
"""

import contextlib
import dataclasses
import functools
import http.server
import io
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"
_CONDITIONS = ("ifGenerationMatch", "ifGenerationNotMatch", "generation")


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as accidents see it."""

    number: int
    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes

    @property
    def writes(self) -> bool:
        """Tell whether it changes objects."""
        return self.method != "GET"

    @property
    def object(self) -> str:
        """Return the name of the object that it reads, writes or deletes; "" for a listing."""
        if "name" in self.query:
            return self.query["name"][0]
        if self.query.get("uploadType") == ["multipart"]:
            return json.loads(re.search(rb"\{.*?\}", self.body)[0])["name"]
        return unquote(self.path.partition("/o/")[2])


Accident = Callable[[Request], int | None]
"""Answer a request with an HTTP status in the server's place; None: let it pass."""


def _nothing(_: Request) -> int | None:
    return None


class Bucket:
    """A running server with one bucket."""

    def __init__(self) -> None:
        # It reports every object that is not there.
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(BUCKET, self.storage)
        self.lock = threading.Lock()
        self.before: Accident = _nothing
        """Called before a request is served."""
        self.after: Accident = _nothing
        """Called when a request was served and before it is answered."""
        self.requests: list[Request] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "FSSPEC_GCS_TOKEN": "anon",
            "FSSPEC_GCS_ENDPOINT_URL": self.url,
            # The emulator does not speak gRPC, over which gcsfs asks for the bucket's type.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GCS_REQUESTS_TIMEOUT": "5",
            # tensorstore looks for credentials, and would ask a metadata server that no machine of tests has.
            "GCE_METADATA_ROOT": "127.0.0.1:1",
        }

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return name -> content."""
        with self.lock:
            found = self.storage.objects.get(BUCKET, {})
            return {name: self.storage.get_file(BUCKET, name) for name in sorted(found) if name.startswith(prefix)}

    def put(self, name: str, content: bytes) -> None:
        """Make an object, or replace one behind everybody's back."""
        with self.lock:
            facts = objects._make_object_resource(self.url, BUCKET, name, "text/plain", str(len(content)))
            self.storage.create_file(BUCKET, name, content, objects._checksums(content, facts))

    @contextlib.contextmanager
    def accident(self, before: Accident | None = None, after: Accident | None = None) -> Iterator[None]:
        """Let accidents happen while the body runs."""
        kept = self.before, self.after
        self.before, self.after = before or self.before, after or self.after
        try:
            yield
        finally:
            self.before, self.after = kept

    def stop(self) -> None:
        """Close the server."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(emulator.RequestHandler):
    def __init__(self, bucket: Bucket, *args: Any) -> None:
        self._bucket = bucket
        super().__init__(bucket.storage, *args)

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def _serve(self, method: str) -> None:
        parsed = urlparse(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if body:
            self.rfile = io.BytesIO(body)
        with self._bucket.lock:
            request = Request(len(self._bucket.requests), method, parsed.path, parse_qs(parsed.query), body)
            self._bucket.requests.append(request)
        status = self._bucket.before(request)
        if status is None:
            with self._bucket.lock:
                status = self._unmet(request)
                if status is None:
                    return self._route(method, request)
        self._refuse(status)

    def _unmet(self, request: Request) -> int | None:
        """Return the status of a condition that does not hold."""
        found = self._generation(request.object)
        asked = {name: request.query[name][0] for name in _CONDITIONS if name in request.query}
        if asked.get("ifGenerationMatch", found) != found:
            return 412
        if asked.get("ifGenerationNotMatch") == found:
            return 304 if request.method == "GET" else 412
        return 404 if asked.get("generation", found) != found else None

    def _route(self, method: str, request: Request) -> None:
        """Serve a request, and send the answer when `after` has seen it."""
        stream, self.wfile = self.wfile, _Answer(self.wfile)
        try:
            emulator.Router(self).handle(method)
        finally:
            answer, self.wfile = self.wfile, stream
        status = self._bucket.after(request)
        if status is None:
            # Of a download, tensorstore reads the version in the header.
            line, _, rest = b"".join(answer.parts).partition(b"\r\n")
            generation = f"X-Goog-Generation: {self._generation(request.object)}\r\n".encode()
            stream.write(line + b"\r\n" + (generation if request.method == "GET" else b"") + rest)
        else:
            self._refuse(status)

    def _refuse(self, status: int) -> None:
        with contextlib.suppress(ConnectionError):
            body = json.dumps({"error": {"code": status, "message": f"accident {status}"}}).encode()
            body = b"" if status == 304 else body
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _generation(self, name: str) -> str:
        try:
            return str(self._bucket.storage.get_file_obj(BUCKET, name)["generation"])
        except NotFound:
            return "0"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # of a process that was killed
            super().handle()


class _Answer:
    """Collects what the emulator writes."""

    def __init__(self, stream: Any) -> None:
        self.parts: list[bytes] = []
        self.stream = stream

    def write(self, content: bytes) -> int:
        self.parts.append(content)
        return len(content)

    def flush(self) -> None:
        pass
