# shellcheck shell=bash
# What tools/bench-recovery and tools/bench-many share. Needs common.sh and e2e.sh.

# node_images DIR COUNT: DIR/bin with the programs, DIR/ufs with converted images and
# DIR/TAG.digest for each (tools/lib/node_layers.py).
node_images() {
    local dir=$1 count=$2 tag
    build_programs "$dir/bin" >&2 || return
    say "making images"
    "$repo/tools/lib/node_layers.py" "$dir/layout" "$count"
    mkdir "$dir/ufs"
    for tag in many hundred big; do
        "$dir/bin/mkfs-accel" convert "oci:$dir/layout:$tag" --ufs "$dir/ufs" </dev/null >&2 || return
        /usr/bin/python3 -c '
import json, sys
index = json.load(open(sys.argv[1] + "/index.json"))
print(*(m["digest"] for m in index["manifests"] if m["annotations"]["org.opencontainers.image.ref.name"] == sys.argv[2]))
' "$dir/layout" "$tag" >"$dir/$tag.digest"
    done
    rm -rf "$dir/layout"
}

# bench_node KERNEL DIR ARGUMENT…: in the guest with that kernel over ublk; `here`: on
# this machine, over ublk where its kernel has it, else over FUSE.
bench_node() {
    local kernel=$1 dir=$2 transport=fuse
    shift 2
    if [ "$kernel" = here ]; then
        ! have_ublk || transport=ublk
        interruptible "$dir/bin/bench-node" --bin "$dir/bin" --ufs "$dir/ufs" --transport "$transport" --scratch "$dir" "$@"
        return
    fi
    interruptible "$repo/tools/guest/run" --kernel "$kernel" --timeout 3000 --share "$dir=/accel:ro" \
        --kernel-module-param ublk_drv.ublks_max=1024 -- \
        sh -c 'modprobe ublk_drv && exec /accel/bin/bench-node --bin /accel/bin --ufs /accel/ufs --transport ublk --scratch /var/tmp "$@"' \
        bench-node "$@"
}
