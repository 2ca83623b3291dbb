# shellcheck shell=bash
# The programs of others that ours have to agree with, from Debian's packages:
# a registry and containerd. They run as they are, in a directory of their own, and
# end with the script. Needs common.sh and debian.sh; undo_on_exit must be on.

# start_registry DIR [accesslog]: on a free port of the loopback; sets $registry to
# host:port. With `accesslog` every request is a line in DIR/log.
start_registry() {
    local dir=$1 program pid port i disabled=true
    [ "${2:-}" != accesslog ] || disabled=false
    program=$(unpack_deb docker-registry)/usr/bin/docker-registry
    port=$(/usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    registry=127.0.0.1:$port
    mkdir -p "$dir/store"
    cat >"$dir/config.yml" <<YAML
version: 0.1
log: {accesslog: {disabled: $disabled}, level: warn}
storage: {filesystem: {rootdirectory: $dir/store}}
http: {addr: $registry}
YAML
    OTEL_TRACES_EXPORTER=none "$program" serve "$dir/config.yml" >"$dir/log" 2>&1 &
    pid=$!
    at_exit stop_process "$pid"
    for ((i = 0; i < 300; i++)); do
        (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null && return
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    cat "$dir/log" >&2
    die "the registry does not answer on $registry"
}

# start_containerd DIR [TOML]: sets the array $ctr to its client command,
# $containerd_socket, and $containerd_pid. Without CRI, unless a file with more
# configuration is given. May be called again after it was stopped.
start_containerd() {
    local dir=$1 more=${2:-} programs runc disabled='"io.containerd.internal.v1.opt"' i
    programs=$(unpack_deb containerd)/usr/bin
    runc=$(unpack_deb runc)/usr/sbin
    [ -n "$more" ] || disabled+=', "io.containerd.grpc.v1.cri"'
    mkdir -p "$dir"
    cat - ${more:+"$more"} >"$dir/config.toml" <<TOML
version = 2
root = "$dir/root"
state = "$dir/state"
disabled_plugins = [$disabled]
[grpc]
  address = "$dir/socket"
[ttrpc]
  address = "$dir/socket.ttrpc"
TOML
    PATH=$programs:$runc:$PATH "$programs/containerd" --config "$dir/config.toml" >>"$dir/log" 2>&1 &
    containerd_pid=$!
    containerd_socket=$dir/socket
    at_exit stop_process "$containerd_pid"
    ctr=("$programs/ctr" --address "$dir/socket")
    for ((i = 0; i < 300; i++)); do
        "${ctr[@]}" version >/dev/null 2>&1 && return
        kill -0 "$containerd_pid" 2>/dev/null || break
        sleep 0.1
    done
    cat "$dir/log" >&2
    die "containerd does not answer"
}
