#!/usr/bin/python3
"""How many bytes of UFS it takes at most to mount an image and to read some files of it.

usage: mount_needs.py [--probed] MKFS-ACCEL UFS IMAGE FILE...

The image's record, which tells its layers. For each layer: its index, the chunk with the
superblock and the chunks with its metadata.
For each file its chunks. --probed: udev looks what is on a new block device, and reads
the first half MiB and the last quarter for that.
"""

import json
import os
import struct
import subprocess
import sys

CHUNK = 1 << 17


def main():
    arguments = sys.argv[1:]
    probed = arguments[0] == "--probed"
    program, ufs, image, *files = arguments[probed:]

    def inspect(*more):
        command = [program, "inspect", image, "--ufs", ufs, "--json", *more]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    chunks = set()
    indexes = {}
    sizes = {}
    record = inspect()
    told = os.path.getsize(os.path.join(ufs, "images", record["manifest"].replace(":", "/") + ".json"))
    for layer in record["layers"]:
        path = layer["erofs"]["path"]
        sizes[path] = layer["erofs"]["size"]
        indexes[path] = layer["erofs"]["index_size"]
        with open(os.path.join(ufs, path.replace(".erofs", ".idx")), "rb") as index:
            offset, size = struct.unpack("<QQ", index.read(72)[56:])
        chunks.add((path, 0))
        if probed:
            last = (sizes[path] - 1) // CHUNK
            chunks |= {(path, n) for n in (*range(4), last - 1, last) if 0 <= n <= last}
        chunks |= {(path, n) for n in range(offset // CHUNK, (offset + size - 1) // CHUNK + 1)}
    for file in files:
        data = inspect("--path", file)["data"]
        first, last = data["offset"] // CHUNK, (data["offset"] + data["length"] - 1) // CHUNK
        chunks |= {(data["image"], n) for n in range(first, last + 1)}
    needed = sum(min(CHUNK, sizes[path] - n * CHUNK) for path, n in chunks)
    print(told + needed + sum(indexes.values()), sum(sizes.values()))


main()
