"""One function over many items in several processes, in order, whatever ends one of them.

`concurrent.futures.ProcessPoolExecutor` and `multiprocessing.Pool` send the results of all processes through one pipe
whose writing end their parent holds as well: a process that is killed in the middle of a long result leaves the parent
waiting for the rest of it for ever. Here each process has a pipe of its own, which ends when the process does.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, cycle, islice
from multiprocessing.connection import Connection
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


class WorkerDied(Exception):
    """A process ended before its work was done: out of memory, or killed."""


class _Worker:
    """A process, the pipe to it, and what came back through that."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]):
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end, make), daemon=True)
        self.process.start()
        other_end.close()
        self.expected = 0
        self.results: deque[tuple[Any, Exception | None]] = deque()

    def send(self, item: Any) -> None:
        try:
            _send(self.pipe, item)
        except OSError as error:
            raise WorkerDied from error
        self.expected += 1

    def receive(self) -> None:
        try:
            self.results.append(_receive(self.pipe))
        except (EOFError, OSError) as error:  # between two results, or within one
            raise WorkerDied from error
        self.expected -= 1

    def end(self) -> None:
        self.process.kill()  # it holds nothing that needs a farewell, and may not have come to unblock SIGTERM
        self.process.join()
        self.pipe.close()


def map_in_processes[T, R](make: Callable[[], Callable[[T], R]], items: Iterable[T], *, workers: int) -> Generator[R]:
    """Yields the function that ``make()`` gives in each process for every item, in the order of ``items``.

    At most two items a process are on their way at any time, so memory does not grow with their number. Processes are
    spawned: a script that calls this needs the usual ``if __name__ == "__main__"``. Whatever ends this generator, it
    leaves no process behind, and processes end by themselves where this one is killed.

    Args:
        make: pickled; called once in each process.
        workers: processes; no more than there are items are started.

    Raises:
        WorkerDied: a process ended.
        Exception: what the function raised for the item whose turn it is, with the traceback from there as a note.
    """
    items = iter(items)
    # These are at hand before the first process starts: sending waits for a process that is still importing.
    first = list(islice(items, workers))
    pool: list[_Worker] = []
    turns: deque[_Worker] = deque()
    try:
        with _signals_blocked():
            for _ in first:
                pool.append(_Worker(make))
        for item, worker in zip(chain(first, items), cycle(pool), strict=False):
            worker.send(item)
            turns.append(worker)
            if len(turns) >= 2 * len(pool):
                yield _next_result(turns.popleft(), pool)
        while turns:
            yield _next_result(turns.popleft(), pool)
    finally:
        for worker in pool:
            worker.end()


# A connection's own send and recv pickle through a view of a buffer in memory; where a signal handler raises in the
# middle of that, CPython 3.12 frees the buffer before the view and crashes.
def _send(pipe: Connection, message: Any) -> None:
    pipe.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


def _next_result(worker: _Worker, pool: list[_Worker]) -> Any:
    """The oldest result of ``worker``; takes in those of the others that come meanwhile, so that they go on."""
    while not worker.results:
        awaited = {other.pipe: other for other in pool if other.expected}
        for pipe in multiprocessing.connection.wait(list(awaited)):
            awaited[pipe].receive()  # type: ignore[index]
    result, error = worker.results.popleft()
    if error is not None:
        raise error
    return result


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Around the start of a process, which inherits it: until it is prepared, a signal to the whole group would end it
    with a traceback; and this process could be stopped between starting one and knowing of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """What a process does until its pipe ends."""
    # Ctrl-C reaches the whole foreground group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(pipe, items), daemon=True).start()
    function = None
    while True:
        item = items.get()
        try:
            function = function or make()
            message = function(item), None
        except Exception as error:
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            message = None, error
        try:
            _send(pipe, message)
        except OSError:  # the parent is gone
            os._exit(1)


def _take_in(pipe: Connection, items: queue.SimpleQueue[Any]) -> None:
    """Takes items off the pipe at once: a parent that waits to send cannot take results. Ends the process with it."""
    try:
        while True:
            items.put(_receive(pipe))
    except (EOFError, OSError):  # the parent has no more for it, or was killed
        pass
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)
