"""A few threads for work that leaves the interpreter: hashing, reads, writes and downloads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORTH_IT = 8 << 20  # bytes; below, starting threads costs more than they give


def spread(
    work: Callable[[T], R], items: Iterable[T], *, size: int | None = None, ahead: int = 64
) -> Iterator[R]:
    """``work`` of every item, in order, computed by up to four threads, at most ``ahead`` results early.

    ``size`` is the number of bytes in all of it, when known: little work is done without threads. The first
    exception is raised here and what has not begun is dropped.
    """
    threads = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    if size is not None and (size < WORTH_IT or threads == 1):
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
