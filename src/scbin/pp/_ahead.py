"""Row blocks beside each other: one is read and several are worked on, while the caller uses what is done."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from scbin.encoding import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

Item = TypeVar("Item")
Made = TypeVar("Made")

MOST = 6  # blocks worked on at a time, which bounds the memory; more threads than that share the rows of each block


def workers() -> tuple[int, int]:
    """Return how many blocks are worked on at a time, and with how many threads each."""
    threads = kernels.n_threads()
    blocks = min(threads, MOST)
    return blocks, threads // blocks


def held(blocks: int) -> int:
    """Return how many items `in_order` and `ahead` together hold at a time."""
    return 2 * blocks + 2


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Make the next item in a thread while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="scbin-read") as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


def in_order(work: Callable[[Item], Made], items: Iterator[Item], blocks: int) -> Iterator[Made]:
    """Yield `work(item)` of each item, in order; the next ones are worked on in threads meanwhile.

    An error is raised where its item would have been yielded.
    """
    if blocks == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(blocks, thread_name_prefix="scbin-block") as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * blocks:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # an error, or a caller who has seen enough
            for task in waiting:
                task.cancel()
