# shellcheck shell=bash
# The processes that the checks of containerd need, and how to ask them. Needs
# common.sh and peers.sh.
#
# In: work, run, bin, transport, images; server_options, an array of more arguments for
#     `ublk-server serve`, if there are such

stop_containers() { end_shims "$work"; }

start_server() { # [UFS]
    "${server_program:-$bin/ublk-server}" serve --ufs "${1:-$images/ufs}" --socket "$run/ublk.sock" --cache-size 256M \
        --transport "$transport" "${server_options[@]}" >>"$work/ublk-server.log" 2>&1 &
    server_pid=$!
    at_exit stop_process "$server_pid"
    wait_until "$bin/ublk-server" status --socket "$run/ublk.sock"
}
start_snapshotter() { # [OPTION…]
    # Guests are slow, and so is a busy machine: a hundred layers take their time.
    [ $# -gt 0 ] || set -- --budget 120
    "$bin/accel-snapshotter" serve --root "$work/accel" --socket "$run/accel.sock" \
        --server "${asked_server:-$run/ublk.sock}" "$@" \
        >>"$work/snapshotter.log" 2>&1 &
    snapshotter_pid=$!
    # It counts from its start.
    known_fallbacks=0
    at_exit stop_process "$snapshotter_pid"
    wait_until "$bin/accel-snapshotter" status --socket "$run/accel.sock"
}
# accel_config FOR [OPTION…]: our part of containerd's configuration.
accel_config() {
    local scope=$1
    shift
    "$bin/accel-snapshotter" config --containerd "$containerd_version" --for "$scope" --root "$work/accel" \
        --socket "$run/accel.sock" "$@" | sed '/^version = /d'
}
# start_node [FOR [OPTION…]]: containerd with our snapshotter.
start_node() {
    accel_config "${@:-default}" >"$work/accel.toml"
    # What pods need beside; not every machine lets its root lower an OOM score.
    local cri='"io.containerd.grpc.v1.cri"'
    case $containerd_version in
    1.*) printf '[plugins.%s]\nsandbox_image = "%s"\n' "$cri" "$pause" ;;
    *)
        printf '[plugins."io.containerd.cri.v1.images".pinned_images]\nsandbox = "%s"\n' "$pause"
        cri='"io.containerd.cri.v1.runtime"'
        printf '[plugins.%s]\n' "$cri"
        ;;
    esac >>"$work/accel.toml"
    echo "restrict_oom_score_adj = true" >>"$work/accel.toml"
    # For pods with users of their own, which have a network of their own, too.
    pods_network
    cat >>"$work/accel.toml" <<TOML
netns_mounts_under_state_dir = true
[plugins.$cri.cni]
bin_dir = "$(peer containernetworking-plugins)/usr/lib/cni"
conf_dir = "$work/net.d"
TOML
    start_containerd "$work/containerd-$containerd_version" "$work/accel.toml"
}
# pods_network: a bridge of this machine that leads nowhere.
pods_network() {
    [ ! -d "$work/net.d" ] || return 0
    mkdir "$work/net.d"
    local bridge=accel-$$
    cat >"$work/net.d/10-pods.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "$bridge",
    "ipam": {"type": "host-local", "subnet": "198.18.7.0/24", "dataDir": "$work/addresses"}}]}
JSON
    at_exit remove_bridge "$bridge"
}
remove_bridge() { [ ! -e "/sys/class/net/$1" ] || ip link delete "$1"; }
# wait_until CMD…: up to five minutes; guests are slow.
wait_until() {
    local i
    for ((i = 0; i < 1500; i++)); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "gave up waiting for: $*" >&2
    return 1
}
kill_now() {
    kill -KILL "$1"
    wait "$1" 2>/dev/null || true
}

