"""Taking a few samples out of a shard by their keys: only the headers of the tar are read, and what is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress

from noisyclean.corpus.locate import Shard
from noisyclean.corpus.shards import (
    DAMAGE,
    MAX_MEMBER_BYTES,
    SampleMembers,
    image_extension,
    open_shard,
    open_tar,
    split_name,
)


def pick_pictures(shard: Shard, keys: Collection[str]) -> dict[str, bytes]:
    """The pictures of the named samples, undecoded. What is not there, or lies behind damage, is left out.

    Of a key that comes twice in a shard the first sample is meant: the other one is unreadable.

    Raises:
        NoisycleanError: the shard cannot be opened.
    """
    found = {}
    for sample in _pick(shard, set(keys)):
        extension = image_extension(sample.members)
        if extension is not None:
            found[sample.key] = sample.members[extension]
    return found


def _pick(shard: Shard, keys: set[str]) -> Iterator[SampleMembers]:
    """The samples of these keys in the order of the tar, which is left when the last of them is had."""
    sample: SampleMembers | None = None
    with (
        open_shard(shard) as stream,
        suppress(*DAMAGE),
        open_tar(stream, seek=True) as tar,
    ):
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # or tarfile would keep them all
            named = split_name(member.name) if member.isreg() else None
            if named is None:
                continue
            key, extension = named
            if sample is not None and (key != sample.key or extension in sample.members):
                yield sample
                sample = None
                if not keys:
                    return
            if sample is None and key in keys:
                keys.remove(key)
                sample = SampleMembers(key, 0)
            if sample is not None and key == sample.key and member.size <= MAX_MEMBER_BYTES:
                content = tar.extractfile(member)
                sample.members[extension] = content.read() if content is not None else b""
    if sample is not None:
        yield sample
