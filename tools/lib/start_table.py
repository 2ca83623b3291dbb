#!/usr/bin/python3
"""Prints the results of tools/bench-start as tables in Markdown: medians.

usage: start_table.py FILE

FILE has a JSON object per run: image, way, ufs; milliseconds pull, first (from the
pull's beginning to the first line of output), second (from the beginning of a later
container); bytes registry, from_ufs; how many layers
were unpacked instead of mounted: fallbacks.
"""

import json
import statistics
import sys

IMAGES = {
    "sample": "sample, 455 MiB",
    "layers": "70 layers",
    "large": "PyTorch, 7 GB",
    "huge": "25 GB, made up",
}
WAYS = {
    "overlayfs": "containerd, overlayfs, ordinary pull",
    "accel": "containerd, accel",
    "mount": "`ublk-server mount`, without containerd",
    "loop": "the same EROFS images on loop devices",
}
KINDS = {
    "plain": "as it is",
    "5ms": "5 ms per operation",
    "20ms": "20 ms per operation",
    "300MB": "300 MB/s",
    "100MB": "100 MB/s",
}


def seconds(ms):
    return f"{ms / 1000:.2f} s"


def mib(size):
    return f"{size / 2**20:,.1f} MiB"


def main(path):
    runs = {}
    with open(path) as file:
        for line in file:
            run = json.loads(line)
            runs.setdefault((run["image"], run["way"], run["ufs"]), []).append(run)
    for image in IMAGES:
        outputs = {run["output"] for key, some in runs.items() if key[0] == image for run in some}
        if len(outputs) > 1:
            sys.exit(f"{image}: the outputs differ")

    def median(key, field):
        return statistics.median(run[field] for run in runs[key])

    def unpacked(key):
        """What a row's figures are not those of, if some layers were downloaded."""
        most = max(run["fallbacks"] for run in runs[key])
        return f" ({most} layers unpacked)" if most else ""

    print("| image | | until it can be started | until the first output | the second time | from the registry | from UFS | runs |")
    print("|---|---|---|---|---|---|---|---|")
    for image, name in IMAGES.items():
        for way, ufs in (("overlayfs", "-"), ("accel", "plain"), ("mount", "plain"), ("loop", "-")):
            key = (image, way, ufs)
            if key not in runs:
                continue
            print(
                f"| {name} | {WAYS[way]}{unpacked(key)} | {seconds(median(key, 'pull'))} | **{seconds(median(key, 'first'))}** "
                f"| {seconds(median(key, 'second'))} | {mib(median(key, 'registry'))} "
                f"| {mib(median(key, 'from_ufs')) if way != 'overlayfs' else ''} | {len(runs[key])} |"
            )
    ratios = []
    for image, name in IMAGES.items():
        ordinary, ours = (image, "overlayfs", "-"), (image, "accel", "plain")
        if ordinary in runs and ours in runs:
            faster = median(ordinary, "first") / median(ours, "first")
            again = median(ours, "second") / median(ordinary, "second")
            ratios.append(f"| {name} | {faster:.1f} times{unpacked(ours)} | {again:.2f} times |")
    if ratios:
        print()
        print("| accel beside the ordinary pull | the first output is faster | the second time takes |")
        print("|---|---|---|")
        print("\n".join(ratios))
    if all(key[2] in ("-", "plain") for key in runs):
        return
    print()
    kinds = [kind for kind in KINDS if any(key[1:] == ("accel", kind) for key in runs)]
    print("| containerd, accel: until the first output | " + " | ".join(KINDS[kind] for kind in kinds) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    for image, name in IMAGES.items():
        cells = []
        for kind in kinds:
            key = (image, "accel", kind)
            if key not in runs:
                cells.append("")
                continue
            cells.append(seconds(median(key, "first")) + unpacked(key))
        if any(cells):
            print(f"| {name} | " + " | ".join(cells) + " |")


if len(sys.argv) != 2:
    sys.exit(__doc__)
main(sys.argv[1])
