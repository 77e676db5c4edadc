"""Making ready what comes next while something else is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same endless items; a thread gets `count` of them before they are asked for.

    An error of `items` is raised when it is the turn of the item that it came for.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="jupiter-ahead")
    try:
        coming = deque(pool.submit(next, items) for _ in range(count))
        while True:
            item = coming.popleft().result()
            coming.append(pool.submit(next, items))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
