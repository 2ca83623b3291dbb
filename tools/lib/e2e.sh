# shellcheck shell=bash
# Running the end-to-end checks (crate accel-tests). Needs common.sh.
#
# In: work, a directory with bin/ (build_programs or build_checked), tests (build_checked)
#     and fixtures/ (tests/fixtures); filter, an array of names to restrict the checks to;
#     full, not empty if guests are to run all that is there; both, not empty if those with
#     6.12 and 7 may share what does not depend on the kernel

programs=(mkfs-accel ublk-server ublk-rescue accel-snapshotter accel-e2e torture bench-node tree-manifest cri slow-ufs)
# Those that only a cluster needs.
cluster_programs=(accel-controller kubectl-accel)

# build_programs DIR: the programs as they are released, and those that try them.
build_programs() {
    local dir=$1 target=${CARGO_TARGET_DIR:-$repo/target} program
    mkdir -p "$dir"
    cargo build --locked --release --manifest-path "$repo/Cargo.toml" \
        -p mkfs-accel -p ublk-server -p accel-snapshotter -p accel-tests || return
    for program in "${programs[@]}"; do install -m 755 "$target/release/$program" "$dir/" || return; done
}

# build_checked DIR: the same, and those of a cluster, with the checks of debug builds,
# optimised because emulation is slow; a daemon that does not verify, which the checks have to
# see through; all tests, with their executables in DIR/../tests, a line "PACKAGE:TEST FILE"
# each.
build_checked() {
    local dir=$1 target=${CARGO_TARGET_DIR:-$repo/target} program
    # Always the whole workspace and a test: what else is chosen would give dependencies
    # other features, and build them again.
    local build=(cargo build --locked --profile checked --manifest-path "$repo/Cargo.toml" --workspace)
    mkdir -p "$dir"
    # The one that does not verify first: what stays in the target directory does.
    "${build[@]}" --bin ublk-server --test engine --features ublk-server/insecure-skip-verification || return
    install -m 755 "$target/checked/ublk-server" "$dir/ublk-server-unverified" || return
    "${build[@]}" --all-targets --message-format json-render-diagnostics >"$dir/../built.json" || return
    for program in "${programs[@]}" "${cluster_programs[@]}"; do
        install -m 755 "$target/checked/$program" "$dir/" || return
    done
    /usr/bin/python3 - "$dir/../built.json" >"$dir/../tests" <<'PYTHON'
import json, pathlib, sys
for line in open(sys.argv[1]):
    message = json.loads(line)
    if message.get("executable") and message["profile"]["test"] and "test" in message["target"]["kind"]:
        package = pathlib.Path(message["manifest_path"]).parent.name
        print(f"{package}:{message['target']['name']} {message['executable']}")
PYTHON
}

# Does this machine's kernel have ublk?
have_ublk() { [ -e /dev/ublk-control ] || modprobe -q ublk_drv 2>/dev/null; }

# e2e_here TRANSPORT
e2e_here() {
    "$work/bin/accel-e2e" --bin "$work/bin" --fixtures "$work/fixtures" --transport "$1" --scratch "$work" "${filter[@]}"
}

# What one leaves to the other then.
declare -A done_elsewhere=([6.12]='snapshots::mixed_chains fio::sees_damage' [7]='damage::damaged_ sample::')

# e2e_in_guest KERNEL TRANSPORT [FILTER…]: the same programs and fixtures. The filter
# counts if the caller has none of its own.
e2e_in_guest() {
    local kernel=$1 transport=$2 modules name
    shift 2
    if [ ${#filter[@]} != 0 ]; then
        set -- "${filter[@]}"
    elif [ -n "${both:-}" ]; then
        for name in ${done_elsewhere[$kernel]:-}; do set -- --skip "$name" "$@"; done
    fi
    case $transport in ublk) modules='ublk_drv' ;; fuse) modules='loop fuse' ;; esac
    "$repo/tools/guest/run" --kernel "$kernel" --timeout 1800 \
        --share "$work/bin=/accel/bin:ro" --share "$work/fixtures=/accel/fixtures:ro" -- \
        sh -c "modprobe -a $modules"' && exec /accel/bin/accel-e2e "$@"' accel-e2e \
        --bin /accel/bin --fixtures /accel/fixtures --transport "$transport" --scratch /var/tmp "$@"
}

