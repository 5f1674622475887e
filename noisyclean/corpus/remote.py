"""Objects of remote stores, through fsspec: read as a stream that outlasts faults of the network, and put whole.

fsspec speaks the protocols, and the library behind each takes credentials its own way. What they leave open is here:
when to ask again and when to give up, that a shard is one object from its first byte to its last, and the words for
what goes wrong. Errors of these libraries quote addresses, in which there may be secrets: none of their words is handed
on, nor are they chained to ours.
"""

from __future__ import annotations

import math
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from fsspec import available_protocols, config
from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile
from fsspec.utils import get_protocol, glob_translate

from noisyclean.corpus.locate import HIDDEN, without_secrets
from noisyclean.corpus.parallel import map_in_threads
from noisyclean.errors import NoisycleanError

T = TypeVar("T")

BLOCK = 8 * 2**20
"""Bytes that are asked for at a time."""
_KEPT = 2
"""Blocks that are kept, as a read may lie across two. Another may be under way, and is there twice for a moment, in its
pieces and whole: four at most. Of a web server without ranges there are more, as aiohttp reads ahead for itself."""
_SMALLEST = 2**17
"""After a fault half as much is asked for, so that a line which breaks all the time gets on too; no less than this."""

TRIES = 8
"""So often in a row is the same thing asked for."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before asking again; twice as many each time, less up to a half, so that many do not ask at once."""
STALL = 30.0
"""Seconds without a byte after which an HTTP server is taken to have hung; s3fs and gcsfs have limits of their own."""

_MAY_PASS = frozenset({408, 409, 425, 429})
"""Answers of HTTP under 500 that may be others later."""
_VERSION = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "Content-MD5", "LastModified", "Last-Modified", "mtime")
"""What stores call that by which a changed object is told, the better ones first."""
_CHANGED = "changed while it was read; repeat the command"
_WEB = ("http", "https")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
"""Protocol → the extra that brings its library."""


class MissingObjectError(NoisycleanError):
    """There is no such object."""


@dataclass(frozen=True, slots=True)
class ObjectState:
    """What a store says of an object.

    Attributes:
        size: in bytes.
        version: its ETag or checksum, else when it was changed; ``""`` where the store tells neither.
    """

    size: int
    version: str


def open_remote(address: str, *, ahead: bool = True) -> IO[bytes]:
    """Open an object for reading from start to end, where a thread fetches ``ahead``, or else here and there.

    What has been had is not asked for again after a fault, but where an HTTP server knows no ranges. After a fault the
    object must be what it was when opened; :func:`refuse_changed` asks at the end of reading.

    Raises:
        NoisycleanError: it cannot be had; also on reading.
    """
    return cast("IO[bytes]", _RemoteStream(address, ahead))


def refuse_changed(stream: IO[bytes]) -> None:
    """Ask whether the object behind a stream of :func:`open_remote` is still the one that was opened.

    Raises:
        NoisycleanError: it is not, or the store does not say.
    """
    cast("_RemoteStream", stream).refuse_changed()


def look_up(address: str) -> ObjectState:
    """What the store says of an object now.

    Raises:
        NoisycleanError: it cannot be had.
    """
    return persist(lambda: _state(*_locate(address)), address)


def read_remote(address: str) -> bytes:
    """The whole of a small object.

    Raises:
        NoisycleanError: it cannot be had.
    """
    with open_remote(address, ahead=False) as stream:
        data = stream.read()
        refuse_changed(stream)
    return data


def put_remote(path: Path, address: str) -> None:
    """Upload a file, which then is there whole, in place of what was there, or not at all.

    Raises:
        NoisycleanError: it cannot be written.
    """

    def put() -> None:
        filesystem, inner = _locate(address)
        filesystem.put_file(str(path), inner)

    persist(put, address)


def remove_remote(address: str) -> None:
    """Remove an object, if it is there.

    Raises:
        NoisycleanError: it cannot be removed.
    """

    def remove() -> None:
        filesystem, inner = _locate(address)
        with suppress(FileNotFoundError):
            filesystem.rm_file(inner)  # not `rm`, which takes a name for a glob, and of many passes over what fails

    persist(remove, address)


def remove_under(address: str) -> None:
    """Remove all objects under an address, if there are any.

    Raises:
        NoisycleanError: they cannot be removed.
    """
    for _ in map_in_threads(remove_remote, [f"{address}/{name}" for name in list_under(address)]):
        pass


