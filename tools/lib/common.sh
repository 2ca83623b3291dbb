# shellcheck shell=bash
# Shared by the scripts under tools/: where things are, how they report, what
# they clean up. Sourced by bash scripts that have set -euo pipefail.
#
#   repo   the checkout
#   cache  everything that is downloaded or derived and can be made again;
#          never inside the checkout

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${IMAGE_ACCEL_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/image-accel}
export IMAGE_ACCEL_CACHE=$cache

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    say "$@"
    exit 1
}

need_root() { [ "$(id -u)" = 0 ] || die "this needs root: it mounts file systems and makes device nodes"; }

# Undoing. `at_exit CMD ARG…` runs CMD when the script ends, however it ends,
# the last one registered first. A failing one is reported and the rest still run.
_undo=()
at_exit() {
    local word line=
    for word in "$@"; do line+=$(printf '%q ' "$word"); done
    _undo+=("$line")
}
_run_undo() {
    local status=$? i
    trap '' INT TERM HUP
    set +e
    [ -z "$_child" ] || stop_tree "$_child"
    for ((i = ${#_undo[@]} - 1; i >= 0; i--)); do
        eval "${_undo[i]}" || say "cleaning up: failed: ${_undo[i]}"
    done
    exit "$status"
}
# Call once, in the script's main shell.
undo_on_exit() {
    trap _run_undo EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

# interruptible CMD…: runs a command that takes long. A signal to this script ends
# it at once; bash would otherwise wait for the command first.
_child=
interruptible() {
    local status=0
    "$@" &
    _child=$!
    wait "$_child" || status=$?
    _child=
    return "$status"
}

# stop_process PID: ask, wait up to 10 s, then insist. Only for children of this
# shell; one that is gone is fine, also when its number has another owner now.
stop_process() {
    local pid=$1 i
    _is_child "$pid" || return 0
    kill "$pid" 2>/dev/null || return 0
    for ((i = 0; i < 100; i++)); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -0 "$pid" 2>/dev/null && kill -KILL "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null || true
}

# unmount_below DIR: whatever is mounted there.
unmount_below() {
    local point
    for point in $(awk -v at="$1/" 'index($5, at) == 1 { print $5 }' /proc/self/mountinfo | sort -r); do
        umount -l "$point" || true
    done
}

# Milliseconds since some moment.
now_ms() { echo "$((${EPOCHREALTIME/[.,]/} / 1000))"; }

_is_child() { grep -qsx "PPid:[[:space:]]*$$" "/proc/$1/status"; }

# stop_tree PID: the same with everything that it has started.
stop_tree() {
    local below pid
    _is_child "$1" || return 0
    below=$(_descendants "$1")
    # shellcheck disable=SC2086 # a list of numbers
    [ -z "$below" ] || kill $below 2>/dev/null || true
    stop_process "$1"
    for pid in $below; do
        for _ in {1..100}; do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
    done
}
_descendants() {
    local pid
    for pid in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
        echo "$pid"
        _descendants "$pid"
    done
}

# locked NAME CMD…: one at a time on this machine, for filling the cache.
locked() {
    local name=$1
    shift
    mkdir -p "$cache/locks"
    (
        flock 9
        "$@" 9>&-
    ) 9>"$cache/locks/$name"
}
