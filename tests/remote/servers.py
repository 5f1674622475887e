"""Servers on this machine that fail now and then: a web server over a folder, and a proxy before an S3 store."""

from __future__ import annotations

import base64
import http.client
import io
import random
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

KINDS = ("500", "503", "cut", "drop", "stall")
"""A status, a body that ends early, a connection that is closed without a word, and one that stays silent."""


class Faults:
    """Which requests fail, and how: a draw that its seed decides.

    Attributes:
        rate: share of the requests that fail.
        stall: seconds of silence.
        met: how many failed, by kind.
    """

    def __init__(self, rate: float = 0.0, *, kinds: tuple[str, ...] = KINDS, stall: float = 0.4, seed: int = 1) -> None:
        self.rate, self.kinds, self.stall = rate, kinds, stall
        self.met: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def draw(self) -> str | None:
        with self._lock:
            if self._random.random() >= self.rate:
                return None
            kind = self._random.choice(self.kinds)
            self.met[kind] += 1
            return kind


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: BinaryIO
    size: int

    @classmethod
    def of(cls, status: int, data: bytes = b"", **headers: str) -> Answer:
        return cls(status, headers, io.BytesIO(data), len(data))


class Server(ThreadingHTTPServer):
    """A server in a thread of this process.

    Attributes:
        faults: how it fails.
        longest: bodies of more bytes are cut.
        tells_sizes: whether it says how large a body is.
        asked: method and path of each request.
        sent: bytes of bodies, by status.
    """

    daemon_threads = True

    def __init__(self, handler: type[_Handler], faults: Faults | None) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.port = int(self.server_address[1])
        self.faults = faults or Faults()
        self.longest = sys.maxsize
        self.tells_sizes = True
        self.asked: list[tuple[str, str]] = []
        self.sent: Counter[int] = Counter()

    def answer(self, request: _Handler) -> Answer:
        raise NotImplementedError

    def handle_error(self, *_: object) -> None:
        """A client that goes away, as one that is killed, is nothing to report."""

    @contextmanager
    def failing(self, faults: Faults) -> Iterator[None]:
        """For as long, fail so; it must come to pass."""
        before, self.faults = self.faults, faults
        try:
            yield
        finally:
            self.faults = before
        assert faults.met

    @contextmanager
    def running(self) -> Iterator[None]:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield
        finally:
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers as its server does, or fails."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path))
        fault = self.server.faults.draw()
        if fault == "stall":
            time.sleep(self.server.faults.stall)
        if fault in ("stall", "drop"):
            self.close_connection = True
            return
        answer = Answer.of(int(fault)) if fault in ("500", "503") else self.server.answer(self)
        self.send_response(answer.status)
        if self.server.tells_sizes:
            self.send_header("Content-Length", str(answer.size))
        else:
            self.close_connection = True
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = answer.size
        if answer.size > self.server.longest:
            fault = "cut"
            self.server.faults.met["cut"] += 1
        if fault == "cut":
            self.close_connection = True
            left //= 2
        while data := answer.body.read(min(left, 2**16)):
            self.wfile.write(data)
            self.server.sent[answer.status] += len(data)
            left -= len(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _reply


class WebServer(Server):
    """The files of a folder, with pages that list them.

    Attributes:
        ranges: whether a part of a file can be asked for.
    """

    def __init__(
        self, folder: Path, faults: Faults | None, ranges: bool, sign_in: str | None, query: str | None
    ) -> None:
        super().__init__(_Handler, faults)
        self.folder, self.ranges, self._query = folder, ranges, query
        self._sign_in = f"Basic {base64.b64encode(sign_in.encode()).decode()}" if sign_in else None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, request: _Handler) -> Answer:
        address = urlsplit(request.path)
        if self._sign_in and request.headers.get("Authorization") != self._sign_in:
            return Answer.of(401)
        if self._query and address.query != self._query:
            return Answer.of(403)
        path = self.folder / unquote(address.path).lstrip("/")
        if path.is_dir():
            names = sorted(one.name + "/" * one.is_dir() for one in path.iterdir())
            page = "".join(f'<a href="{name}">{name}</a>' for name in ["../", *names])
            return Answer.of(200, page.encode(), **{"Content-Type": "text/html"})
        if not path.is_file():
            return Answer.of(404)
        file, about = path.open("rb"), path.stat()
        headers = {"ETag": f'"{about.st_mtime_ns}-{about.st_size}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if not self.ranges or not asked:
            return Answer(200, headers, file, about.st_size)
        start, stop = int(asked[1]), min(int(asked[2]) + 1, about.st_size)
        file.seek(start)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{about.st_size}"
        return Answer(206, headers, file, stop - start)


class S3Server(Server):
    """What another server on this machine answers."""

    def __init__(self, behind: int, faults: Faults | None) -> None:
        super().__init__(_Handler, faults)
        self._behind = behind

    def answer(self, request: _Handler) -> Answer:
        behind = http.client.HTTPConnection("127.0.0.1", self._behind)
        behind.request(request.command, request.path, request.body, dict(request.headers))
        response = behind.getresponse()
        body = io.BytesIO()
        shutil.copyfileobj(response, body)
        behind.close()
        own = {"content-length", "transfer-encoding", "connection", "server", "date"}
        headers = {name.title(): value for name, value in response.getheaders() if name.lower() not in own}
        size = int(response.getheader("Content-Length") or body.tell())  # of a HEAD, what the body would be
        body.seek(0)
        return Answer(response.status, headers, body, size)


@contextmanager
def web_server(
    folder: Path,
    faults: Faults | None = None,
    *,
    ranges: bool = True,
    sign_in: str | None = None,
    query: str | None = None,
    longest: int = sys.maxsize,
) -> Iterator[WebServer]:
    """Serve a folder; ``sign_in`` is the ``user:password`` that is asked for, ``query`` the end of every address."""
    server = WebServer(folder, faults, ranges, sign_in, query)
    server.longest = longest
    with server.running():
        yield server


@contextmanager
def s3_server(faults: Faults | None = None) -> Iterator[S3Server]:
    """Serve S3, with the store in this process's memory."""
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    server = S3Server(store.get_host_and_port()[1], faults)
    try:
        with server.running():
            yield server
    finally:
        store.stop()
