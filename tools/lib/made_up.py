"""Files whose content is made up as it is read, for layers of gigabytes."""

import random

KIB, MIB = 1 << 10, 1 << 20
EPOCH = 1750000000


def some(source, size):
    """A slice of `source`, from anywhere in it."""
    start = random.randrange(len(source) - size)
    return memoryview(source)[start : start + size]


class Pieces:
    """A file without end, of what `piece` gives each time."""

    def __init__(self, piece):
        self.piece, self.rest = piece, memoryview(b"")

    def read(self, size):
        parts = []
        while size:
            self.rest = self.rest or memoryview(self.piece())
            parts.append(self.rest[:size])
            self.rest = self.rest[size:]
            size -= len(parts[-1])
        return b"".join(parts)
