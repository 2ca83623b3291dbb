#!/usr/bin/python3 -B
"""Writes a layer of the huge sample image to standard output, a tar.

usage: huge_layers.py models|data|packages

  models    two files of 4.25 and 2.25 GiB that no compression makes smaller
  data      8 GiB of preallocated zeros, 3 GiB of records with gaps of zeros, and
            6 GiB of text
  packages  200,000 small files in 2,000 directories, half text and half not,
            1.6 GiB

The same bytes at every time and on every machine.
"""

import random
import sys
import tarfile

from made_up import EPOCH, MIB, Pieces, some

random.seed(25)
# Slices of it at random offsets: noise enough for every compressor's window, and no
# two chunks of an image are the same.
NOISE = random.randbytes(64 * MIB)
LINES = [b"%0120x\n" % random.getrandbits(480) for _ in range(200)]
TEXT = b"".join(random.choices(LINES, k=2 * MIB // 121))


def main(what):
    out = open(sys.stdout.fileno(), "wb", buffering=4 * MIB, closefd=False)
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=4 * MIB, copybufsize=4 * MIB) as tar:

        def directory(name):
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, EPOCH
            tar.addfile(info)

        def file(name, size, piece):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = size, 0o644, EPOCH
            tar.addfile(info, Pieces(piece))

        def noise():
            return some(NOISE, MIB)

        def records():
            # 16 KiB of a record's 256 are used.
            return bytes(some(NOISE, 16 * 1024)) + bytes(240 * 1024)

        def text():
            return some(TEXT, MIB)

        directory("./")
        if what == "models":
            directory("./models")
            file("./models/large.bin", 4352 * MIB, noise)
            file("./models/small.bin", 2304 * MIB, noise)
        elif what == "data":
            directory("./data")
            file("./data/preallocated", 8192 * MIB, lambda: bytes(MIB))
            file("./data/records", 3072 * MIB, records)
            file("./data/text", 6144 * MIB, text)
        else:
            directory("./packages")
            for package in range(2000):
                directory(f"./packages/{package:04}")
                for number in range(100):
                    source = random.choice((TEXT, NOISE))
                    size = int(2 ** random.uniform(8, 15.5))
                    file(f"./packages/{package:04}/module-{number:02}.py", size, lambda: some(source, size))
    out.flush()


if len(sys.argv) != 2 or sys.argv[1] not in ("models", "data", "packages"):
    sys.exit(__doc__)
main(sys.argv[1])
