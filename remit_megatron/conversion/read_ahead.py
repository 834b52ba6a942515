"""Reading the next weight while one is written."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor

_END = object()


def one_ahead[T](items: Iterable[T]) -> Generator[T]:
    """Yields ``items``; each is made in a thread while its predecessor is worked on. Two of them exist at a time.

    Raises:
        Exception: what making an item raised, when its turn comes.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, iterator, _END)
            yield item  # type: ignore[misc]
            del item  # or there would be three
