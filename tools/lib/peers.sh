# shellcheck shell=bash
# The programs of others that ours have to agree with, from Debian's packages:
# a registry and containerd. They run as they are, in a directory of their own, and
# end with the script. Needs common.sh and debian.sh; undo_on_exit must be on.

# peer NAME: the directory of a peer's package, unpacked: docker-registry, runc,
# libseccomp2, containernetworking-plugins, or containerd-VERSION with 1.6, 1.7 or 2 as
# version; runc-2 is the one that goes with the last of these. Where there is no
# archive, as in the test guest, from $ACCEL_PEERS, which collect_peers has filled; runc-2
# from where it was unpacked, because it works there only. A containerd 2 other than Debian's
# is taken from $containerd_2, if that is set.
peer() {
    local suite=''
    if [ "$1" = containerd-2 ] && [ -n "${containerd_2:-}" ]; then
        echo "$containerd_2"
        return
    fi
    if [ -n "${ACCEL_PEERS:-}" ] && [ "$1" != runc-2 ]; then
        echo "$ACCEL_PEERS/$1"
        return
    fi
    case $1 in
    containerd-*)
        case ${1#containerd-} in
        1.6) suite=bookworm ;;
        1.7) suite=trixie ;;
        2) suite=sid ;;
        *) die "Debian's containerd is 1.6, 1.7 or 2, not ${1#containerd-}" ;;
        esac
        [ "$suite" != "$(debian_codename)" ] || suite=''
        unpack_deb containerd $suite
        ;;
    runc-2) locked runc-2 _runc_2 ;;
    *) unpack_deb "$1" ;;
    esac
}

# containerd 2 asks runc whether it can map ids of mounts, which it can since 1.2, before it
# starts a pod with users of its own. That of Debian 13 is 1.1; sid's wants newer libraries
# than Debian 12 has, and starts itself again from memory: so it is told where they are.
_runc_2() {
    local dir=$cache/debs/runc-2 libc seccomp patchelf
    if [ ! -e "$dir/.complete" ]; then
        libc=$(unpack_deb libc6 sid)
        seccomp=$(unpack_deb libseccomp2 sid)
        patchelf=$(unpack_deb patchelf)/usr/bin/patchelf
        rm -rf "$dir"
        mkdir -p "$dir/lib" "$dir/usr/sbin"
        cp -L "$(unpack_deb runc sid)/usr/sbin/runc" "$dir/usr/sbin/"
        cp -L "$libc"/usr/lib/x86_64-linux-gnu/{libc.so.6,ld-linux-x86-64.so.2} \
            "$seccomp/usr/lib/x86_64-linux-gnu/libseccomp.so.2" "$dir/lib/"
        "$patchelf" --set-interpreter "$dir/lib/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$dir/lib" \
            "$dir/usr/sbin/runc" || die "cannot tell runc where its libraries are"
        touch "$dir/.complete"
    fi
    echo "$dir"
}

# collect_peers DIR NAME…: for use as $ACCEL_PEERS.
collect_peers() {
    local dir=$1 name
    shift
    for name; do
        mkdir -p "$dir"
        cp -a "$(peer "$name")" "$dir/$name"
    done
}

# free_port [ADDRESS]: of the loopback, or of another address of this machine.
free_port() {
    /usr/bin/python3 -c 'import socket, sys; s = socket.socket(); s.bind((sys.argv[1], 0)); print(s.getsockname()[1])' "${1:-127.0.0.1}"
}

# start_registry DIR [accesslog]: on a free port of the loopback, or of $registry_address;
# sets $registry to host:port. With `accesslog` every request is a line in DIR/log. With
# $registry_login, USER:PASSWORD, it wants that; with $registry_deletes it removes what it is
# asked to.
start_registry() {
    local dir=$1 program pid port i disabled=true deletes=false address=${registry_address:-127.0.0.1}
    [ -z "${registry_deletes:-}" ] || deletes=true
    [ "${2:-}" != accesslog ] || disabled=false
    program=$(peer docker-registry)/usr/bin/docker-registry
    port=$(free_port "$address")
    registry=$address:$port
    mkdir -p "$dir/store"
    cat >"$dir/config.yml" <<YAML
version: 0.1
log: {accesslog: {disabled: $disabled}, level: warn}
storage: {filesystem: {rootdirectory: $dir/store}, delete: {enabled: $deletes}}
http: {addr: $registry}
YAML
    if [ -n "${registry_login:-}" ]; then
        /usr/bin/python3 -W ignore -c 'import crypt, sys
user, password = sys.argv[1].split(":")
print(user + ":" + crypt.crypt(password, crypt.mksalt(crypt.METHOD_BLOWFISH, rounds=16)))' "$registry_login" >"$dir/users"
        echo "auth: {htpasswd: {realm: here, path: $dir/users}}" >>"$dir/config.yml"
    fi
    OTEL_TRACES_EXPORTER=none "$program" serve "$dir/config.yml" >"$dir/log" 2>&1 &
    pid=$!
    at_exit stop_process "$pid"
    for ((i = 0; i < 300; i++)); do
        (: <"/dev/tcp/$address/$port") 2>/dev/null && return
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    cat "$dir/log" >&2
    die "the registry does not answer on $registry"
}

