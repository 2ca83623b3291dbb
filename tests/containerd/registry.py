#!/usr/bin/python3
"""What the registry on loopback has of an image, without anything but Python.

usage: registry.py config|manifest|layers|digests|chain HOST:PORT/REPO:TAG

config: digest of the config; manifest: the manifest as it is; layers: how many;
digests: the layers' digests; chain: chain ID of the topmost layer.
"""

import hashlib
import json
import sys
import urllib.request

ACCEPT = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in ("oci.image.manifest.v1", "docker.distribution.manifest.v2")
)


def get(host, path):
    request = urllib.request.Request(f"http://{host}/v2/{path}", headers={"Accept": ACCEPT})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


def main():
    what, image = sys.argv[1:]
    host, name = image.split("/", 1)
    repository, tag = name.rsplit(":", 1)
    raw = get(host, f"{repository}/manifests/{tag}")
    manifest = json.loads(raw)
    if what == "manifest":
        sys.stdout.buffer.write(raw)
    elif what == "config":
        print(manifest["config"]["digest"])
    elif what == "layers":
        print(len(manifest["layers"]))
    elif what == "digests":
        print(*(layer["digest"] for layer in manifest["layers"]))
    elif what == "chain":
        config = json.loads(get(host, f"{repository}/blobs/{manifest['config']['digest']}"))
        chain = None
        for diff in config["rootfs"]["diff_ids"]:
            both = f"{chain} {diff}"
            chain = diff if chain is None else "sha256:" + hashlib.sha256(both.encode()).hexdigest()
        print(chain)
    else:
        sys.exit(f"no such question: {what}")


main()
