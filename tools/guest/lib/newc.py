"""Writes the "newc" cpio format, which the kernel unpacks as its initramfs.

An archive is a row of entries (110-byte ASCII header of hexadecimal fields, name, data, each part
padded to 4 bytes) closed by an entry named TRAILER!!!. Archives may follow one another: the kernel
unpacks them in order, so a fixed archive and one made for a single run can be joined.
"""

import stat


class Newc:
    def __init__(self):
        self._parts = []
        self._inode = 0
        self._directories = set()

    def _entry(self, name, mode, data=b"", links=1, major=0, minor=0):
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (header + encoded, data):
            self._parts.append(part + b"\0" * (-len(part) % 4))

    def _parents(self, name):
        parent = name.rpartition("/")[0]
        if parent and parent not in self._directories:
            self.directory(parent)

    def directory(self, name, mode=0o755):
        self._parents(name)
        self._directories.add(name)
        self._entry(name, stat.S_IFDIR | mode, links=2)

    def file(self, name, data, mode=0o644):
        self._parents(name)
        self._entry(name, stat.S_IFREG | mode, data)

    def character_device(self, name, major, minor, mode=0o600):
        self._parents(name)
        self._entry(name, stat.S_IFCHR | mode, major=major, minor=minor)

    def finish(self):
        """The whole archive, its end marker included."""
        self._inode = -1
        self._entry("TRAILER!!!", 0)
        return b"".join(self._parts)