# start_containerd DIR [TOML]: sets the array $ctr to its client command,
# $containerd_socket, and $containerd_pid. Without CRI, unless a file with more
# configuration is given. May be called again after it was stopped. Which one:
# $containerd_version, 1.6 unless it is set. $containerd_config is its configuration's
# file: $use_config if that is set, else one that is made.
start_containerd() {
    local dir=$1 more=${2:-} programs runc i path
    programs=$(peer "containerd-${containerd_version:-1.6}")/usr/bin
    runc=runc
    [[ ${containerd_version:-1.6} != 2* ]] || runc=runc-2
    runc=$(peer "$runc")/usr/sbin
    mkdir -p "$dir"
    containerd_config=${use_config:-$dir/config.toml}
    [ -n "${use_config:-}" ] || containerd_settings "$dir" ${more:+"$more"} >"$containerd_config"
    path=$programs:$runc:$PATH
    # An older runc needs it; the test guest has it only there.
    [ -z "${ACCEL_PEERS:-}" ] || local -x LD_LIBRARY_PATH=$ACCEL_PEERS/libseccomp2/usr/lib/x86_64-linux-gnu
    PATH=$path "$programs/containerd" --config "$containerd_config" >>"$dir/log" 2>&1 &
    containerd_pid=$!
    containerd_socket=$dir/socket
    at_exit stop_process "$containerd_pid"
    ctr=("$programs/ctr" --address "$dir/socket")
    for ((i = 0; i < 600; i++)); do
        "${ctr[@]}" version >/dev/null 2>&1 && return
        kill -0 "$containerd_pid" 2>/dev/null || break
        sleep 0.1
    done
    cat "$dir/log" >&2
    die "containerd does not answer"
}
containerd_settings() {
    local dir=$1 more=${2:-} format=2 cri='"io.containerd.grpc.v1.cri"' disabled
    case ${containerd_version:-1.6} in 2*)
        format=3
        cri='"io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"'
        ;;
    esac
    # nri listens outside of DIR.
    disabled='"io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"'
    [ -n "$more" ] || disabled+=", $cri"
    cat - ${more:+"$more"} <<TOML
version = $format
root = "$dir/root"
state = "$dir/state"
disabled_plugins = [$disabled]
[grpc]
  address = "$dir/socket"
[ttrpc]
  address = "$dir/socket.ttrpc"
TOML
}

# end_shims DIR: they outlive a containerd, with what they run. They have its socket, which
# is below DIR, in their arguments.
end_shims() {
    local pid
    for pid in $(grep -lzF -- "$1/" /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3); do
        # shellcheck disable=SC2046 # a list of numbers
        [[ $(readlink "/proc/$pid/exe") != *containerd-shim* ]] || kill -KILL $(_descendants "$pid") "$pid" 2>/dev/null || true
    done
}

push_image() { # SOURCE IMAGE [OPTION…]
    local source=$1 image=$2
    shift 2
    skopeo copy --quiet --dest-tls-verify=false "$@" "$source" "docker://$image"
}
# busybox_layer TAR: a layer with busybox and /bin/sh.
busybox_layer() {
    local root=$1.root
    mkdir -p "$root/bin"
    cp "$(unpack_deb busybox-static)/bin/busybox" "$root/bin/busybox"
    ln -s busybox "$root/bin/sh"
    tar -C "$root" -cf "$1" --numeric-owner --owner=0 --group=0 --mtime=@1700000000 ./bin
    rm -r "$root"
}
# push_pause DIR IMAGE: what a pod's sandbox runs; made in DIR.
push_pause() {
    mkdir -p "$1"
    busybox_layer "$1.tar"
    "$repo/tools/lib/oci_layout.py" --config '{"Env": ["PATH=/bin"], "Cmd": ["/bin/busybox", "sleep", "1000000"]}' \
        "$1" pause "$1.tar"
    push_image "oci:$1:pause" "$2"
}