# containerd_in_guest KERNEL VERSION CHECK…: Debian's containerd of that version, over ublk.
# What it pulls, and it itself, come with containerd_images; the runc of containerd 2 lies
# where it does here. Pods with users of their own have a bridge.
containerd_images() { "$repo/tests/containerd-e2e" --bin "$work/bin" --make-images "$work/containerd"; }
containerd_in_guest() {
    local kernel=$1 version=$2
    shift 2
    "$repo/tools/guest/run" --kernel "$kernel" --timeout 3600 --share "$repo=$repo:ro" \
        --share "$work/bin=/accel/bin:ro" --share "$work/containerd=/accel/containerd:ro" \
        --share "$cache/debs/runc-2=$cache/debs/runc-2:ro" --env IMAGE_ACCEL_CACHE="$cache" -- \
        sh -c 'modprobe -a ublk_drv erofs overlay bridge veth && exec "$@"' containerd \
        "$repo/tests/containerd-e2e" --bin /accel/bin --transport ublk --images /accel/containerd \
        --containerd "$version" "$@"
}
# What depends on ublk or on the version, and what everything else stands on: emulation takes
# a quarter of an hour for all checks of a version, which is what $full is for.
containerd_2_in_guest() {
    local checks=(pulls_lazily runs runs_a_linked_program trees_are_overlayfs writes_stay_in_the_container ctr_pulls_lazily
        runs_pods_with_their_own_users leaves_nothing runs_a_hundred_layers ends_containerd)
    [ -z "${full:-}" ] || checks=()
    containerd_in_guest "$1" 2 "${checks[@]}"
}
# 1.7 is the one with which the README's steps are followed.
containerd_1_7_in_guest() {
    local checks=(pulls_lazily pulls_again writes_stay_in_the_container survives_the_servers_death leaves_nothing
        reads_what_the_mount_needs pulls_for_a_runtime_class ends_containerd follows_the_readme)
    [ -z "${full:-}" ] || checks=()
    containerd_in_guest "$1" 1.7 "${checks[@]}"
}

# reboot_in_guest KERNEL: a node that loses its power, with what containerd_images has made.
reboot_in_guest() { "$repo/tests/reboot-e2e" --bin "$work/bin" --images "$work/containerd" --kernel "$1"; }

# torture_in_guest KERNEL TRANSPORT WHAT OPTION…: the programs in $work/bin. It may take
# four times as long as it is told to, and after that everything that waits has to end.
torture_in_guest() {
    local kernel=$1 transport=$2 what=$3 seconds=600 word last='' modules
    shift 3
    for word; do
        [ "$last" != --seconds ] || seconds=$word
        last=$word
    done
    case $transport in ublk) modules='ublk_drv' ;; fuse) modules='loop fuse' ;; esac
    "$repo/tools/guest/run" --kernel "$kernel" --timeout $((4 * seconds + 1800)) --share "$work/bin=/accel/bin:ro" -- \
        sh -c "modprobe -a $modules"' && exec /accel/bin/torture "$@"' torture \
        "$what" --bin /accel/bin --transport "$transport" --scratch /var/tmp "$@"
}

# torture_here: some of that in short over FUSE, on this machine.
torture_here() { "$work/bin/torture" run --bin "$work/bin" --transport fuse --scratch "$work" --seconds 45; }

# units_in_guest KERNEL: the daemon's systemd units over ublk.
units_in_guest() {
    "$repo/tools/guest/run" --kernel "$1" --timeout 1200 --share "$repo=$repo:ro" \
        --share "$work/bin=/accel/bin:ro" --share "$work/fixtures=/accel/fixtures:ro" -- \
        sh -c 'modprobe -a ublk_drv erofs overlay && exec "$@"' units \
        "$repo/tests/systemd-e2e" --bin /accel/bin --fixtures /accel/fixtures --transport ublk
}

