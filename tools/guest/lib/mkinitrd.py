"""mkinitrd.py MODULES BUSYBOX OUT: the part of the initramfs that is the same for every run.

It holds a static busybox and those modules that are needed to reach the root file system and the
host and are not built into this kernel, with all that they depend on, in loading order
(/modules/order). The scripts come in a second archive that `run` appends, so that they can be
changed without building this again.
"""

import gzip
import lzma
import os
import sys

from newc import Newc

WANTED = ["virtio_pci", "virtio_blk", "virtio_console", "virtiofs", "ext4"]


def module_name(path):
    return os.path.basename(path).split(".ko")[0].replace("-", "_")


def read_module(path):
    with open(path, "rb") as file:
        data = file.read()
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith(".gz"):
        return gzip.decompress(data)
    if path.endswith(".ko"):
        return data
    sys.exit(f"mkinitrd: {path}: unknown compression; teach read_module() to unpack it")


def main():
    modules, busybox, out = sys.argv[1:]
    paths, needs = {}, {}
    with open(os.path.join(modules, "modules.dep")) as file:
        for line in file:
            path, _, rest = line.partition(":")
            paths[module_name(path)] = path
            needs[module_name(path)] = [module_name(need) for need in rest.split()]
    with open(os.path.join(modules, "modules.builtin")) as file:
        builtin = {module_name(line.strip()) for line in file}

    order = []

    def add(name):
        if name in order:
            return
        for need in needs[name]:
            add(need)
        order.append(name)

    for name in WANTED:
        if name in paths:
            add(name)
        elif name not in builtin:
            sys.exit(f"mkinitrd: this kernel has {name} neither as a module nor built in")

    archive = Newc()
    with open(busybox, "rb") as file:
        archive.file("bin/busybox", file.read(), 0o755)
    for directory in ("dev", "proc", "sys", "root", "modules"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    for name in order:
        archive.file(f"modules/{name}.ko", read_module(os.path.join(modules, paths[name])))
    archive.file("modules/order", "".join(f"{name}\n" for name in order).encode())
    with open(out, "wb") as file:
        file.write(archive.finish())


main()
