"""Work in several processes, which may die: a function over many things, or many things read piece by piece.

A process that is killed (by a system short of memory, most often) or hangs is replaced, and does again what it had not
handed over. Only what keeps ending its process is given up.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from noisyclean.errors import NoisycleanError
from noisyclean.files import is_running

T = TypeVar("T")
S = TypeVar("S")

LIVES = 3
"""So often may a process end at the same thing."""
SILENCE = 900.0
"""Seconds without a word after which a reading process is taken to hang. A piece is some hundred pictures."""
THREADS = 16
"""So many requests to a store are under way at a time."""
_AHEAD = 4
"""Pieces a process has ready before they are asked for."""
_DEALT = 2
"""Items a process has been told of: one to read, and one for when it is through, so that it need not wait."""


class LostError(Exception):
    """``item`` has ended its process again and again; the message says how."""

    def __init__(self, item: object, how: str) -> None:
        super().__init__(how)
        self.item = item


def default_workers() -> int:
    """As many worker processes as there are cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[S], T], items: Sequence[S], workers: int, *, ordered: bool = True
) -> Iterator[T]:
    """Yield ``function(item)`` for each item, computed in ``workers`` processes.

    The order is that of the items, or, if not ``ordered``, that in which they are done.

    ``function`` must be picklable (a module-level function or a partial of one), and may be called twice for an item.
    With one worker or one item everything happens in this process.

    Raises:
        NoisycleanError: the processes were killed again and again.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    left = dict(enumerate(items))
    lives = LIVES
    while left:
        # joblib's processes are neither forked, so that no lock of torch's or pyarrow's threads is inherited held, nor
        # do they import the caller's main module, so that a user's script needs no `if __name__ == "__main__"`.
        with parallel_config("loky", initializer=_end_with, initargs=(os.getpid(),)):
            parallel = Parallel(
                n_jobs=workers, return_as="generator" if ordered else "generator_unordered", batch_size=1
            )
        try:
            for position, result in parallel(delayed(_numbered)(function, *one) for one in list(left.items())):
                del left[position]
                lives = LIVES
                yield result
        except TerminatedWorkerError as error:
            lives -= 1
            if not lives:
                raise NoisycleanError(
                    f"worker processes were killed {LIVES} times in a row, maybe by a system short of memory; "
                    "free some, and repeat the command"
                ) from error


def _numbered(function: Callable[[S], T], position: int, item: S) -> tuple[int, T]:
    return position, function(item)


def map_in_threads(function: Callable[[S], T], items: Iterable[S], threads: int = THREADS) -> Iterator[T]:
    """Yield ``function(item)`` for each item in order, computed in threads: for what mostly waits for something else.

    While the caller has one, so many others as there are threads are computed; these are lost if an item cannot be had.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[T]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for one in pending:
                one.cancel()


def read_in_processes(
    read: Callable[[S, int, bool], Iterator[T]],
    items: Sequence[S],
    workers: int,
    *,
    in_order: bool,
    prepare: Callable[[], None],
) -> Iterator[T]:
    """Yield what ``read(item, 0, False)`` yields for each item, computed in ``workers`` processes.

    The pieces of one item come in order; items are interleaved, and dealt out as processes come to an end with theirs.
    They come through sockets, and take neither shared memory (of which a container has little) nor file descriptors.

    Args:
        read: called with an item, how many of its first pieces are not wanted, as they have been handed over by a
            process that died since, and whether the next piece has ended all its processes, and this is its last
            chance. Equal calls must yield equal pieces.
        in_order: whether the processes take turns, which gives the same order at every call; else whoever is ready
            hands over.
        prepare: called once in each process.

    Raises:
        LostError: an item ended its process, or hung, ``LIVES`` times.
    """
    first, others = items[: _DEALT * workers], iter(items[_DEALT * workers :])
    readers = deque(_Reader(read, first[k::workers], others, prepare) for k in range(workers))
    try:
        while readers:
            for reader in _ready([readers[0]] if in_order else readers):
                if (piece := reader.receive()) is not None:
                    yield piece[0]
                if reader.finished:
                    readers.remove(reader)
                    reader.stop()
                elif in_order and piece is not None:
                    readers.rotate(-1)
    finally:
        for reader in readers:
            reader.stop()


def _ready(readers: Sequence[_Reader[S, T]] | deque[_Reader[S, T]]) -> list[_Reader[S, T]]:
    """The processes that have something to hand over, or have died; such as have hung meanwhile are replaced."""
    heard = wait([one.socket for one in readers], SILENCE)
    now = time.monotonic()
    for one in readers:
        if one.socket not in heard and now - one.heard >= SILENCE:
            one.replace(f"hung for {SILENCE:.0f} s")
    return [one for one in readers if one.socket in heard]


_Kind = Literal["piece", "end", "error"]


