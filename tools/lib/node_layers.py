#!/usr/bin/python3
"""Makes the images that the benchmarks of the node daemon use, as an OCI layout.

usage: node_layers.py DIR COUNT

DIR gets the tags `many` (COUNT layers, each with a file of 64 KiB of its own), `hundred`
(the first hundred of them) and `big` (one layer with a file of 64 MiB).
"""

import io
import os
import random
import subprocess
import sys
import tarfile


def layer(path, files):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(content), 0o644, 1750000000
            tar.addfile(member, io.BytesIO(content))


def main():
    directory, count = sys.argv[1], int(sys.argv[2])
    os.makedirs(directory)
    tars = os.path.join(directory, "tars")
    os.mkdir(tars)
    layers = []
    for number in range(count):
        content = random.Random(number).randbytes(64 << 10)
        layers.append(os.path.join(tars, f"{number}.tar"))
        layer(layers[-1], [(f"file{number}", content), ("last", str(number).encode())])
    big = os.path.join(tars, "big.tar")
    layer(big, [("file", random.Random("big").randbytes(64 << 20))])
    here = os.path.dirname(os.path.abspath(__file__))
    for tag, paths in ("many", layers), ("hundred", layers[:100]), ("big", [big]):
        subprocess.run([sys.executable, os.path.join(here, "oci_layout.py"), directory, tag, *paths], check=True)


main()
