"""Fails when a conversion took more memory than mkfs-accel promises: 100 MB for each layer
in work, and the directory trees of these: half a KiB for each entry, and its texts.

usage: convert_memory.py MKFS_ACCEL IMAGE UFS JOBS USED

USED is the converter's peak memory in bytes, JOBS how many layers it had in work at a
time at most. Prints the bound in bytes.
"""

import json
import subprocess
import sys

PER_LAYER = 100 * 10**6
PER_ENTRY = 512


def tree(mkfs, image, ufs, layer):
    """What the tree of a layer may take, in bytes."""
    listing = subprocess.run(
        [mkfs, "inspect", image, "--ufs", ufs, "--tree", "--layer", str(layer), "--json"],
        check=True,
        stdout=subprocess.PIPE,
    )
    texts = ((file["path"].rpartition("/")[2], file.get("target") or "") for file in json.loads(listing.stdout))
    return sum(PER_ENTRY + len(name.encode()) + len(target.encode()) for name, target in texts)


def main():
    mkfs, image, ufs, jobs, used = sys.argv[1:]
    record = subprocess.run(
        [mkfs, "inspect", image, "--ufs", ufs, "--json"], check=True, stdout=subprocess.PIPE
    )
    layers = len(json.loads(record.stdout)["layers"])
    trees = sorted((tree(mkfs, image, ufs, n + 1) for n in range(layers)), reverse=True)
    # The largest that may have been in work together.
    together = trees[: int(jobs)]
    bound = len(together) * PER_LAYER + sum(together)
    print(bound)
    if int(used) > bound:
        sys.exit(f"the conversion took {int(used):,} bytes of memory, more than {bound:,}, the most it may take")


main()
