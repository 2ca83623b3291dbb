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

# stop_process PID: ask, wait up to 10 s, then insist. PID is our own child.
stop_process() {
    local pid=$1 i
    kill "$pid" 2>/dev/null || return 0
    for ((i = 0; i < 100; i++)); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -0 "$pid" 2>/dev/null && kill -KILL "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null || true
}

# Monotonic time in milliseconds.
now_ms() {
    local up
    read -r up _ </proc/uptime
    echo "$((10#${up/./} * 10))"
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
