#!/usr/bin/python3
"""Puts tars together into an image of an OCI layout directory.

usage: oci_layout.py [--config JSON] DIR TAG LAYER...

DIR is made if it is not there; another image of it stays. Layers, lowest first, are
tars, plain or gzip. They become blobs as they are (hard links: same file system).
JSON is the config's part "config": Env, Cmd and so on.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform

OCI = "application/vnd.oci.image"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def sha256(file):
    hasher = hashlib.sha256()
    while data := file.read(1 << 20):
        hasher.update(data)
    return hasher.hexdigest()


def blob_path(directory, digest):
    return os.path.join(directory, "blobs", "sha256", digest)


def put(directory, value, kind):
    data = json.dumps(value, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    with open(blob_path(directory, digest), "wb") as file:
        file.write(data)
    return {"mediaType": f"{OCI}.{kind}.v1+json", "digest": f"sha256:{digest}", "size": len(data)}


def put_layer(directory, path):
    """The layer's descriptor and diffID."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        digest = diff_id = sha256(file)
    if compressed:
        with gzip.open(path) as file:
            diff_id = sha256(file)
    blob = blob_path(directory, digest)
    if not os.path.exists(blob):
        os.link(path, blob)
    media_type = f"{OCI}.layer.v1.tar" + ("+gzip" if compressed else "")
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": os.path.getsize(path)}, f"sha256:{diff_id}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="{}")
    parser.add_argument("directory")
    parser.add_argument("tag")
    parser.add_argument("layers", nargs="+")
    arguments = parser.parse_args()
    directory = arguments.directory
    os.makedirs(os.path.join(directory, "blobs", "sha256"), exist_ok=True)
    layers = [put_layer(directory, path) for path in arguments.layers]
    config = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": json.loads(arguments.config),
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": put(directory, config, "config"),
        "layers": [descriptor for descriptor, _ in layers],
    }
    entry = put(directory, manifest, "manifest")
    entry["annotations"] = {"org.opencontainers.image.ref.name": arguments.tag}
    index_path = os.path.join(directory, "index.json")
    index = {"schemaVersion": 2, "manifests": []}
    if os.path.exists(index_path):
        with open(index_path) as file:
            index = json.load(file)
    index["manifests"].append(entry)
    with open(os.path.join(directory, "oci-layout"), "w") as file:
        json.dump({"imageLayoutVersion": "1.0.0"}, file)
    with open(index_path, "w") as file:
        json.dump(index, file)


main()
