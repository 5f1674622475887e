"""Reading one shard: a tar of samples, streamed from start to end, never unpacked to disk.

Whatever is in the tar, every sample comes out exactly once: whole, or with a ``fault`` that says why it cannot be used.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self, cast

from noisyclean.corpus.locate import Shard, is_address
from noisyclean.errors import NoisycleanError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
CAPTION_EXTENSIONS = ("txt", "caption", "text")
METADATA_EXTENSION = "json"

MAX_MEMBER_BYTES = 256 * 2**20
"""A larger member is passed over unread: no picture or caption is this large, and memory must stay bounded."""

MAX_INFLATION = 100
"""A compressed tar that inflates to so many times its size is damaged: pictures hardly do at all."""
INFLATED_UNASKED = 64 * 2**20
"""Bytes up to which the tar may do so: a few captions can be all alike."""
_GZIP = b"\x1f\x8b"

MAX_HEADER_BYTES = 2**20
"""A longer name, or a longer list of attributes, is damage."""
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_MORE_HOLES = 482
"""Where a header says that more of its kind follow."""

IMAGE_FAULTS = ("no image", "empty image")
"""The faults of a sample that lacks nothing but its picture."""

# webdataset's rule: the key is the path up to the first dot of the file name, the extension all that follows it.
_MEMBER_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]+)$", re.DOTALL)

# What a broken archive raises; the last three tarfile does not mean to. Any other OSError is a fault of disk or
# network: the samples may well be there.
DAMAGE = (
    tarfile.TarError,
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
)


@dataclass(slots=True)
class SampleMembers:
    """The members of one sample as they lie in the tar: extension (lower case) → bytes, in tar order."""

    key: str
    index: int
    members: dict[str, bytes] = field(default_factory=dict)
    fault: str | None = None


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add one plain file, without owner or time: the same bytes at every run."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@dataclass(slots=True)
class Sample:
    """One image–text pair, not yet decoded. ``fault`` says why it is unreadable; then image or caption may be None."""

    shard: str
    key: str
    index: int
    image: bytes | None
    caption: str | None
    uid: str | None = None
    url: str | None = None
    width: int | None = None
    height: int | None = None
    fault: str | None = None


class _StrictHeader(tarfile.TarInfo):
    """Headers as tarfile reads them, but for what is broken or hostile.

    tarfile takes a broken header after the first member for the end of the archive: here it is damage. So is one that
    goes on and on: a long name, or a list of a sparse member's holes, is kept in memory whole.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError("negative size")
        if header.type in _LONG_HEADERS and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"header over {MAX_HEADER_BYTES >> 20} MiB")
        if header.type == tarfile.GNUTYPE_SPARSE and buf[_MORE_HOLES]:
            raise tarfile.ReadError("sparse member in many parts")
        return header

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError("sparse member in many parts")

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end-of-archive mark; not in the stubs
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from None


class _TarStream:
    """The bytes of a tar, inflated where it is compressed, for tarfile, which is kept from going on and on.

    It would read at the end of the stream for as long as a member claims to go on, and inflate a bomb to pass it over.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._raw = _Counted(stream)
        compressed = self._raw.peek(len(_GZIP)) == _GZIP
        self._stream = gzip.GzipFile(fileobj=cast("IO[bytes]", self._raw)) if compressed else self._raw
        self._count = 0
        self._reads_at_end = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._count += len(data)
        if self._count > max(MAX_INFLATION * self._raw.count, INFLATED_UNASKED):
            raise tarfile.ReadError(f"inflates to over {MAX_INFLATION} times its size")
        self._reads_at_end = 0 if data else self._reads_at_end + 1
        if self._reads_at_end > 8:
            raise EOFError("unexpected end of data")
        return data


class _Counted:
    """A stream that knows how many bytes were read of it, and can be looked into."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._ahead = b""
        self.count = 0

    def peek(self, size: int) -> bytes:
        """The first bytes, which will be read again."""
        while len(self._ahead) < size and (more := self._stream.read(size - len(self._ahead))):
            self._ahead += more
        return self._ahead

    def read(self, size: int) -> bytes:
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        data = data or self._stream.read(size)
        self.count += len(data)
        return data


