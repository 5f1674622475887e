"""Hashes that name a pair, a caption and a picture: the same everywhere, on every machine, in any order."""

from __future__ import annotations

import hashlib


def pair_id(shard: str, key: str) -> int:
    """A signed 64-bit hash of a pair's identity (shard, key)."""
    return _hash(f"{shard}\0{key}".encode())


def caption_id(caption: str) -> int:
    """A signed 64-bit hash of a caption, blind to case and spacing."""
    return _hash(" ".join(caption.casefold().split()).encode("utf-8", errors="surrogatepass"))


def image_id(data: bytes) -> int:
    """A signed 64-bit hash of a picture's encoded bytes."""
    return _hash(data)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