# stalls_in_guest KERNEL: UFS that hangs in the kernel for ever; UFS on a real NFS server that
# is stopped, comes back, is damaged.
stalls_in_guest() {
    # shellcheck disable=SC2016 # expanded in the guest
    "$repo/tools/guest/run" --kernel "$1" --timeout 4200 --share "$work/bin=/accel/bin:ro" -- sh -euc '
        modprobe ublk_drv
        for what in "stuck --devices 4" nfs; do
            echo "torture $what"
            # Its name and options are words.
            /accel/bin/torture $what --bin /accel/bin --transport ublk --scratch /var/tmp
        done'
}

# kubelet_images; kubelet_in_guest KERNEL: a kubelet mounts UFS from a real NFS server for a Job.
kubelet_images() { "$repo/tests/kubelet-nfs" --bin "$work/bin" --make "$work/kubelet"; }
kubelet_in_guest() {
    "$repo/tools/guest/run" --kernel "$1" --timeout 1800 --share "$repo=$repo:ro" \
        --share "$work/kubelet=/accel/kubelet:ro" -- "$repo/tests/kubelet-nfs" --made /accel/kubelet
}

# torture_tests_in_guest KERNEL: some of that in short, and that it would notice.
torture_tests_in_guest() {
    # shellcheck disable=SC2016 # expanded in the guest
    "$repo/tools/guest/run" --kernel "$1" --timeout 1200 --share "$work/bin=/accel/bin:ro" -- sh -euc '
        modprobe ublk_drv
        torture() {
            what=$1 && shift
            echo "torture $what $*"
            /accel/bin/torture "$what" --bin /accel/bin --transport ublk --scratch /var/tmp "$@"
        }
        torture stuck
        torture run --seconds 45
        # Devices that end with their daemon: errors are in order, and have to be seen; it ends
        # when there are some.
        status=0
        torture run --seconds 300 --nfs no --without-recovery >/tmp/without || status=$?
        cat /tmp/without
        [ "$status" = 1 ]
        tail -n 1 /tmp/without | grep -Eq "errors=[1-9]"'
}

# The tests whose result depends on the kernel, by the crate's directory; of some of them
# only those with a name that begins as said: what the guest is not needed for takes long.
kernel_tests=(erofs:kernel sys:huge_pages source:worker transport:fuse transport:ublk ublk-server:daemon ublk-server:resources=ublk::)

# kernel_tests_in_guest KERNEL: those, as build_checked built them. The checkout has the
# same path in the guest: programs find what they were built with.
kernel_tests_in_guest() {
    local target=${CARGO_TARGET_DIR:-$repo/target} test executable executables=()
    for test in "${kernel_tests[@]}"; do
        executable=$(awk -v test="${test%%=*}" '$1 == test { print $2 }' "$work/tests")
        [ -n "$executable" ] || { echo "the test ${test%%=*} was not built"; return 1; }
        # Each with its filter.
        executables+=("$executable" "$([[ $test != *=* ]] || echo "${test#*=}")")
    done
    mkdir -p "$cache/erofs-utils"
    "$repo/tools/lib/fetch-erofs-utils" || return
    local shares=(--share "$repo=$repo:ro" --share "$cache/erofs-utils=$cache/erofs-utils:ro")
    [[ $target/ == "$repo"/* ]] || shares+=(--share "$target=$target:ro")
    # What fsck.erofs says does not depend on the kernel.
    # shellcheck disable=SC2016 # expanded in the guest
    "$repo/tools/guest/run" --kernel "$1" --timeout 3000 "${shares[@]}" \
        --env ACCEL_TESTS_FULL=1 --env ACCEL_REQUIRE_UBLK=1 --env IMAGE_ACCEL_CACHE="$cache" -- \
        sh -c 'modprobe -a ublk_drv loop || exit; status=0; while [ $# -gt 0 ]; do echo "$1 $2"; "$1" $2 --skip fsck || status=1; shift 2; done; exit $status' \
        kernel-tests "${executables[@]}"
}
