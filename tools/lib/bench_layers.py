#!/usr/bin/python3 -B
"""Writes a layer of the device benchmark to standard output, a tar.

usage: bench_layers.py base|medium|large

  base    400 small files
  medium  250 MiB: 10,000 files of up to 16 KiB, and 52 of 128 KiB to 16 MiB
  large   7 GiB: the same, and two files of 4.5 and 2.25 GiB, which are mostly zeros

The same bytes at every time and on every machine; no two chunks of an image are
the same, and none is all zeros.
"""

import random
import sys
import tarfile

from made_up import EPOCH, KIB, MIB, Pieces, some

random.seed(4)
# Slices of it at random offsets.
NOISE = random.randbytes(16 * MIB)
ZEROS = bytes(124 * KIB)


def noise():
    return some(NOISE, MIB)


def thin():
    """4 KiB of each 128 are noise, the others zeros."""
    piece = some(NOISE, MIB)
    return b"".join(bytes(piece[at : at + 4 * KIB]) + ZEROS for at in range(0, 64 * KIB, 4 * KIB))


def main(what):
    out = open(sys.stdout.fileno(), "wb", buffering=4 * MIB, closefd=False)
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=4 * MIB, copybufsize=4 * MIB) as tar:

        def add(name, kind, size=0, piece=noise):
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime = kind, size, EPOCH
            info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
            tar.addfile(info, Pieces(piece) if size else None)

        def small(directories, files):
            for directory in range(directories):
                add(f"./{what}/{directory:03}", tarfile.DIRTYPE)
                for file in range(files):
                    add(f"./{what}/{directory:03}/file-{file:02}", tarfile.REGTYPE, int(2 ** random.uniform(8, 14)))

        add("./", tarfile.DIRTYPE)
        add(f"./{what}", tarfile.DIRTYPE)
        if what == "base":
            small(20, 20)
        else:
            small(500, 20)
            for number in range(48):
                add(f"./{what}/library-{number:02}.so", tarfile.REGTYPE, int(2 ** random.uniform(17, 22)))
            for number in range(9):
                add(f"./{what}/large-{number}.bin", tarfile.REGTYPE, 14 * MIB)
            if what == "large":
                add("./large/model-0.bin", tarfile.REGTYPE, 4608 * MIB, piece=thin)
                add("./large/model-1.bin", tarfile.REGTYPE, 2304 * MIB, piece=thin)
    out.flush()


if len(sys.argv) != 2 or sys.argv[1] not in ("base", "medium", "large"):
    sys.exit(__doc__)
main(sys.argv[1])
