# shellcheck shell=bash
# The checks of the doctor, each a function. Needs common.sh, processes.sh, images.sh and
# checks.sh.
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
    is_mended "$main" snapshotter
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
# faults_in FILE: the names of the checks that found one.
faults_in() { /usr/bin/python3 -c 'import json, sys
print(*[f["check"] for f in json.load(open(sys.argv[1]))["findings"] if f["level"] == "fault"])' "$1"; }
version_of_containerd() { "${ctr[@]}" version | awk '/^Server:/ { server = 1 } server && /Version:/ { print $2; exit }'; }

# Each fault that a node can be given: the doctor names it, and nothing else; what its message
# says is done, and then there is none. At the end the node pulls lazily.
doctor_mends_each_fault() {
    local main=$work/doctor/each.toml images_table=plugins/io.containerd.cri.v1.images
    mkdir -p "$work/doctor"
    stop_process "$containerd_pid"
    start_node
    cp "$containerd_config" "$main"
    containerd_reads=$main server_ufs=$images/ufs snapshotter_options=(--budget 20) server_program='' asked_server=''
    systemctl restart accel-snapshotter
    no_faults "$main"

    # What containerd reads.
    case $containerd_version in
    1.*)
        images_table=plugins/io.containerd.grpc.v1.cri/containerd
        breaks "$main" annotations $images_table/disable_snapshot_annotations true
        breaks "$main" configuration-format version 1
        ;;
    *) breaks "$main" annotations proxy_plugins/accel/exports/enable_remote_snapshot_annotations '"false"' ;;
    esac
    breaks "$main" default-snapshotter $images_table/snapshotter '"overlayfs"'
    breaks "$main" discard-unpacked-layers $images_table/discard_unpacked_layers true
    breaks "$main" proxy-plugin proxy_plugins/accel/address '"/nobody.sock"'
    breaks "$main" cri-disabled disabled_plugins \
        '["cri", "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"]'
    cp "$main" "$work/doctor/kept.toml"
    echo 'no = ' >>"$main"
    is_mended "$main" containerd-configuration
    # A runtime class of its own that nobody has named.
    if [ "$containerd_version" != 1.6 ]; then
        is_mended "$main" runtime-handler --for runtime-class
    fi

    # The daemons: not there, at other places, of other kinds.
    stop_process "$server_pid"
    is_mended "$main" ublk-server
    kill_now "$snapshotter_pid"
    is_mended "$main" snapshotter
    asked_server=$run/nobody.sock
    systemctl restart accel-snapshotter
    is_mended "$main" snapshotter
    snapshotter_options=(--budget 20 --ufs "$images/ufs")
    systemctl restart accel-snapshotter
    ln -sfn "$images/ufs" "$work/same-ufs"
    server_ufs=$work/same-ufs
    systemctl restart ublk-server
    is_mended "$main" snapshotter
    chmod 606 "$run/accel.sock"
    is_mended "$main" snapshotter
    if [ -x "$bin/ublk-server-unverified" ]; then
        server_program=$bin/ublk-server-unverified
        systemctl restart ublk-server
        is_mended "$main" ublk-server
    fi
    # UFS does not answer, and who asks for something notices.
    snapshotter_options=(--budget 20)
    systemctl restart accel-snapshotter
    wait_until asks_the_snapshotter
    server_on_slow_ufs
    kill -STOP "$slow_pid"
    cri pull "$tiny"
    wait_until has_fault "$main" ufs
    is_mended "$main" ufs
    forget_image "$tiny"
    wait_until nothing_lazy
    server_on_ufs
    # Modules: only where nobody else has them.
    if [ -d /run/guest ]; then
        stop_process "$server_pid"
        rmmod ublk_drv
        is_mended "$main" "ublk ublk-server"
        same "$(cat /etc/modules-load.d/ublk_drv.conf)" ublk_drv
    fi
    # containerd runs with what it had read before, then not at all.
    stop_process "$containerd_pid"
    echo '[plugins]' >"$work/bare.toml"
    start_containerd "$work/containerd-$containerd_version" "$work/bare.toml"
    is_mended "$main" containerd
    stop_process "$containerd_pid"
    is_mended "$main" containerd
    # With nothing left of the time-out, after which it tries nothing for a while.
    another_snapshotter
    begin_log
    cri pull "$tiny"
    same "$(since_then | grep /blobs/)" "$(the_config "$tiny")"
    forget_image "$tiny"
    wait_until nothing_lazy
}
# breaks CONFIG CHECK TABLE/…/KEY VALUE: writes that into the configuration, and has it mended.
breaks() {
    /usr/bin/python3 -c 'import json, sys
*table, key = sys.argv[2].split("/")
step = {"set": {"file": sys.argv[1], "table": table, "key": key, "value": json.loads(sys.argv[3])}}
print(json.dumps({"findings": [{"check": "broken", "mend": [step]}]}))' "$1" "$3" "$4" >"$work/doctor/broken"
    /usr/bin/python3 "$repo/tests/containerd/mend.py" "$work/doctor/broken" broken
    is_mended "$1" "$2"
}
# is_mended CONFIG CHECKS [OPTION…]: the doctor finds these faults and no other, and none when
# it was done what it says of the first.
is_mended() {
    local main=$1 checks=$2 kind what
    shift 2
    echo "--- $checks"
    fails doctor "$main" "$@" --json >"$work/doctor/report"
    same "$(faults_in "$work/doctor/report")" "$checks"
    /usr/bin/python3 "$repo/tests/containerd/mend.py" "$work/doctor/report" "${checks%% *}" >"$work/doctor/steps"
    while read -r kind what <&3; do
        echo "$kind: $what"
        case $kind in
        run) eval "$what" ;;
        do) by_hand "$main" "$what" ;;
        *) return 1 ;;
        esac
    done 3<"$work/doctor/steps"
    wait_until no_faults "$main" "$@"
}
# by_hand CONFIG TEXT: what a person does who reads that.
by_hand() {
    case $2 in
    "write it anew with"*) sed -i "s/.*version.*= 1$/version = ${2##* }/" "$1" ;;
    "correct it;"*) cp "$work/doctor/kept.toml" "$1" ;;
    "restart containerd, and pull once more"*) systemctl restart containerd ;;
    "start it with --server "*)
        asked_server=${2##* }
        systemctl restart accel-snapshotter
        ;;
    "give both the same --ufs") server_ufs=$images/ufs ;;
    "install a release build") server_program='' ;;
    "see that it is mounted and answers: "*)
        kill -CONT "$slow_pid"
        eval "${2#*: }"
        ;;
    *) echo "what does a person do who reads: $2"; return 1 ;;
    esac
}
has_fault() { # CONFIG CHECK
    doctor "$1" --json >"$work/doctor/now" || [ $? = 4 ] || return
    [[ " $(faults_in "$work/doctor/now") " == *" $2 "* ]]
}
# What the doctor's commands mean where there is no systemd.
systemctl() {
    case $* in
    "enable ublk-server" | "enable accel-snapshotter") ;;
    "restart ublk-server")
        stop_process "$server_pid"
        start_server "$server_ufs"
        ;;
    "restart accel-snapshotter")
        stop_process "$snapshotter_pid"
        start_snapshotter "${snapshotter_options[@]}"
        ;;
    "restart containerd")
        stop_process "$containerd_pid"
        use_config=$containerd_reads start_containerd "$work/containerd-$containerd_version"
        ;;
    *) echo "what is systemctl $*?"; return 1 ;;
    esac
}
