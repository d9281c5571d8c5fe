"""Images are read while the model computes: a map whose threads work a little ahead, and no further."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int, threads: int = 1
) -> Generator[Result, None, None]:
    """Like `map`, in the same order, but the next results are made while the caller is busy with one.

    Close it, or take all that it yields: its threads end then.

    Args:
        function: What makes a result of an item.
        items: The items; taken in the caller's thread, when their turn comes.
        ahead: How many results may be finished or in progress that the caller has not seen.
        threads: How many are made at a time.

    Yields:
        The results. What ``function`` raises is raised when its turn comes.

    Example:
        >>> list(map_ahead(str, range(3), ahead=2))
        ['0', '1', '2']
    """
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            waiting: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(items, ahead))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
