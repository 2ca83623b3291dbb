# shellcheck shell=bash
# What the checks of containerd pull. Needs common.sh, debian.sh, peers.sh and
# processes.sh.
#
# In: work, images, bin

# make_images: makes and converts them; $images has then
#   registry/   the registry's directory, which runs
#   ufs/        the converted layers
#   trees/      what an ordinary unpack of some looks like
#   output      what the program of `tiny` prints, in output-deep a listing, in
#               output-linked what that of `linked` does
make_images() {
    local n image
    say "images, converted and pushed"
    mkdir -p "$images/ufs" "$images/trees" "$work/made"
    start_registry "$images/registry" accesslog
    # The sources on UFS have this address.
    echo "$registry" >"$images/made-at"
    name_images
    "$repo/tools/sample-image" --size tiny "$work/made/tiny"
    push_image "oci:$work/made/tiny:sample" "$registry/test/tiny:1"
    # A layer that stands on the one below: files without the directories they are in.
    mkdir -p "$work/made/implied/app/sticky"
    echo one >"$work/made/implied/app/sticky/one"
    tar -C "$work/made/implied" -cf "$work/made/implied.tar" --no-recursion --numeric-owner --owner=12 --group=34 \
        --mtime=@1700000000 ./app/sticky/one
    umoci tag --image "$work/made/tiny:sample" implied
    umoci raw add-layer --image "$work/made/tiny:implied" "$work/made/implied.tar" >/dev/null
    push_image "oci:$work/made/tiny:implied" "$registry/other/implied:1" --format v2s2
    # A hundred layers, each with a file of its own and one that all have.
    mkdir "$work/made/files"
    for ((n = 1; n < 100; n++)); do
        echo "$n" >"$work/made/files/last"
        echo "$n" >"$work/made/files/of-$n"
        tar -C "$work/made/files" -cf "$work/made/$n.tar" --numeric-owner --owner=0 --group=0 --mtime=@1700000000 "./last" "./of-$n"
    done
    busybox_layer "$work/made/0.tar"
    "$repo/tools/lib/oci_layout.py" --config '{"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]}' "$work/made/deep" deep \
        $(for ((n = 0; n < 100; n++)); do echo "$work/made/$n.tar"; done)
    push_image "oci:$work/made/deep:deep" "$registry/test/deep:1"
    make_linked "$work/made/linked"
    push_image "oci:$work/made/linked:linked" "$registry/test/linked:1"
    push_pause "$work/made/pause" "$registry/test/pause:1"
    for image in test/tiny:1=$tiny other/implied:1=$implied test/deep:1=$deep test/linked:1=$linked; do
        "$bin/mkfs-accel" convert "docker://$registry/${image%%=*}" --plain-http --ufs "$images/ufs" \
            --push "docker://${image#*=}" </dev/null >>"$work/convert.log" 2>&1 || { cat "$work/convert.log" >&2; return 1; }
    done
    sleep 1.1
    unpacking=$(date +%s)
    look_at_plain_images
}
# make_linked DIR: this machine's Perl, which every Debian has, with its own modules on top
# of the libraries that it is linked with.
make_linked() {
    local root=$1.root file
    mkdir -p "$root"/{libraries/proc,program/usr/bin}
    for file in $(ldd /usr/bin/perl | grep -o '/[^ ]*'); do
        install -D "$file" "$root/libraries$file"
    done
    cp /usr/bin/perl "$root/program/usr/bin/"
    file=$(perl -e 'print grep m{/perl-base$}, @INC')
    mkdir -p "$root/program$file"
    cp -a "$file/." "$root/program$file/"
    for file in libraries program; do
        tar -C "$root/$file" -cf "$1-$file.tar" --sort=name --numeric-owner --owner=0 --group=0 --mtime=@1700000000 .
    done
    "$repo/tools/lib/oci_layout.py" "$1" linked "$1-libraries.tar" "$1-program.tar"
    rm -r "$root"
}
# name_images: sets their names, with the registry's address.
name_images() {
    tiny=$registry/test/tiny:1-acc implied=$registry/team/implied:1-acc deep=$registry/test/deep:1-acc
    linked=$registry/test/linked:1-acc
    pause=$registry/test/pause:1
    made_at=$(cat "$images/made-at")
    program='/app/hello'
    files='busybox cat /last; busybox ls /'
    # shellcheck disable=SC2016 # Perl
    program_linked=(/usr/bin/perl -MList::Util=sum -MPOSIX=floor -e 'print sum(map { floor(sqrt $_) } 1 .. 100000), "\n";
        open my $maps, "<", "/proc/self/maps" or die "$!"; my %mapped;
        while (<$maps>) { $mapped{$1} = 1 if m{ (/\S+)$} } print map { "$_\n" } sort keys %mapped;')
}

# The accelerated tags on a node without our snapshotter: what everything is compared with.
look_at_plain_images() {
    local image containerd_version=1.6
    start_containerd "$work/plain"
    for image in "$tiny" "$implied" "$deep" "$linked"; do
        "${ctr[@]}" -n plain images pull --plain-http "$image" >/dev/null
    done
    for image in "$tiny" "$implied"; do
        tree "$image" overlayfs plain >"$images/trees/$(basename "$image")"
    done
    "${ctr[@]}" -n plain run --rm --runc-root "$work/runc" "$tiny" plain /bin/sh -c "$program" >"$images/output"
    "${ctr[@]}" -n plain run --rm --runc-root "$work/runc" "$deep" plain /bin/sh -c "$files" >"$images/output-deep"
    "${ctr[@]}" -n plain run --rm --runc-root "$work/runc" "$linked" plain "${program_linked[@]}" >"$images/output-linked"
    stop_process "$containerd_pid"
}
