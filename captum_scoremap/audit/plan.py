"""Which images make which shard and which batch: fixed before the first one is read.

How a batch is put together can change the last bits of a result, so that it must not depend on where an
earlier run stopped or on how many workers there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """The order of the work.

    Attributes:
        length: Number of images in the source.
        limit: Number of images to take from it, evenly spread; None takes all.
        batch_size: Images that go through the model together.
        shard_size: Images whose results are written together; a kill costs at most these.

    Example:
        >>> plan = Plan(length=10, limit=5, batch_size=2, shard_size=4)
        >>> [list(plan.batches(shard)) for shard in plan.shards]
        [[[0, 2], [4, 6]], [[8]]]
    """

    length: int
    limit: int | None = None
    batch_size: int = 16
    shard_size: int = 128

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}.")

    @property
    def count(self) -> int:
        """Number of images."""
        return self.length if self.limit is None else min(self.limit, self.length)

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(-(-self.count // self.shard_size))

    def size(self, shard: int) -> int:
        """Return the number of images of a shard."""
        return min(self.shard_size, self.count - shard * self.shard_size)

    def batches(self, shard: int) -> Iterator[list[int]]:
        """Positions in the source of each batch of a shard."""
        start = shard * self.shard_size
        end = start + self.size(shard)
        for first in range(start, end, self.batch_size):
            places = range(first, min(first + self.batch_size, end))
            yield [place * self.length // self.count for place in places]
