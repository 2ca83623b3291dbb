# shellcheck shell=bash
# Measures how long an image takes from "start" to its program's first output, the
# lazy way and the ordinary way, on the machine that this runs on. The demo uses it
# here and in the test guest. Needs common.sh; undo_on_exit must be on.
#
# In:  bin        directory of ublk-server
#      ufs        UFS directory with the image
#      image      the image's name there
#      layout     OCI layout with the same image, tag `sample`
#      program    command for /bin/sh in the image
#      transport  auto, ublk or fuse
#      scratch    directory for everything temporary, on a local disk
# Out: NAME=VALUE lines on standard output, times in milliseconds, sizes in bytes.

drop_caches() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# first_output DIR START: runs the program with DIR as its root and with /dev and /proc,
# in PID and mount namespaces of its own; prints the milliseconds from START to its
# first line, and the line.
first_output() {
    local line status=0
    coproc container {
        # shellcheck disable=SC2016 # expanded by the inner shell
        exec unshare --mount --pid --fork --kill-child /bin/sh -ec '
            [ ! -d "$1/dev" ] || mount --rbind /dev "$1/dev"
            [ ! -d "$1/proc" ] || mount -t proc proc "$1/proc"
            exec env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin chroot "$1" /bin/sh -c "$2"' \
            sh "$1" "$program" </dev/null
    }
    local pid=$container_PID
    IFS= read -r line <&"${container[0]}" || line=
    local ms=$(($(now_ms) - $2))
    wait "$pid" || status=$?
    [ "$status" = 0 ] && [ -n "$line" ] || die "the program in $1 failed (status $status)"
    printf '%s %s\n' "$ms" "$line"
}

# Waits until the daemon answers on $socket.
await_daemon() {
    local i
    for ((i = 0; i < 600; i++)); do
        "$bin/ublk-server" list --socket "$socket" >/dev/null 2>&1 && return
        kill -0 "$1" 2>/dev/null || break
        sleep 0.1
    done
    cat "$scratch/ublk-server.log" >&2
    die "ublk-server does not answer"
}

# start_daemon: sets $daemon and $socket.
start_daemon() {
    socket=$scratch/ublk-server.socket
    # Out of reach of Ctrl-C: it has to serve until the image is unmounted.
    setsid "$bin/ublk-server" serve --ufs "$ufs" --socket "$socket" --transport "$transport" \
        </dev/null >"$scratch/ublk-server.log" 2>&1 &
    daemon=$!
    at_exit stop_process "$daemon"
    await_daemon "$daemon"
}

unmount_image() { ! mountpoint -q "$1" || "$bin/ublk-server" unmount --socket "$socket" "$1"; }

measure_lazy() {
    local root=$scratch/root start result
    mkdir -p "$root"
    start_daemon
    at_exit unmount_image "$root"
    drop_caches
    start=$(now_ms)
    "$bin/ublk-server" mount --socket "$socket" "$image" "$root" >/dev/null ||
        { cat "$scratch/ublk-server.log" >&2; die "could not mount $image"; }
    echo "mounted=$(($(now_ms) - start))"
    "$bin/ublk-server" status --socket "$socket" --json >"$scratch/status.mounted"
    result=$(first_output "$root" "$start")
    echo "lazy_output=${result%% *}"
    echo "lazy_line=${result#* }"
    "$bin/ublk-server" status --socket "$socket" --json >"$scratch/status"
    /usr/bin/python3 - "$scratch/status.mounted" "$scratch/status" <<'PY'
import json, sys
mounted, status = (json.load(open(path)) for path in sys.argv[1:])
print(f"transport={status['transport']}")
# What is read behind a mount, in the background, is not counted by then.
print(f"fetched_to_mount={mounted['holders'][0]['ready']['mounted_bytes']}")
print(f"fetched={status['fetched_bytes']}")
PY
    unmount_image "$root"
    stop_process "$daemon"
}

# The ordinary way as containerd does it, at its fastest: every layer unpacked into a
# directory of its own, all of them overlaid; no download, and no digest checked.
measure_ordinary() {
    local root=$scratch/unpacked start result digest layer lower='' number=0
    mkdir -p "$root/mnt"
    at_exit remove_unpacked "$root"
    drop_caches
    start=$(now_ms)
    for digest in $(/usr/bin/python3 - "$layout" <<'PY'
import json, sys
read = lambda digest: json.load(open(f"{sys.argv[1]}/blobs/{digest.replace(':', '/')}"))
manifest = read(json.load(open(f"{sys.argv[1]}/index.json"))["manifests"][0]["digest"])
print(*(layer["digest"] for layer in manifest["layers"]))
PY
    ); do
        layer=$root/$((++number))
        mkdir "$layer"
        interruptible unpack_layer "$layout/blobs/${digest/://}" "$layer"
        lower=$layer${lower:+:$lower}
    done
    mount -t overlay -o "ro,lowerdir=$lower" overlay "$root/mnt"
    echo "unpacked=$(($(now_ms) - start))"
    result=$(first_output "$root/mnt" "$start")
    echo "ordinary_output=${result%% *}"
    echo "ordinary_line=${result#* }"
    remove_unpacked "$root"
}
remove_unpacked() {
    ! mountpoint -q "$1/mnt" || umount "$1/mnt" || return
    rm -rf --one-file-system "$1"
}

# unpack_layer BLOB DIR: with whiteouts as overlayfs wants them.
unpack_layer() {
    local marker
    gzip -dc "$1" | tar -x -C "$2" --numeric-owner --xattrs --xattrs-include='*'
    find "$2" -name '.wh.*' -print0 | while IFS= read -r -d '' marker; do
        rm "$marker"
        if [ "${marker##*/}" = .wh..wh..opq ]; then
            setfattr -n trusted.overlay.opaque -v y "${marker%/*}"
        else
            mknod "${marker%/*}/${marker##*/.wh.}" c 0 0
        fi
    done
}
