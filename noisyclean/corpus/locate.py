"""Which shards the user means: a folder, a glob, a brace pattern, an ``@list``, or addresses fsspec knows."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from noisyclean.errors import UsageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

ShardSpec: TypeAlias = str | Path | Sequence[str | Path]
"""What every command takes as SHARDS; several specs are joined."""

HIDDEN = "***"
"""What stands in a message or a record for what was secret in an address."""

# A password is secret; in the address of a web server, so is a user's name alone, which may be a token. Of other stores
# it may be a part of the place (abfs://container@account).
_SIGN_IN = re.compile(r"(?<=://)[^/]*:[^/]*@|(?:(?<=http://)|(?<=https://))[^/]*@")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of samples. ``name`` is its identity in every table; ``path`` is where it lies now.

    As a string, it is that place as it may be shown.
    """

    name: str
    path: str

    def __str__(self) -> str:
        return without_secrets(self.path)


def find_shards(spec: ShardSpec) -> list[Shard]:
    """Resolve ``spec`` to the shards it names, sorted by name.

    A shard's name is its file name without ``.tar``. Where two files would share a name, as many parent folders
    as it takes are put before each of them, so that (shard, key) stays an identity.

    Raises:
        UsageError: nothing matches, or one file is named twice.
    """
    specs = [spec] if isinstance(spec, str | Path) else list(spec)
    paths = [path for one in specs for path in _expand(str(one))]
    for path, count in Counter(paths).items():
        if count > 1:
            raise UsageError(f"{without_secrets(path)}: named {count} times in SHARDS; name each shard once")
    return sorted((Shard(name, path) for name, path in _names(paths)), key=lambda shard: shard.name)


def absolute_paths(shards: Iterable[Shard]) -> list[str]:
    """Where the shards lie, in words that hold whatever the working directory: what a record of them keeps.

    What is secret in an address is not in it; shards that had any must be named again.
    """
    return [str(shard) if is_address(shard.path) else str(Path(shard.path).absolute()) for shard in shards]


def is_address(path: str) -> bool:
    """Whether it is an address that fsspec knows, and no path of this machine."""
    return "://" in path


def without_secrets(path: str) -> str:
    """A path or address as it may be shown and recorded: ``HIDDEN`` stands for who signs in and what a query says."""
    place, query = split_query(path)
    return _SIGN_IN.sub(f"{HIDDEN}@", place) + (f"?{HIDDEN}" if query else "")


def split_query(address: str) -> tuple[str, str]:
    """An address without its query, and that: where addresses are signed, or carry tokens. ``""``: there is none.

    A path of this machine has none. But for web servers, a question mark may be a sign of a glob.
    """
    place, mark, query = address.partition("?")
    is_query = bool(mark) and is_address(address) and ("=" in query or "http" in place.partition("://")[0])
    return (place, query) if is_query else (address, "")


def _expand(spec: str) -> list[str]:
    if spec.startswith("@"):
        return _expand_list(spec[1:])
    if is_address(spec) and HIDDEN in spec:
        raise UsageError(f"{spec}: was recorded without the secret in it; name SHARDS again")
    if "{" in spec:
        from braceexpand import braceexpand

        try:
            expanded = list(braceexpand(spec))
        except ValueError as error:
            raise UsageError(f"{without_secrets(spec)}: unbalanced braces in the shard pattern") from error
        if expanded != [spec]:
            return _present(spec, [path for one in expanded for path in _expand_globbed(one)])
    if is_address(spec):
        return _expand_remote(spec)
    return _expand_local(spec)


def _expand_globbed(path: str) -> list[str]:
    return _expand(path) if _is_glob(path) else [path]


