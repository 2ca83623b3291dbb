# Running the end-to-end checks (crate accel-tests). Needs common.sh.
#
# In: work, a directory with bin/ (build_programs) and fixtures/ (tests/fixtures);
#     filter, an array of names to restrict the checks to

# build_programs DIR: everything that the checks run, optimised, because emulation is
# slow; and a daemon that does not verify, which the checks have to see through.
build_programs() {
    local dir=$1 release=${CARGO_TARGET_DIR:-$repo/target}/release program
    local build=(cargo build --locked --release --manifest-path "$repo/Cargo.toml")
    mkdir -p "$dir"
    # The one that does not verify first: what stays in the target directory does.
    "${build[@]}" -p ublk-server --features insecure-skip-verification || return
    install -m 755 "$release/ublk-server" "$dir/ublk-server-unverified" || return
    "${build[@]}" -p mkfs-accel -p ublk-server -p accel-tests || return
    for program in mkfs-accel ublk-server accel-e2e tree-manifest; do
        install -m 755 "$release/$program" "$dir/$program" || return
    done
}

# Does this machine's kernel have ublk?
have_ublk() { [ -e /dev/ublk-control ] || modprobe -q ublk_drv 2>/dev/null; }

# e2e_here TRANSPORT
e2e_here() {
    "$work/bin/accel-e2e" --bin "$work/bin" --fixtures "$work/fixtures" --transport "$1" --scratch "$work" "${filter[@]}"
}

# e2e_in_guest KERNEL: the same programs and fixtures, over ublk.
e2e_in_guest() {
    "$repo/tools/guest/run" --kernel "$1" --timeout 1800 \
        --share "$work/bin=/accel/bin:ro" --share "$work/fixtures=/accel/fixtures:ro" -- \
        sh -c 'modprobe ublk_drv && exec /accel/bin/accel-e2e "$@"' accel-e2e \
        --bin /accel/bin --fixtures /accel/fixtures --transport ublk --scratch /var/tmp "${filter[@]}"
}