def list_under(address: str) -> dict[str, int]:
    """The objects under an address in a bucket: what follows the address in their own, and the size in bytes.

    Raises:
        NoisycleanError: they cannot be listed.
    """

    def found() -> dict[str, int]:
        filesystem, inner = _locate(address)
        folder = f"{inner}/"
        return {
            name.removeprefix(folder): info["size"]
            for name, info in filesystem.find(inner, detail=True).items()
            if name.startswith(folder) and not name.endswith("/")  # stores also tell what else begins so
        }

    return persist(found, address)


def list_remote(pattern: str) -> list[str]:
    """The addresses that match a glob pattern, ``**`` for any folders; of a web server, as far as its pages list them.

    Not by fsspec's glob, which passes over folders that it fails to list, and the shards in them.

    Raises:
        NoisycleanError: they cannot be listed.
    """
    filesystem, inner = persist(lambda: _locate(pattern), pattern)
    is_web = get_protocol(pattern) in _WEB
    fixed = re.split(r"[*[]" if is_web else r"[*?[]", inner, maxsplit=1)[0]
    root = fixed[: fixed.rfind("/") + 1]
    if "**" in inner and not is_web:
        found = persist(lambda: filesystem.find(root), pattern)  # a request for a thousand objects
    else:
        found = _walk(filesystem, root, math.inf if "**" in inner else inner.count("/"))
    matches = re.compile(glob_translate(inner)).match
    return sorted(filesystem.unstrip_protocol(one) for one in found if matches(one))


def _walk(filesystem: Any, root: str, depth: float) -> Iterator[str]:
    """The files below a folder, but no deeper than so many slashes; none where there is no such folder."""
    folders = [root]
    for folder in folders:
        try:
            listed = persist(partial(filesystem.ls, folder, detail=True), filesystem.unstrip_protocol(folder))
        except MissingObjectError:
            if folder == root:
                return
            raise
        for one in listed:
            name = one["name"]
            if one["type"] != "directory":
                yield name
                continue
            name = f"{name.rstrip('/')}/"
            if name.count("/") <= depth and name not in folders and not name.endswith("/./"):
                folders.append(name)


def persist(action: Callable[[], T], address: str, stop: threading.Event | None = None) -> T:
    """What ``action`` returns; where it fails in a way that may pass, it is called again, up to ``TRIES`` times.

    Raises:
        NoisycleanError: it failed for good, or ``stop`` was set meanwhile.
    """
    stop = stop or threading.Event()
    tries = 0
    while True:
        try:
            return action()
        except NoisycleanError:
            raise
        except Exception as error:  # of whatever kind the library behind the protocol raises
            fault = _cause(error)
            pause = min(FIRST_PAUSE * 2**tries, LONGEST_PAUSE) * random.uniform(0.5, 1)
            tries += 1
            if tries == TRIES or not _may_pass(fault) or stop.wait(pause):
                kind = MissingObjectError if _is_missing(fault) else NoisycleanError
                # From None: the traceback of `--debug` would quote the address.
                raise kind(f"{without_secrets(address)}: {_in_words(fault, address)}") from None