def _present(spec: str, paths: list[str]) -> list[str]:
    missing = [path for path in paths if not is_address(path) and not Path(path).is_file()]
    if len(missing) == len(paths):
        raise UsageError(f"{spec}: no such shards (the first would be {paths[0]}); check the path and the range")
    if missing:
        # The pattern is not quoted: there may be a secret in another of its addresses.
        raise UsageError(
            f"{missing[0]}: no such shard, nor {len(missing) - 1} more of the {len(paths)} that its pattern names; "
            "correct the range, or use a glob to take what is there"
        )
    return paths


def _expand_list(listing: str) -> list[str]:
    entries = [line.strip() for line in _read_list(listing).splitlines()]
    entries = [one for one in entries if one and not one.startswith("#")]
    if not entries:
        raise UsageError(
            f"{without_secrets(listing)}: the list of shards is empty; put one shard path or pattern on each line"
        )
    # Relative entries are relative to the list, so that a list travels with its shards.
    anchored = [one if is_address(one) or Path(one).is_absolute() else _beside(listing, one) for one in entries]
    return [path for one in anchored for path in _expand(one)]


def _beside(listing: str, entry: str) -> str:
    if is_address(listing):
        return posixpath.join(posixpath.dirname(split_query(listing)[0]), entry)
    return str(Path(listing).parent / entry)


def _read_list(listing: str) -> str:
    from noisyclean.corpus.remote import read_remote

    try:
        data = read_remote(listing) if is_address(listing) else Path(listing).read_bytes()
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{without_secrets(listing)}: cannot read the list of shards ({_why(error)})") from error


def _expand_local(spec: str) -> list[str]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        found = sorted(str(one) for one in path.rglob("*") if one.name.endswith(TAR_SUFFIXES) and one.is_file())
        if not found:
            raise UsageError(f"{spec}: no .tar files in this folder; give the folder that holds the shards")
        return found
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
    matches = [one for one in anchor.glob(pattern) if one.is_file()] if _is_glob(spec) else []
    # Beside the tars of img2dataset lie its Parquet and json sidecars: `shards/*` means the tars, if there are any.
    found = sorted(str(one) for one in matches if one.name.endswith(TAR_SUFFIXES)) or sorted(map(str, matches))
    if not found:
        raise UsageError(
            f"{spec}: matches no shards; give a folder of .tar files, a glob, "
            "a brace pattern such as 'shards/{00000..00099}.tar' (quoted), or @list.txt"
        )
    return found


def _expand_remote(spec: str) -> list[str]:
    from noisyclean.corpus.remote import list_remote

    if split_query(spec)[0].endswith(TAR_SUFFIXES) and not _is_glob(spec):
        return [spec]  # taken at its word: many stores forbid listing
    pattern = spec if _is_glob(spec) else posixpath.join(spec, "**")
    found = [one for one in list_remote(pattern) if one.endswith(TAR_SUFFIXES)]
    if not found:
        raise UsageError(f"{without_secrets(spec)}: matches no .tar shards")
    return found


def _names(paths: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Each path with the shortest tail of it that no other path shares."""
    # Names are shown, and are file names: of an address, no more is in them than of its place.
    places = {path: _SIGN_IN.sub("", split_query(path)[0]) for path in paths}
    parts = {path: _stem(place).replace("\\", "/").split("/") for path, place in places.items()}
    depth = dict.fromkeys(paths, 1)
    while True:
        names = {path: "/".join(parts[path][-depth[path] :]) for path in paths}
        uses = Counter(names.values())
        shared = [path for path in paths if uses[names[path]] > 1]
        if not shared:
            return ((names[path], path) for path in paths)
        if all(depth[path] >= len(parts[path]) for path in shared):
            one, other = map(without_secrets, shared[:2])
            raise UsageError(f"{one} and {other}: two shards of the same name; rename one of them")
        for path in shared:
            depth[path] += 1


def _stem(path: str) -> str:
    for suffix in sorted(TAR_SUFFIXES, key=len, reverse=True):
        if path.endswith(suffix):
            return path[: -len(suffix)]
    return path


def _is_glob(spec: str) -> bool:
    return any(sign in split_query(spec)[0] for sign in "*?[")


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