status() { "$bin/accel-snapshotter" status --socket "$run/accel.sock" --json; }
# field NAME: of the snapshotter's status, a number.
field() { status | /usr/bin/python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
server_status() { "$bin/ublk-server" status --json --socket "$run/ublk.sock"; }
server_field() { server_status | /usr/bin/python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
# Which runtime class an image is pulled for, containerd reads from the pod's
# annotations; 2.1 does not look at the request's field.
cri() { # pull|remove IMAGE [HANDLER]
    "$bin/cri" "$1" --address "$containerd_socket" "$2" ${3:+--runtime-handler "$3" --handler-in-annotation}
}
k8s() { "${ctr[@]}" -n k8s.io "$@"; }
# container NAME IMAGE [OPTION…] -- CMD…: runs a container on our snapshotter.
container() {
    local name=$1 image=$2 options=()
    shift 2
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    k8s run --rm --runc-root "$work/runc" --snapshotter accel "${options[@]}" "$image" "$name" "$@"
}
# same FOUND EXPECTED
same() { [ "$1" = "$2" ] || { printf 'not the same:\n  %s\n  %s\n' "$1" "$2"; return 1; }; }
fails() { if "$@"; then echo "this should have failed: $*"; return 1; fi; }
# tree IMAGE SNAPSHOTTER NAMESPACE: the image's tree as text, by the mounts that the
# snapshotter gives for it.
tree() {
    local point=$work/mnt status=0 ctr=("${ctr[@]}" -n "$3" snapshots --snapshotter "$2")
    mkdir -p "$point"
    "${ctr[@]}" view --target "$point" look "$(image_has chain "$1")" >"$work/mount-it" || return
    sh -e "$work/mount-it" || return
    "$bin/tree-manifest" --own-since "${unpacking:-$(date +%s)}" "$point" || status=$?
    umount "$point" || status=$?
    # containerd may have collected it already.
    "${ctr[@]}" rm look 2>/dev/null || true
    return $status
}
# same_tree EXPECTED FOUND: times that the unpack itself made are "-" and match any.
same_tree() {
    /usr/bin/python3 - "$1" "$2" <<'PY'
import itertools, sys
expected, found = (open(path).read().splitlines() for path in sys.argv[1:])
different = [pair for pair in itertools.zip_longest(expected, found, fillvalue="")
             if len(pair[0].split(" ")) != len(pair[1].split(" "))
             or any(a not in (b, "-") for a, b in zip(pair[0].split(" "), pair[1].split(" ")))]
for pair in different[:10]:
    print("expected %s\nfound    %s" % pair)
sys.exit(bool(different) or not expected)
PY
}
# image_has WHAT IMAGE: see tests/containerd/registry.py.
image_has() { /usr/bin/python3 "$repo/tests/containerd/registry.py" "$1" "$2"; }
# begin_log; since_then: which blobs and manifests the registry was asked for meanwhile.
begin_log() { log_began=$(wc -l <"$work/registry/log"); }
since_then() {
    tail -n "+$((log_began + 1))" "$work/registry/log" |
        awk '/"GET \/v2\/[^ ]*\/(blobs|manifests)\// && / (200|206) / { print $7 }' | sort -u
}
# the_config IMAGE: the only blob of it that may be downloaded.
the_config() { echo "/v2/$(sed 's|^[^/]*/||; s|:[^:]*$||' <<<"$1")/blobs/$(image_has config "$1")"; }
lazy_mounts() { grep -c "$work/accel/layers/" /proc/self/mountinfo || true; }
nothing_lazy() { [ "$(lazy_mounts)" = 0 ] && empty "$work"/accel/{layers,idmaps}; }
# empty DIR…: all that there are of these, and there is one. What is half written when its
# writer is killed has a dot before its name, and counts for nothing.
empty() {
    local dir found=no
    for dir; do
        [ -d "$dir" ] || continue
        found=$(ls "$dir") || return
        [ -z "$found" ] || return
    done
    [ -z "$found" ]
}
# counted PATTERN CMD…: how many lines of what CMD prints have it. Of a CMD that fails,
# which `CMD | grep -c` would count as 0, that is what it prints.
counted() {
    local pattern=$1 said
    shift
    said=$("$@") || { echo "failed: $*"; return; }
    grep -c -e "$pattern" <<<"$said" || true
}

report() {
    local failed=0 log
    if [ -n "$current" ]; then
        failed=1
        echo "test $current, containerd $containerd_version ... FAILED"
        for log in "$current" snapshotter ublk-server "containerd-$containerd_version/log"; do
            log=$work/$log
            [ -f "$log" ] || log=$log.log
            echo "--- the end of $log"
            tail -n 40 "$log" 2>/dev/null | sed 's/^/    /'
        done
    fi
    echo "test result: $passed passed; $failed failed; ${ignored:-0} ignored"
}