class _Reader(Generic[S, T]):
    """A process that reads some items, one after another, and what is known of how far it is.

    Attributes:
        socket: where it hands over.
        heard: when it last did, by the monotonic clock.
    """

    def __init__(
        self,
        read: Callable[[S, int, bool], Iterator[T]],
        items: Sequence[S],
        others: Iterator[S],
        prepare: Callable[[], None],
    ) -> None:
        """``others``: what is dealt when the ``items`` come to an end."""
        self._read = read
        self._items = deque(items)
        self._others = others
        self._prepare = prepare
        self._pieces = 0
        self._lives = LIVES
        self._start()

    def _start(self) -> None:
        # The start method is the system's, as for torch's own workers.
        self.socket, theirs = socket.socketpair()
        self._process = get_context().Process(
            target=_hand_over,
            args=(os.getpid(), self._read, self._pieces, self._lives == 1, self._prepare, theirs),
            daemon=True,
        )
        self._process.start()
        theirs.close()  # so that what comes ends with the process
        self.heard = time.monotonic()
        for item in self._items:
            self._deal(item)

    def _deal(self, item: S) -> None:
        with suppress(OSError):  # if it has died, that is noticed when something is to come from it
            _send(item, self.socket)

    @property
    def finished(self) -> bool:
        """Whether all pieces of all items were received."""
        return not self._items

    def receive(self) -> tuple[T] | None:
        """The next piece, alone in a tuple; None if an item has ended, or the process had to be replaced."""
        kind: _Kind
        content: Any
        try:
            kind, content = _receive(self.socket)
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            self.replace(f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}")
            return None
        if kind == "error":
            raise content
        self.heard = time.monotonic()
        self._lives = LIVES
        if kind == "end":
            self._items.popleft()
            self._pieces = 0
            for item in islice(self._others, 1):
                self._items.append(item)
                self._deal(item)
            return None
        self._pieces += 1
        return (content,)

    def replace(self, how: str) -> None:
        """Have another process go on where this one, which has ended ``how``, was."""
        self.stop()
        self._lives -= 1
        if not self._lives:
            raise LostError(self._items[0], how)
        self._start()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self.socket.close()


def _hand_over(
    parent: int,
    read: Callable[[S, int, bool], Iterator[T]],
    pieces: int,
    careful: bool,
    prepare: Callable[[], None],
    to: socket.socket,
) -> None:
    """What a process does until it is ended: read what it is dealt, and hand over meanwhile what was read before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its processes
    _end_with(parent)
    outbox: queue.Queue[tuple[_Kind, Any]] = queue.Queue(_AHEAD)
    sender = threading.Thread(target=_send_all, args=(outbox, to), daemon=True)
    sender.start()
    try:
        prepare()
        while True:
            item = _receive(to)
            for piece in read(item, pieces, careful):
                outbox.put(("piece", piece))
                if careful:
                    outbox.join()  # should the next piece end this process, it is not this one that did
                    careful = False
            pieces, careful = 0, False
            outbox.put(("end", None))
    except NoisycleanError as error:
        outbox.put(("error", error))
    except Exception as error:  # of a kind that may not survive the journey
        unexpected = RuntimeError(f"{type(error).__name__}: {error}")
        unexpected.add_note(traceback.format_exc())
        outbox.put(("error", unexpected))
    sender.join()


def _send_all(outbox: queue.Queue[tuple[_Kind, Any]], to: socket.socket) -> None:
    with suppress(OSError):  # nobody is there any more who would want it
        while True:
            _send(outbox.get(), to)
            outbox.task_done()


def _send(message: object, to: socket.socket) -> None:
    """Send the pickle of a message, and apart from it, uncopied, the contents of its arrays.

    Before these go their sizes, and before them how many there are.
    """
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append)
    parts = [memoryview(head), *(one.raw() for one in arrays)]
    to.sendall(struct.pack(f"{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        to.sendall(part)


def _receive(source: socket.socket) -> Any:
    """One message.

    Raises:
        EOFError: the other end was closed before it was whole.
    """
    (count,) = struct.unpack("Q", _exactly(source, 8))
    sizes = struct.unpack(f"{count}Q", _exactly(source, 8 * count))
    head, *arrays = [_exactly(source, size) for size in sizes]
    return pickle.loads(head, buffers=arrays)


def _exactly(source: socket.socket, size: int) -> memoryview:
    data = np.empty(size, np.uint8).data  # a bytearray would be filled with zeros first
    received = 0
    while received < size:
        more = source.recv_into(data[received:], 0, socket.MSG_WAITALL)
        if not more:
            raise EOFError
        received += more
    return data


def _end_with(parent: int) -> None:
    """Have this process end soon after the one it works for, should that be killed."""

    def watch() -> None:
        while is_running(parent):  # it may be another one that forked this process
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
