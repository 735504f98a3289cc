"""A store that forgets what was used longest ago once it is full."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """Values up to a number of bytes together. To be used by one thread.

    Args:
        max_bytes: what all values may take; a larger single value is not kept.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.nbytes = max_bytes, 0
        self.hits, self.misses = 0, 0
        self.entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """The value, now the one used last."""
        if key not in self.entries:
            self.misses += 1
            return None
        self.hits += 1
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def put(self, key: Hashable, value: Value, nbytes: int) -> None:
        """Keep a value that takes `nbytes`."""
        if key in self.entries:
            self.nbytes -= self.entries.pop(key)[1]
        if nbytes > self.max_bytes:
            return
        self.entries[key] = (value, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self.entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self.nbytes = 0
