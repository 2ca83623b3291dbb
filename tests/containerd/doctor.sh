# shellcheck shell=bash
# The checks of the doctor, each a function. Needs common.sh, processes.sh and images.sh.
#
# In: work, run, bin, images, registry, containerd_version

# A node without a word about us in its configuration: the doctor finds what is missing,
# and after what it says containerd pulls lazily.
doctor_mends_a_configuration() {
    local main=$work/doctor/config.toml
    stop_process "$containerd_pid"
    mkdir -p "$work/doctor"
    echo '[plugins]' >"$work/bare.toml"
    # The CRI stays as it is there.
    start_containerd "$work/containerd-$containerd_version" "$work/bare.toml"
    cp "$containerd_config" "$main"
    fails doctor "$main" --json >"$work/doctor/before"
    grep -q '"check": "proxy-plugin"' "$work/doctor/before"
    "$bin/accel-snapshotter" config --containerd "$(version_of_containerd)" --root "$work/accel" --socket "$run/accel.sock" --into "$main"
    stop_process "$containerd_pid"
    # Not restarted yet: the configuration is right, the running one is not.
    use_config=$main start_containerd "$work/containerd-$containerd_version"
    doctor "$main" --json >"$work/doctor/after" || [ $? = 3 ]
    fails grep -q '"level": "fault"' "$work/doctor/after"
    begin_log
    cri pull "$tiny"
    same "$(since_then | grep /blobs/)" "$(the_config "$tiny")"
    # Somebody else's socket: the commands are run as they are told.
    chmod 666 "$run/accel.sock"
    chown 1:1 "$run/accel.sock"
    fails doctor "$main" --json >"$work/doctor/socket"
    same "$(faults_in "$work/doctor/socket")" snapshotter
    commands_in "$work/doctor/socket" snapshotter >"$work/doctor/commands"
    sh -ex "$work/doctor/commands"
    no_faults "$main"
    # A layer that is mounted no more, and nobody who could serve it: it is there again when
    # there is.
    kill_now "$snapshotter_pid"
    stop_process "$server_pid"
    umount "$(awk -v at="$work/accel/layers/" 'index($5, at) == 1 { print $5; exit }' /proc/self/mountinfo)"
    start_snapshotter
    fails doctor "$main" --json >"$work/doctor/unmounted"
    same "$(faults_in "$work/doctor/unmounted")" "ublk-server lazy-layers"
    grep -q 'mounted as soon as ublk-server and UFS answer' "$work/doctor/unmounted"
    start_server
    wait_until no_faults "$main"
    same "$(lazy_mounts)" "$(image_has layers "$tiny")"
    wait_until asks_the_snapshotter
    forget_image "$tiny"
    # What does not run is said, with what to do.
    stop_process "$server_pid"
    fails doctor "$main" >"$work/doctor/stopped"
    grep -q 'FAULT *ublk-server' "$work/doctor/stopped"
    grep -q 'systemctl restart ublk-server' "$work/doctor/stopped"
    start_server
    wait_until nothing_lazy
}
doctor() { # CONFIG [OPTION…]
    local main=$1
    shift
    "$bin/accel-snapshotter" doctor --socket "$run/accel.sock" --root "$work/accel" --server "$run/ublk.sock" \
        --containerd-socket "$containerd_socket" --containerd-config "$main" "$@"
}
no_faults() { # CONFIG [OPTION…]
    doctor "$@" --json >"$work/doctor/now" || [ $? = 3 ] || return
    [ -z "$(faults_in "$work/doctor/now")" ]
}
# faults_in FILE: the names of the checks that found one; commands_in FILE CHECK: what is
# to be run for it.
faults_in() { /usr/bin/python3 -c 'import json, sys
print(*[f["check"] for f in json.load(open(sys.argv[1]))["findings"] if f["level"] == "fault"])' "$1"; }
commands_in() { /usr/bin/python3 -c 'import json, sys
for finding in json.load(open(sys.argv[1]))["findings"]:
    if finding["check"] == sys.argv[2]:
        for step in finding["mend"]: print(step["run"])' "$1" "$2"; }
version_of_containerd() { "${ctr[@]}" version | awk '/^Server:/ { server = 1 } server && /Version:/ { print $2; exit }'; }
