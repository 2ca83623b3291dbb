#!/usr/bin/python3
"""Plays back which chunks were waited for, for several ways to read around them.

usage: around_table.py TITLE LOG

LOG is ublk-server's with `RUST_LOG=ublk_server::engine=debug`. Chunks that are read
around count as there at once.
"""

import re
import sys

MISS = re.compile(r"not in memory .*?request=(\d+)-(\d+).*? chunk=(\d+)")
JOINED = re.compile(r"waits for a read under way .*?request=(\d+)-(\d+).*? chunk=(\d+)")
# Numbers of requests that nobody waits for: the background's, and what is read for a mount.
UNASKED = (0, (1 << 40) - 1)


def read(path):
    """Chunks that were there without being asked for; and those that were asked for, in
    order: which, and by which request."""
    there, asked = set(), []
    with open(path) as file:
        for line in file:
            line = re.sub(r"\x1b\[[0-9;]*m", "", line)
            found = MISS.search(line) or JOINED.search(line)
            if not found:
                continue
            layer, request, chunk = map(int, found.groups())
            if request in UNASKED:
                there.add((layer, chunk))
            else:
                asked.append(((layer, chunk), (layer, request)))
    return there, asked


def aligned(size):
    """What lies in the same aligned group of so many chunks."""
    return lambda streams, layer, chunk, missed: range(chunk // size * size, (chunk // size + 1) * size) if missed else ()


def following(most):
    """Streams: who goes on where another ended gets more and more of what follows, as the
    kernel's own reading ahead does."""

    def ahead(streams, layer, chunk, missed):
        known = streams.setdefault(layer, [])
        for stream in known:
            following, width, end = stream
            if chunk == following or chunk < end and chunk >= following:
                width = min(most, width * 2)
                stream[:] = chunk + 1, width, max(end, chunk + 1 + width)
                return range(chunk + 1, stream[2])
        known.insert(0, [chunk + 1, 1, chunk + 1])
        del known[32:]
        return ()

    return ahead


def play(there, asked, around):
    there, streams, waits, read = set(there), {}, set(), 0
    for (layer, chunk), request in asked:
        missed = (layer, chunk) not in there
        if missed:
            waits.add(request)
        for one in (chunk, *around(streams, layer, chunk, missed)):
            if (layer, one) not in there:
                there.add((layer, one))
                read += 1
    return len(waits), read


def main(title, log):
    there, asked = read(log)
    if not asked:
        sys.exit(f"{log}: nothing was waited for")
    ways = [("nothing", lambda *_: ())]
    ways += [(f"aligned groups of {size}", aligned(size)) for size in (2, 4, 8)]
    ways += [(f"what follows, up to {most}", following(most)) for most in (2, 4, 8)]
    base = None
    print(f"\n**{title}**\n\n| read around | waits | chunks read |\n|---|---|---|")
    for name, around in ways:
        waits, read_ = play(there, asked, around)
        base = base or (waits, read_)
        print(f"| {name} | {waits} ({waits / base[0]:.2f}) | {read_} ({read_ / base[1]:.2f}) |")


if len(sys.argv) != 3:
    sys.exit(__doc__)
main(*sys.argv[1:])