class _RemoteStream(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """fsspec's buffered file, with its cache that reads ahead or none, over requests that are repeated."""

    def __init__(self, address: str, ahead: bool) -> None:
        self._address = address
        self._closing = threading.Event()
        self._asking = threading.Lock()  # reading ahead and reading may ask at once
        self._file: Any = None
        self._has_ranges = True
        self._at_once = BLOCK
        filesystem, path = persist(lambda: _locate(address), address)
        self._state = persist(lambda: _state(filesystem, path), address)
        super().__init__(
            filesystem,
            path,
            block_size=BLOCK,
            cache_type="background" if ahead else "none",
            cache_options={"maxblocks": _KEPT} if ahead else None,
            size=self._state.size,
        )
        self._file = self._persist(self._open)

    def close(self) -> None:
        self._closing.set()
        super().close()
        self._forget()

    def _fetch_range(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to ``end``, or to the end of the object, asked for until all are there."""
        end = min(end, self.size)
        parts: list[bytes] = []
        with self._asking:
            while start < end:
                parts.append(self._persist(partial(self._ask, start, end)))
                start += len(parts[-1])
        return b"".join(parts)  # where it is one, as most often, that itself

    def _persist(self, action: Callable[[], T]) -> T:
        return persist(action, self._address, self._closing)

    def _ask(self, start: int, end: int) -> bytes:
        """Some bytes from ``start`` on, one at least, as one request gives them."""
        try:
            if self._file is None:
                self._compare()
                self._file = self._open()
            self._go_to(start)
            data = cast("bytes", self._file.read(min(end - start, self._at_once)))
            if not data:
                raise ConnectionError("ended early")
        except BaseException as error:
            self._forget()
            if self._has_ranges and isinstance(error, ValueError):  # so fsspec says that an HTTP server has none
                self._has_ranges = False
                return self._ask(start, end)
            self._at_once = max(self._at_once // 2, _SMALLEST)
            raise
        self._at_once = min(self._at_once + self._at_once // 8, BLOCK)
        return data[: end - start]

    def _open(self) -> Any:
        if self._has_ranges:
            return self.fs.open(self.path, cache_type="none")
        return self.fs.open(self.path, block_size=0)

    def _go_to(self, start: int) -> None:
        if self._has_ranges:
            self._file.seek(start)
            return
        if self._file.tell() > start:
            self._file = self._open()
        while (at := self._file.tell()) < start:
            if not self._file.read(min(start - at, BLOCK)):
                raise ConnectionError("ended early")

    def refuse_changed(self) -> None:
        self._persist(self._compare)

    def _compare(self) -> None:
        if _state(self.fs, self.path) != self._state:
            raise NoisycleanError(f"{without_secrets(self._address)}: {_CHANGED}")

    def _forget(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):  # it may be what failed
                file.close()


def _locate(address: str) -> tuple[Any, str]:
    """The filesystem of an address, and the path there.

    Raises:
        NoisycleanError: the address is a record that lacks its secret.
    """
    if HIDDEN in address:
        raise NoisycleanError(f"{address}: was recorded without the secret in it; name the shards again")
    options: dict[str, Any] = {"use_listings_cache": False}  # what is there may change while we run
    protocol = get_protocol(address)
    if protocol in _WEB:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
        options["client_kwargs"] = {"timeout": timeout}
        for one in _WEB:  # as fsspec does, which takes what is configured for either
            options["client_kwargs"] |= config.conf.get(one, {}).get("client_kwargs", {})
    filesystem, path = url_to_fs(address, **options)
    return filesystem, path


def _state(filesystem: Any, path: str) -> ObjectState:
    # The library for hf:// answers from what it has listed before, and tells a version only where it is asked for more.
    info = filesystem.info(path, **({"refresh": True, "expand_info": True} if filesystem.protocol == "hf" else {}))
    if info["type"] != "file":
        raise FileNotFoundError
    if info["size"] is None:
        address = without_secrets(filesystem.unstrip_protocol(path))
        raise NoisycleanError(f"{address}: the server does not say how large it is; download it")
    return ObjectState(info["size"], next((str(info[name]) for name in _VERSION if info.get(name)), ""))


def _cause(error: Exception) -> BaseException:
    """What went wrong: fsspec calls all that fails when it asks an HTTP server about a file a missing file."""
    cause: BaseException = error
    while isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    return cause


def _may_pass(error: BaseException) -> bool:
    """Whether the same may succeed if it is asked for again."""
    if (status := _status(error)) is not None:
        return status >= 500 or status in _MAY_PASS
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, TypeError, LookupError)
    return not isinstance(error, (*lasting, AttributeError, NotImplementedError)) and not _lacks_credentials(error)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, wherever the libraries keep it."""
    at: BaseException | None = error
    while at is not None:
        response = getattr(at, "response", None)
        found = [getattr(at, "status", None), getattr(response, "status_code", None)]
        if isinstance(response, dict):
            found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        if (status := next((one for one in found if isinstance(one, int)), None)) is not None:
            return status
        at = at.__cause__
    code = getattr(error, "code", None)  # gcsfs; not of the causes, where aiohttp has one for a body that is cut short
    return code if isinstance(code, int) else None


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) or _status(error) in (404, 410)


def _lacks_credentials(error: BaseException) -> bool:
    return "Credential" in type(error).__name__  # of botocore, of google.auth


def _in_words(error: BaseException, address: str) -> str:
    """What went wrong, and what to do."""
    protocol, status = get_protocol(address), _status(error)
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'noisyclean[{extra}]'" if extra else f"install what fsspec needs for {protocol}://"
        return f"a package for {protocol}:// is missing; {remedy}"
    if protocol not in available_protocols():
        return f"no store is known by {protocol}://; fsspec's are s3, gs, https, hf and others"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "no permission; check the credentials, and what they are allowed"
    if _is_missing(error):
        return "no such object; check the address"
    if _lacks_credentials(error):
        return f"no credentials found; set them as the library for {protocol}:// takes them"
    if status == 412:
        return _CHANGED
    if status is not None:
        return f"the server answered with HTTP status {status}; repeat the command later"
    if isinstance(error, TimeoutError):
        return "the server does not answer; repeat the command later"
    return f"cannot be reached ({type(error).__name__}); check the address and the network, and repeat the command"