class ShardReader:
    """Iterate over the samples of one shard.

    Reading never raises for what is *in* the tar. If the tar itself ends early or is no tar at all, iteration ends
    after the samples before the damage, and ``damage`` says what was met.

    Raises:
        NoisycleanError: on iteration, when the shard cannot be opened at all, or a remote one changes meanwhile.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.damage: str | None = None

    def members(self) -> Iterator[SampleMembers]:
        """The samples as raw members, all extensions."""
        keys: set[str] = set()
        current: SampleMembers | None = None
        count = 0
        for key, extension, data in self._read_tar():
            if current is None or key != current.key or extension in current.members:
                if current is not None:
                    yield current
                current = SampleMembers(key, count, fault="duplicate key" if key in keys else None)
                keys.add(key)
                count += 1
            if isinstance(data, str):
                current.fault = current.fault or data
            else:
                current.members[extension] = data
        if current is not None:
            yield current

    def __iter__(self) -> Iterator[Sample]:
        for raw in self.members():
            yield to_sample(self.shard.name, raw)

    def _read_tar(self) -> Iterator[tuple[str, str, bytes | str]]:
        """Key, extension and content of each member, or why its content cannot be had."""
        with open_shard(self.shard) as stream:
            try:
                with open_tar(stream) as tar:
                    for member in tar:
                        tar.members = []  # type: ignore[attr-defined]  # or tarfile would keep them all
                        named = split_name(member.name) if member.isreg() else None
                        if named is None:
                            continue
                        key, extension = named
                        if member.size > MAX_MEMBER_BYTES:
                            yield key, extension, f"member over {MAX_MEMBER_BYTES >> 20} MiB"
                            continue
                        try:
                            content = tar.extractfile(member)
                            yield key, extension, content.read() if content is not None else b""
                        except DAMAGE:
                            yield key, extension, "cut off with its shard"
                            raise
            except DAMAGE as error:
                self.damage = f"damaged tar: {str(error) or type(error).__name__}"
            except OSError as error:
                raise NoisycleanError(f"{self.shard}: reading failed ({error}); repeat the command") from error
            if is_address(self.shard.path):  # what looks like damage may be the rest of another object
                from noisyclean.corpus.remote import refuse_changed

                refuse_changed(stream)


def open_tar(stream: IO[bytes], *, seek: bool = False) -> tarfile.TarFile:
    """A tar, compressed by gzip or not, whose reading ends whatever is in it.

    Args:
        seek: pass over what is not asked for without reading it, where the tar is not compressed.

    Raises:
        one of ``DAMAGE``: here or as it is read on, that it is broken.
    """
    if seek:
        seek = stream.read(len(_GZIP)) != _GZIP
        stream.seek(0)
    return tarfile.open(
        fileobj=stream if seek else cast("IO[bytes]", _TarStream(stream)),
        mode="r:" if seek else "r|",
        errors="backslashreplace",  # a name that is not UTF-8 becomes a key that can be written to tables
        tarinfo=_StrictHeader,
    )


def split_name(name: str) -> tuple[str, str] | None:
    """A member's name → its sample's key, and the extension in lower case; None: it is of no sample."""
    found = _MEMBER_NAME.match(name)
    return None if found is None else (found.group(1).removeprefix("./"), found.group(2).lower())


def open_shard(shard: Shard) -> IO[bytes]:
    """Open a local or remote shard for reading.

    Raises:
        NoisycleanError: it is not there or may not be read.
    """
    if is_address(shard.path):
        from noisyclean.corpus.remote import open_remote

        return open_remote(shard.path)
    try:
        return Path(shard.path).open("rb")
    except OSError as error:
        raise NoisycleanError(f"{shard.path}: cannot open the shard ({error.strerror or error})") from error


def to_sample(shard: str, raw: SampleMembers) -> Sample:
    """Interpret the members of a sample as an image, a caption and img2dataset's metadata."""
    metadata = read_metadata(raw.members.get(METADATA_EXTENSION))
    image = raw.members.get(image_extension(raw.members) or "")
    caption, fault = _read_caption(raw.members, metadata)
    if image is None:
        fault = IMAGE_FAULTS[0]
    elif not image:
        fault = IMAGE_FAULTS[1]
    return Sample(
        shard=shard,
        key=raw.key,
        index=raw.index,
        image=image,
        caption=caption,
        uid=_text(metadata.get("uid")),
        url=_text(metadata.get("url")),
        width=_count(metadata.get("width")),
        height=_count(metadata.get("height")),
        fault=raw.fault or fault,
    )


def image_extension(members: Iterable[str]) -> str | None:
    """Which of a sample's extensions is its picture: the first plain one (``jpg``), else the first (``img.png``).

    A depth map or a mask (``depth.png``) often lies beside the picture, and before it.
    """
    pictures = [extension for extension in members if is_image(extension)]
    return next((one for one in pictures if one in IMAGE_EXTENSIONS), pictures[0] if pictures else None)


def is_image(extension: str) -> bool:
    """Whether a member's extension (``jpg``, ``img.png``) names a picture."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def read_metadata(data: bytes | None) -> dict[str, Any]:
    """The json member as a dict; a broken one counts as none, since image and caption can still be used."""
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_caption(members: dict[str, bytes], metadata: dict[str, Any]) -> tuple[str | None, str | None]:
    for extension in CAPTION_EXTENSIONS:
        if extension in members:
            try:
                caption = members[extension].decode("utf-8")
            except UnicodeDecodeError:
                return members[extension].decode("utf-8", errors="replace"), "caption is not UTF-8"
            break
    else:
        captions = metadata.get("captions")
        value = metadata.get("caption", captions[0] if isinstance(captions, list) and captions else None)
        if not isinstance(value, str):
            return None, "no caption"
        caption = _encodable(value)
    caption = caption.strip()
    return caption, None if caption else "empty caption"


def _text(value: object) -> str | None:
    return _encodable(str(value)) if isinstance(value, str | int) and value != "" else None


def _encodable(text: str) -> str:
    """``text`` without lone surrogates: json may hold half an emoji, tables and files may not."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None
