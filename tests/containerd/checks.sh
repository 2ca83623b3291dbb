# shellcheck shell=bash
# The checks of containerd with accelerated images, each a function. Needs common.sh,
# processes.sh and images.sh.
#
# In: work, run, bin, images, registry, containerd_version

# The accelerated tags run on a node without our snapshotter, and print what the original
# images do when they are unpacked by another program.
runs_with_overlayfs() {
    local root=$work/unpacked
    umoci unpack --image "$work/made/tiny:sample" "$root-tiny"
    same "$(cat "$images/output")" "$(chroot "$root-tiny/rootfs" /bin/sh -c "$program")"
    # That is 100 layers.
    same "$(head -n 1 "$images/output-deep") $(grep -c '^of-' "$images/output-deep")" "99 99"
    umoci unpack --image "$work/made/linked:linked" "$root-linked"
    # Perl wants to read its program from something.
    mkdir "$root-linked/rootfs/dev"
    : >"$root-linked/rootfs/dev/null"
    mount -t proc proc "$root-linked/rootfs/proc"
    same "$(cat "$images/output-linked")" "$(chroot "$root-linked/rootfs" "${program_linked[@]}")"
    umount "$root-linked/rootfs/proc"
    grep -q '/libc.so.6$' "$images/output-linked"
    grep -q '/List/Util/Util.so$' "$images/output-linked"
}

# The original and the accelerated image have the same config and layers.
is_the_same_image() {
    local what
    for what in config digests; do
        same "$(image_has $what "$registry/test/tiny:1")" "$(image_has $what "$tiny")"
        same "$(image_has $what "$registry/other/implied:1")" "$(image_has $what "$implied")"
    done
    # Layers of another repository were mounted, not sent.
    same "$(grep -E '"(PUT|PATCH) /v2/team/implied/blobs' "$work/registry/log" | grep -cv "$(image_has config "$implied" | sed 's/:/%3A/')")" 0
}

# The same manifest in a layout, with everything that it names.
writes_a_layout() {
    "$bin/mkfs-accel" convert "docker://$registry/test/tiny:1" --plain-http --ufs "$images/ufs" --out "oci:$work/out:acc" </dev/null
    same "$(skopeo inspect --raw "oci:$work/out:acc" | sha256sum)" "$(image_has manifest "$tiny" | sha256sum)"
    skopeo copy --quiet "oci:$work/out:acc" "dir:$work/out-copy"
}

# Nobody is let in with a tag that may not be pushed: before anything is converted.
tries_the_right_to_push() {
    mkdir "$work/other-ufs"
    fails "$bin/mkfs-accel" convert "docker://$registry/test/tiny:1" --plain-http --ufs "$work/other-ufs" \
        --push "docker://127.0.0.1:1/test/tiny:1" </dev/null
    same "$(find "$work/other-ufs" -name '*.erofs')" ""
}

# Over the CRI, into a containerd that has nothing: only manifest and config.
pulls_lazily() {
    local image hits
    start_node
    hits=$(field hits)
    for image in "$tiny" "$implied"; do
        begin_log
        cri pull "$image"
        same "$(since_then | grep /blobs/)" "$(the_config "$image")"
    done
    # The layers that both have are shared.
    same "$(field hits)" "$((hits + $(image_has layers "$tiny") + 1))"
    same "$(lazy_mounts)" "$(image_has layers "$implied")"
}

# Asked after every check but those in $checks_of_fallbacks.
no_fallbacks() { same "$(field fallbacks)" "$known_fallbacks"; }

# imagePullPolicy: Always. The manifest may have changed; nothing else is asked for.
pulls_again() {
    local hits
    hits=$(field hits)
    begin_log
    cri pull "$tiny"
    same "$(since_then | grep -c /blobs/)" 0
    same "$(field hits)" "$hits"
}

runs() {
    same "$(container run1 "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    same "$(container run2 "$implied" -- /bin/sh -c 'cat /app/sticky/one')" one
}

# A program that is no static one: its libraries, in a layer below its own, and one that it
# loads itself are mapped into its memory. It prints what is mapped.
runs_a_linked_program() {
    begin_log
    cri pull "$linked"
    same "$(since_then | grep /blobs/)" "$(the_config "$linked")"
    same "$(container linked "$linked" -- "${program_linked[@]}")" "$(cat "$images/output-linked")"
    forget_image "$linked"
}

# Pods over the CRI, with imagePullPolicy: Always. The first one's pull is lazy, the next
# one's asks for the manifest only.
runs_pods() {
    local hits
    # The sandbox's image is an ordinary one.
    cri pull "$pause"
    forget_image "$tiny"
    begin_log
    same "$(pod "$tiny")" "$(cat "$images/output")"
    same "$(since_then | grep /blobs/)" "$(the_config "$tiny")"
    hits=$(field hits)
    begin_log
    same "$(pod "$tiny")" "$(cat "$images/output")"
    same "$(since_then | grep -c /blobs/)" 0
    same "$(field hits)" "$hits"
    same "$(counted . k8s containers ls -q)" 0
    forget_image "$pause"
}
# pod IMAGE [HANDLER]: what its only container prints.
pod() {
    "$bin/cri" pod --address "$containerd_socket" "$1" ${2:+--runtime-handler "$2" --handler-in-annotation} -- /bin/sh -c "$program"
}

trees_are_overlayfs() {
    local image
    for image in "$tiny" "$implied"; do
        tree "$image" accel k8s.io >"$work/tree"
        same_tree "$images/trees/$(basename "$image")" "$work/tree"
    done
}

# A container that stays, for what follows.
writes_stay_in_the_container() {
    k8s run -d --runc-root "$work/runc" --snapshotter accel "$implied" stays /bin/sh -c 'echo written >/app/written; exec sleep 1000000'
    wait_until k8s tasks exec --exec-id look stays /bin/sh -c 'cat /app/written'
    fails container other "$implied" -- /bin/sh -c 'cat /app/written'
}
stays() { same "$(k8s tasks exec --exec-id "$1" stays /bin/sh -c 'cat /app/sticky/one')" one; }

# What a kubelet is told of the disk: containerd 1.6 names a directory beneath its own
# root, which is where the snapshotter's root is unless another one is given. What was
# written counts, and no layer that is loaded lazily.
gives_disk_figures() {
    local expected=$work/accel default
    if [ "$containerd_version" = 1.6 ]; then
        default=$("$bin/accel-snapshotter" config --containerd 1.7 | grep -o '/var/lib/containerd/[^" ]*')
        expected=$work/containerd-1.6/root/${default#/var/lib/containerd/}
    fi
    wait_until has_figures
    same "$(disk_figures | cut -d' ' -f1)" "$expected"
    [ "$(disk_figures | cut -d' ' -f2)" -lt "$(du -sb "$images/ufs/layers" | cut -f1)" ]
}
disk_figures() { "$bin/cri" disk --address "$containerd_socket"; }
# containerd adds up what snapshots take every ten seconds.
has_figures() { [ "$(disk_figures | cut -d' ' -f2)" -gt 0 ]; }

# What a container has written becomes a layer: only that is in it.
commits_on_top() {
    local point=$work/committed
    k8s snapshots --snapshotter accel diff stays >"$work/diff.tar.gz"
    same "$(tar -tf "$work/diff.tar.gz" | grep -v '/$')" app/written
    k8s run -d --runc-root "$work/runc" --snapshotter accel "$implied" writer /bin/sh -c 'echo committed >/app/committed'
    wait_until stopped writer
    k8s tasks rm writer
    k8s snapshots --snapshotter accel commit committed writer
    mkdir -p "$point"
    k8s snapshots --snapshotter accel prepare --target "$point" on-top committed >"$work/mount-it"
    sh -e "$work/mount-it"
    same "$(cat "$point/app/committed" "$point/app/sticky/one")" "committed
one"
    umount "$point"
    k8s containers rm writer >/dev/null 2>&1 || true
    k8s snapshots --snapshotter accel rm on-top
    k8s snapshots --snapshotter accel rm committed
}
stopped() { k8s tasks ls | grep -q "^$1 .*STOPPED"; }

# Their output goes to files: `ctr run` can lose that of a container that ends at once.
ten_at_once() {
    local n pids=()
    mkdir -p "$work/ten"
    for n in {1..10}; do
        container "ten$n" "$tiny" --mount "type=bind,src=$work/ten,dst=/ten,options=rbind:rw" -- \
            /bin/sh -c "exec >/ten/$n; $program" &
        pids+=($!)
    done
    for n in {1..10}; do
        wait "${pids[n - 1]}"
        same "$(cat "$work/ten/$n")" "$(cat "$images/output")"
    done
    rm -r "$work/ten"
}

# `ctr` of 1.x downloads all layers before it asks a snapshotter.
ctr_pulls_lazily() {
    begin_log
    "${ctr[@]}" -n other images pull --plain-http --snapshotter accel "$tiny" >/dev/null
    # Another namespace may have had the config.
    same "$(since_then | grep /blobs/ | grep -vxF "$(the_config "$tiny")")" ""
    same "$("${ctr[@]}" -n other run --rm --runc-root "$work/runc" --snapshotter accel "$tiny" ctr1 /bin/sh -c "$program")" "$(cat "$images/output")"
    "${ctr[@]}" -n other images rm --sync "$tiny"
}

# Ids are mapped by mounts: not one file is copied up.
maps_ids() {
    local at
    k8s run -d --runc-root "$work/runc" --snapshotter accel --uidmap 0:100000:65536 --gidmap 0:200000:65536 --remap-labels \
        "$implied" mapped /bin/sh -c 'echo mapped >/app/mapped; exec sleep 1000000'
    wait_until k8s tasks exec --exec-id look mapped /bin/sh -c 'cat /app/mapped'
    # In the container files belong to whom they do in the image, and root may write.
    same "$(k8s tasks exec --exec-id owners mapped /bin/sh -c 'busybox stat -c %u:%g /bin /app/sticky /app/mapped')" "0:0
0:0
0:0"
    same "$(k8s tasks exec --exec-id who mapped /bin/sh -c 'busybox awk "{ print \$1, \$2 }" /proc/self/uid_map')" "0 100000"
    at=$(upper_of mapped)
    same "$(cd "$at" && find . -type f -printf '%p %U %G\n')" "./app/mapped 100000 200000"
    k8s tasks kill -s KILL mapped
    wait_until k8s containers rm mapped
    wait_until fails_quietly grep -q "$work/accel/idmaps/" /proc/self/mountinfo
    # Without the labels containerd maps nothing, and neither do we.
    same "$(container unmapped "$tiny" -- /bin/sh -c 'busybox stat -c %u /bin')" 0
}
fails_quietly() { ! "$@"; }

# containerd mounts the layers' devices itself, and the snapshotter gives it no directories.
mounts_natively() {
    stop_process "$snapshotter_pid"
    start_snapshotter --budget 120 --mounts native
    wait_until k8s snapshots --snapshotter accel ls
    same "$(container native "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    same "$(mounted_by_containerd)" 0
    k8s run -d --runc-root "$work/runc" --snapshotter accel "$implied" natively \
        /bin/sh -c 'echo written >/app/written; exec sleep 1000000'
    wait_until k8s tasks exec --exec-id look natively /bin/sh -c 'cat /app/written'
    same "$(k8s tasks exec --exec-id read natively /bin/sh -c 'cat /app/sticky/one')" one
    same "$(mounted_by_containerd)" "$(image_has layers "$implied")"
    same "$(cat "$(k8s snapshots --snapshotter accel mounts /nowhere natively | grep -o 'upperdir=[^, ]*' | cut -d= -f2)/app/written")" written
    k8s tasks kill -s KILL natively
    wait_until k8s containers rm natively
    wait_until nothing_mounted_by_containerd
    stop_process "$snapshotter_pid"
    start_snapshotter
    wait_until k8s snapshots --snapshotter accel ls
}
nothing_mounted_by_containerd() { same "$(mounted_by_containerd)" 0; }
mounted_by_containerd() { counted " $work/containerd-$containerd_version/.* - erofs " cat /proc/self/mountinfo; }
# mounts_natively_here VERSION: needs containerd 2.2, which no Debian has, and devices.
mounts_natively_here() {
    [ "$1" = 2 ] && [ "$transport" != fuse ] && [ -e /dev/ublk-control ] &&
        "$(peer containerd-2)/usr/bin/containerd" --version | grep -qE ' v?2\.([2-9]|[1-9][0-9])\.'
}

# The same for a pod with `hostUsers: false`, as a kubelet asks for it over the CRI: its files
# are root's in its own user namespace, and belong to whom they do in the image. From 2 on
# nothing was copied, neither into its upper directory nor into a snapshot below; 1.7 has
# copied all of an image into one snapshot more, and nothing is mapped on top of that.
runs_pods_with_their_own_users() {
    local pod id committed mounts lower
    cri pull "$pause"
    cri pull "$implied"
    committed=$(counted Committed k8s snapshots --snapshotter accel ls)
    own_users "$implied" &
    pod=$!
    wait_until id_of_the_pods_container
    id=$(id_of_the_pods_container)
    wait_until k8s tasks exec --exec-id look "$id" /bin/sh -c 'cat /app/mapped'
    mounts=$(k8s snapshots --snapshotter accel mounts /nowhere "$id")
    lower=$(grep -o 'lowerdir=[^, ]*' <<<"$mounts" | cut -d= -f2 | tr : '\n')
    case $containerd_version in
    1.*)
        same "$(counted "^$work/accel/idmaps/" echo "$lower")" 0
        same "$(wc -l <<<"$lower")" "$((1 + $(image_has layers "$implied")))"
        same "$(cd "$(head -n 1 <<<"$lower")" && find bin app/sticky -type f -printf '%p %U %G\n')" "bin/busybox 100000 100000
app/sticky/one 100012 100034"
        # And one of the sandbox's image.
        committed=$((committed + 2))
        ;;
    *)
        same "$(counted "^$work/accel/idmaps/" echo "$lower")" "$(image_has layers "$implied")"
        same "$(wc -l <<<"$lower")" "$(image_has layers "$implied")"
        ;;
    esac
    same "$(cd "$(upper_of "$id")" && find . -type f -size +0c -printf '%p %U %G\n')" "./app/mapped 100000 100000"
    same "$(counted Committed k8s snapshots --snapshotter accel ls)" "$committed"
    k8s tasks exec --exec-id enough "$id" /bin/sh -c ': >/app/enough'
    wait "$pod"
    same "$(cat "$work/own-users")" "0 100000 65536
0 100000 65536
0:0
12:34
0:0"
    forget_image "$pause"
    wait_until fails_quietly grep -q "$work/accel/idmaps/" /proc/self/mountinfo
}
# own_users IMAGE: runs such a pod until its container has a file /app/enough; what it printed
# is in own-users.
own_users() {
    "$bin/cri" pod --address "$containerd_socket" --user-namespace 100000 "$1" -- /bin/sh -c '
        busybox awk "{ print \$1, \$2, \$3 }" /proc/self/uid_map /proc/self/gid_map
        echo mapped >/app/mapped.new && busybox mv /app/mapped.new /app/mapped
        busybox stat -c %u:%g /bin /app/sticky/one /app/mapped
        until [ -e /app/enough ]; do busybox sleep 0.1; done' >"$work/own-users"
}
id_of_the_pods_container() {
    local id
    id=$(k8s containers ls -q 'labels."io.cri-containerd.kind"==container')
    [ -n "$id" ] && echo "$id"
}
upper_of() { k8s snapshots --snapshotter accel mounts /nowhere "$1" | grep -o 'upperdir=[^, ]*' | cut -d= -f2; }

# A pod's runtime class decides, if containerd is told of it when it pulls. Without,
# the image goes to the default snapshotter.
pulls_for_a_runtime_class() {
    local hits
    stop_process "$containerd_pid"
    start_node runtime-class
    forget_image "$tiny"
    hits=$(field hits)
    begin_log
    cri pull "$tiny" runc-accel
    same "$(since_then | grep /blobs/)" "$(the_config "$tiny")"
    same "$(field hits)" "$((hits + $(image_has layers "$tiny")))"
    same "$(container class "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    same "$(pod "$tiny" runc-accel)" "$(cat "$images/output")"
    forget_image "$tiny"
    begin_log
    cri pull "$tiny"
    same "$(since_then | grep -c /blobs/)" "$((1 + $(image_has layers "$tiny")))"
    same "$(field hits)" "$((hits + $(image_has layers "$tiny")))"
    same "$(pod "$tiny")" "$(cat "$images/output")"
    forget_image "$tiny"
    forget_image "$pause"
}
# forget_image IMAGE: with everything of it, so that the next pull begins anew.
forget_image() {
    cri remove "$1"
    k8s images rm --sync "$1" >/dev/null 2>&1 || true
}

# With containerd's transfer service, and without: 2.1 knows both.
pulls_without_the_transfer_service() {
    local hits
    stop_process "$containerd_pid"
    start_node default --local-pull
    hits=$(field hits)
    begin_log
    cri pull "$tiny"
    same "$(since_then | grep /blobs/)" "$(the_config "$tiny")"
    same "$(field hits)" "$((hits + $(image_has layers "$tiny")))"
    same "$(container local "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    forget_image "$tiny"
}

survives_its_own_death() {
    local layers
    layers=$(image_has layers "$implied")
    begin_log
    kill_now "$snapshotter_pid"
    stays killed
    start_snapshotter
    # containerd tries its connection again after a while.
    wait_until k8s snapshots --snapshotter accel ls
    stays restarted
    same "$(container after "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    same "$(counted '"mounted": true' status)" "$layers"
    asked_the_registry_nothing
}
asked_the_registry_nothing() { same "$(tail -n "+$((log_began + 1))" "$work/registry/log")" ""; }

# Ended, and killed.
survives_containerds_restart() {
    local end
    begin_log
    for end in stop_process kill_now; do
        $end "$containerd_pid"
        start_node
        stays "$end"
        same "$(container "again-$end" "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    done
    asked_the_registry_nothing
}

# A container reads the same files over and over while the server is killed: it waits for
# the next one, and goes on. What it has read is always the same.
survives_the_servers_death() {
    local reader read
    begin_log
    k8s tasks exec --exec-id reader stays /bin/sh -c 'while [ ! -e /app/enough ]; do
        busybox md5sum /bin/busybox /app/data/random | busybox md5sum; done' >"$work/read" &
    reader=$!
    wait_until has_read 1
    kill_now "$server_pid"
    # From here on it needs the server for every page.
    echo 3 >/proc/sys/vm/drop_caches
    wait_until waits_for_a_layer
    kill -0 "$reader"
    read=$(wc -l <"$work/read")
    start_server
    # The round that it was in, and a whole one.
    wait_until has_read $((read + 2))
    k8s tasks exec --exec-id enough stays /bin/sh -c ': >/app/enough'
    wait "$reader"
    same "$(sort -u "$work/read" | wc -l)" 1
    stays server
    same "$(container next "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    asked_the_registry_nothing
}
has_read() { [ "$(wc -l <"$work/read")" -ge "$1" ]; }
# Of the processes of the container that stays, one waits for what only a device can give.
waits_for_a_layer() {
    local pid
    for pid in $(k8s tasks ps stays | awk 'NR > 1 { print $1 }'); do
        ! grep -qs '^State:[[:space:]]*D' "/proc/$pid/status" || return 0
    done
    return 1
}

# With ublk-server down: questions, removal and ordinary snapshots go on.
answers_without_the_server() {
    stop_process "$server_pid"
    ordinary_life
    start_server
    wait_until all_mounted
    same "$(container mended "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
}
# Everything that must not need ublk-server.
ordinary_life() {
    k8s snapshots --snapshotter accel ls >/dev/null
    k8s snapshots --snapshotter accel usage >/dev/null
    k8s snapshots --snapshotter accel prepare ordinary >/dev/null
    k8s snapshots --snapshotter accel commit ordinary-done ordinary
    k8s snapshots --snapshotter accel prepare --target "$work/ordinary" ordinary2 ordinary-done >/dev/null
    k8s snapshots --snapshotter accel rm ordinary2
    k8s snapshots --snapshotter accel rm ordinary-done
}
all_mounted() {
    [ "$(counted '"served": false' server_status)" = 0 ] &&
        [ "$(counted '"trust": "manifest"' server_status)" = "$(image_has layers "$implied")" ]
}

# Nothing is left of an image that is removed.
leaves_nothing() {
    if [ "$(counted '^stays$' k8s containers ls -q)" != 0 ]; then
        k8s tasks kill -s KILL stays >/dev/null 2>&1 || true
        wait_until k8s containers rm stays
    fi
    cri remove "$tiny"
    cri remove "$implied"
    wait_until nothing_lazy
    same "$(counted '"trust"' server_status)" 0
}
starts_containerd() { start_node; }
ends_containerd() { stop_process "$containerd_pid"; }

# A layer that is not on UFS is unpacked; the container starts anyway.
falls_back() {
    local before hits
    stop_process "$server_pid"
    start_server "$work/empty-ufs"
    before=$(field fallbacks)
    cri pull "$tiny"
    same "$(field fallbacks)" "$((before + $(image_has layers "$tiny")))"
    status | grep -q '"absent"'
    same "$(container fallback "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    # Lazy on top of unpacked.
    stop_process "$server_pid"
    start_server
    hits=$(field hits)
    cri pull "$implied"
    same "$(field hits)" "$((hits + 1))"
    same "$(container mixed "$implied" -- /bin/sh -c 'cat /app/sticky/one')" one
    tree "$implied" accel k8s.io >"$work/tree"
    same_tree "$images/trees/$(basename "$implied")" "$work/tree"
    cri remove "$tiny"
    cri remove "$implied"
    wait_until nothing_lazy
}

# Told which UFS layers have to come from, the snapshotter takes them from no other:
# neither when it starts nor when the server is replaced.
keeps_to_its_ufs() {
    local hits layers
    layers=$(image_has layers "$tiny")
    kill_now "$snapshotter_pid"
    fails timeout 60 "$bin/accel-snapshotter" serve --root "$work/accel" --socket "$run/accel.sock" \
        --server "$run/ublk.sock" --ufs "$work/empty-ufs" 2>"$work/other-ufs.log"
    grep -q "reads the UFS $images/ufs, not $work/empty-ufs" "$work/other-ufs.log"
    # Another way to write the same path.
    start_snapshotter --budget 120 --ufs "$images/ufs/"
    wait_until asks_the_snapshotter
    hits=$(field hits)
    cri pull "$tiny"
    same "$(field hits)" "$((hits + layers))"
    same "$(counted "\"ufs\": \"$images/ufs/\{0,1\}\"" status)" 1
    forget_image "$tiny"
    wait_until nothing_lazy
    # The same layers, from where they must not come.
    ln -s "$images/ufs" "$work/linked-ufs"
    stop_process "$server_pid"
    start_server "$work/linked-ufs"
    cri pull "$tiny"
    same "$(field hits)" "$((hits + layers))"
    same "$(counted 'reads the UFS' status)" "$layers"
    same "$(container unpacked "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    forget_image "$tiny"
    stop_process "$server_pid"
    start_server
    another_snapshotter
    wait_until nothing_lazy
}

# The server does not move: one layer waits for the pull's whole time, the others for
# nothing; everything is unpacked and runs. What was half done is undone when it moves.
waits_for_a_server_once() {
    kill_now "$snapshotter_pid"
    start_snapshotter --budget 2
    wait_until k8s snapshots --snapshotter accel ls
    kill -STOP "$server_pid"
    # containerd's connection may be the old one still.
    wait_until cri pull "$tiny"
    kill -CONT "$server_pid"
    status >"$work/stopped.json"
    same "$(/usr/bin/python3 -c 'import json, sys; r = json.load(open(sys.argv[1]))["fallback_reasons"]; print(r["time"], r["breaker"])' "$work/stopped.json")" \
        "1 $(($(image_has layers "$tiny") - 1))"
    same "$(container stopped "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    cri remove "$tiny"
    wait_until nothing_lazy
}

# One image's layer under another's chain ID.
refuses_a_hostile_manifest() {
    local raw=$work/raw.json bad=$registry/test/bad:1
    skopeo copy --quiet --src-tls-verify=false "docker://$tiny" "dir:$work/bad"
    image_has manifest "$tiny" >"$raw"
    # The second layer says that it is the first.
    /usr/bin/python3 - "$raw" >"$work/bad/manifest.json" <<'PY'
import json, sys
manifest = json.load(open(sys.argv[1]))
first, second = manifest["layers"][:2]
second["annotations"] = first["annotations"]
json.dump(manifest, sys.stdout)
PY
    push_image "dir:$work/bad" "$bad"
    cri pull "$bad"
    status | grep -q '"chain": 1'
    same "$(container hostile "$bad" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    cri remove "$bad"
    wait_until nothing_lazy
}

# An image that was only converted is loaded lazily if the operator trusts UFS; an
# accelerated one takes nothing of it that it can be kept from.
trusts_ufs_if_told_to() {
    local plain=$registry/test/tiny:1 hits layers
    layers=$(image_has layers "$plain")
    hits=$(field hits)
    begin_log
    cri pull "$plain"
    same "$(since_then | grep -c /blobs/)" $((layers + 1))
    same "$(field hits)" "$hits"
    forget_image "$plain"
    wait_until no_snapshots
    echo 'trust_ufs = true' >"$work/trusting.toml"
    another_snapshotter --budget 120 --config "$work/trusting.toml"
    begin_log
    cri pull "$plain"
    same "$(since_then | grep /blobs/)" "$(the_config "$plain")"
    same "$(field hits)" "$layers"
    same "$(counted '"trust": "ufs"' status)" "$layers"
    same "$(counted '"trust": "ufs"' server_status)" "$layers"
    same "$(container trusting "$plain" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    tree "$plain" accel k8s.io >"$work/tree"
    same_tree "$images/trees/$(basename "$tiny")" "$work/tree"
    # One that names its layers' roots, of which it shares all but one with that.
    fails cri pull "$implied"
    same "$(field hits)" "$layers"
    # The other way round there is nothing to object to; what was not converted at all is
    # downloaded, and no fallback.
    forget_image "$plain"
    wait_until nothing_lazy
    cri pull "$implied"
    cri pull "$plain"
    same "$(counted '"trust": "ufs"' status)" 0
    forget_image "$plain"
    forget_image "$implied"
    cri pull "$pause"
    same "$(field fallbacks)" 0
    forget_image "$pause"
    another_snapshotter
    wait_until nothing_lazy
}
another_snapshotter() { # [OPTION…]
    kill_now "$snapshotter_pid"
    start_snapshotter "$@"
    wait_until asks_the_snapshotter
}
# containerd tries its connection again after a while. What it knows itself it does not ask.
asks_the_snapshotter() {
    k8s snapshots --snapshotter accel prepare asked && k8s snapshots --snapshotter accel rm asked
}
no_snapshots() { same "$(k8s snapshots --snapshotter accel ls | wc -l)" 1; }

# Pull, create and run of a program that only exits: no more is read from UFS than
# mounting takes and that program's file.
reads_what_the_mount_needs() {
    local needed all before probed=''
    stop_process "$server_pid"
    start_server
    [ "$(server_field transport)" != ublk ] || probed=--probed
    read -r needed all < <(/usr/bin/python3 "$repo/tests/containerd/mount_needs.py" $probed "$bin/mkfs-accel" "$images/ufs" \
        "docker://$made_at/test/tiny:1" /bin/busybox)
    before=$(server_field fetched_bytes)
    cri pull "$tiny"
    container exits "$tiny" -- /bin/sh -c 'exit 0'
    before=$(($(server_field fetched_bytes) - before))
    echo "read $before bytes; the mount needs $needed; the image has $all"
    # Not one list with &&: `set -e` overlooks what fails in such a list before its end.
    [ "$before" -gt 0 ]
    [ "$before" -le "$needed" ]
    [ "$needed" -lt "$all" ]
    cri remove "$tiny"
    wait_until nothing_lazy
}

# What needs a layer's original bytes has none of a lazily pulled image, and says so;
# pulled once more for another snapshotter, they are there.
exports_what_was_downloaded() {
    cri pull "$tiny"
    fails k8s images export "$work/exported.tar" "$tiny"
    fails k8s images push --plain-http "$registry/test/pushed:1" "$tiny"
    fails k8s run --rm --runc-root "$work/runc" --snapshotter overlayfs "$tiny" other /bin/sh -c "$program"
    # What the README says to do instead.
    k8s images pull --plain-http "$tiny" >/dev/null
    k8s images export "$work/exported.tar" "$tiny"
    k8s images push --plain-http "$registry/test/pushed:1" "$tiny" >/dev/null
    same "$(image_has digests "$registry/test/pushed:1")" "$(image_has digests "$tiny")"
    same "$(k8s run --rm --runc-root "$work/runc" --snapshotter overlayfs "$tiny" other /bin/sh -c "$program")" "$(cat "$images/output")"
    same "$(container lazy "$tiny" -- /bin/sh -c "$program")" "$(cat "$images/output")"
    forget_image "$tiny"
    wait_until nothing_lazy
}

# What the README tells to do on a node, word by word, with the real paths: only on a
# machine that is thrown away afterwards. There is no systemd and no crictl there; what
# stands for them does what they are asked for in the README.
follows_the_readme() {
    local programs=$work/readme/bin
    stop_process "$server_pid"
    stop_process "$snapshotter_pid"
    mkdir -p "$programs" /etc/containerd
    # It is written to.
    cp -a "$images/ufs" /mnt/
    cp "$bin"/{mkfs-accel,ublk-server,accel-snapshotter,cri} "$programs/"
    cp "$(peer containerd-1.7)"/usr/bin/{containerd,ctr,containerd-shim-runc-v2} "$(peer runc)/usr/sbin/runc" "$programs/"
    printf '#!/bin/sh\n[ "$1" = pull ] && exec cri pull --address /run/containerd/containerd.sock "$2"\nexit 9\n' >"$programs/crictl"
    cat >"$programs/systemctl" <<'SH'
#!/bin/sh
[ "$*" = "restart containerd" ] || exit 9
[ ! -e /run/containerd.pid ] || kill "$(cat /run/containerd.pid)"
containerd >/run/containerd.log 2>&1 &
echo $! >/run/containerd.pid
until ctr version >/dev/null 2>&1; do sleep 0.2; done
SH
    chmod +x "$programs"/*
    printf 'version = 2\n# nothing of ours\n[plugins."io.containerd.grpc.v1.cri"]\n  sandbox_image = "pause"\n' >/etc/containerd/config.toml
    /usr/bin/python3 - "$repo/README.md" "$registry/test/tiny" >"$work/readme/steps" <<'PY'
import re, sys
text = open(sys.argv[1]).read().split("\n## With containerd\n")[1].split("\n## ")[0]
for block in re.findall(r"```sh\n(.*?)```", text, re.S):
    block = block.replace("registry.example:5000/team/app:v1", sys.argv[2] + ":1")
    # The registry on loopback has no TLS.
    print(re.sub(r"^mkfs-accel convert", "mkfs-accel convert --plain-http", block))
PY
    begin_log
    (
        export PATH=$programs:$PATH LD_LIBRARY_PATH=$ACCEL_PEERS/libseccomp2/usr/lib/x86_64-linux-gnu
        # Each line is typed when the one before is done: daemons answer by then.
        sed -e 's/^\([a-z-]*\) serve\(.*\) &$/\1 serve\2 >>"$work\/readme\/daemons" 2>\&1 \& until \1 status >\/dev\/null 2>\&1; do sleep 0.2; done/' \
            "$work/readme/steps" >"$work/readme/typed"
        # It is read in the checkout.
        cd "$repo" && work=$work sh -ex "$work/readme/typed"
    ) >"$work/readme/output" || { cat "$work/readme/output"; return 1; }
    grep -qxF "$(cat "$images/output")" "$work/readme/output"
    grep -q '^hits *2$' "$work/readme/output"
    grep -q '^fallbacks *0$' "$work/readme/output"
    grep -q '^0 faults, 0 warnings' "$work/readme/output"
    grep -q '# nothing of ours' /etc/containerd/config.toml
    # The last pull: what convert has read is in the log too.
    same "$(since_then | grep '/test/tiny/blobs/' | sort -u | grep -cF "$(image_has config "$tiny")")" 1
}

# A hundred layers: as many exports and mounts, and one overlay over them.
runs_a_hundred_layers() {
    begin_log
    cri pull "$deep"
    same "$(since_then | grep /blobs/)" "$(the_config "$deep")"
    same "$(lazy_mounts)" 100
    same "$(container deep "$deep" -- /bin/sh -c "$files")" "$(cat "$images/output-deep")"
    cri remove "$deep"
    wait_until nothing_lazy
}

# Killed while a hundred layers are being pulled, at several moments: pulled again the
# image runs, and in the end nothing is left of it.
survives_death_while_pulling() {
    local victim moment
    another_snapshotter --budget 20
    for victim in server snapshotter containerd; do
        for moment in 0 1 70; do
            begin_pull "$moment"
            echo "--- $victim is killed with $(lazy_mounts) layers mounted"
            case $victim in
            server) kill_now "$server_pid"; start_server ;;
            snapshotter) kill_now "$snapshotter_pid"; start_snapshotter --budget 20 ;;
            containerd) kill_now "$containerd_pid"; start_node ;;
            esac
            wait "$pull_pid" || true
            ordinary_life_soon
            pulls_again_what_was_begun
        done
    done
}
# UFS goes away while layers are being pulled, without an answer or with the answer that
# there is nothing: what is missing is unpacked. When it is back all is lazy again.
survives_a_ufs_that_goes_while_pulling() {
    local moment how reason deep=$deep
    # Without a word of what it was made from nothing is looked up ahead: then UFS is
    # asked for one layer after the other.
    without_look_ahead "$deep" "$registry/test/deep:alone"
    deep=$registry/test/deep:alone
    server_on_slow_ufs
    for how in stalls goes; do
        for moment in 0 30; do
            # With nothing left of the time-out before.
            another_snapshotter --budget 3
            begin_pull "$moment"
            echo "--- UFS $how with $(lazy_mounts) layers mounted"
            case $how in
            stalls) kill -STOP "$slow_pid"; reason=time ;;
            goes) mv "$images/ufs/layers" "$images/ufs/away"; reason=absent ;;
            esac
            wait "$pull_pid"
            status >"$work/away.json"
            grep '^    "' "$work/away.json"
            grep -q "\"$reason\": " "$work/away.json"
            [ "$(field hits)" -ge "$moment" ]
            ordinary_life
            case $how in
            stalls) kill -CONT "$slow_pid" ;;
            goes) mv "$images/ufs/away" "$images/ufs/layers" ;;
            esac
            pulls_again_what_was_begun
        done
    done
    another_snapshotter
    cri pull "$deep"
    same "$(field hits)" 100
    forget_image "$deep"
    wait_until nothing_lazy
    server_on_ufs
}
# UFS does not answer while a container starts, and while one runs: they wait, nothing
# else does, and they go on when it answers.
survives_a_ufs_that_stalls_while_running() {
    local waiting sum='busybox md5sum /app/data/random'
    server_on_slow_ufs
    cri pull "$tiny"
    kill -STOP "$slow_pid"
    container waits "$tiny" -- /bin/sh -c "$program" >"$work/waits" &
    waiting=$!
    ordinary_life
    kill -0 "$waiting"
    kill -CONT "$slow_pid"
    wait "$waiting"
    same "$(cat "$work/waits")" "$(cat "$images/output")"
    k8s run -d --runc-root "$work/runc" --snapshotter accel "$tiny" reads /bin/sh -c 'exec sleep 1000000'
    # Whatever the program needs is in memory by then, and what it reads is not.
    wait_until k8s tasks exec --exec-id first reads busybox md5sum /app/data/greeting
    kill -STOP "$slow_pid"
    k8s tasks exec --exec-id stalled reads /bin/sh -c "$sum" >"$work/waits" &
    waiting=$!
    ordinary_life
    kill -0 "$waiting"
    kill -CONT "$slow_pid"
    wait "$waiting"
    same "$(k8s tasks exec --exec-id again reads /bin/sh -c "$sum")" "$(cat "$work/waits")"
    k8s tasks kill -s KILL reads
    wait_until k8s containers rm reads
    forget_image "$tiny"
    wait_until nothing_lazy
    server_on_ufs
}
# server_on_slow_ufs: the server reads UFS through a process, $slow_pid, that can be
# stopped; server_on_ufs: no more.
server_on_slow_ufs() {
    mkdir -p "$work/slow"
    "$bin/slow-ufs" "$images/ufs" "$work/slow" &
    slow_pid=$!
    at_exit stop_process "$slow_pid"
    wait_until mountpoint -q "$work/slow"
    stop_process "$server_pid"
    start_server "$work/slow"
}
server_on_ufs() {
    stop_process "$server_pid"
    umount -l "$work/slow"
    stop_process "$slow_pid"
    start_server
}
# without_look_ahead IMAGE COPY: as converters made it before there was any.
without_look_ahead() {
    skopeo copy --quiet --src-tls-verify=false "docker://$1" "dir:$work/alone"
    image_has manifest "$1" >"$work/raw.json"
    /usr/bin/python3 - "$work/raw.json" >"$work/alone/manifest.json" <<'PY'
import json, sys
manifest = json.load(open(sys.argv[1]))
for layer in manifest["layers"]:
    del layer["annotations"]["containerd.io/snapshot/accel.image"]
json.dump(manifest, sys.stdout)
PY
    push_image "dir:$work/alone" "$2"
}
# begin_pull N: until that many layers are mounted, with 0 until the registry has been
# asked for the manifest; sets pull_pid. The pull goes on then.
begin_pull() {
    begin_log
    cri pull "$deep" >"$work/begun" 2>&1 &
    pull_pid=$!
    until asked_for_the_manifest && [ "$(lazy_mounts)" -ge "$1" ]; do
        under_way || return
        sleep 0.01
    done
    under_way
}
asked_for_the_manifest() { tail -n "+$((log_began + 1))" "$work/registry/log" | grep -q "/v2/test/deep/manifests/"; }
under_way() { kill -0 "$pull_pid" || { echo "the pull ended before its time:"; cat "$work/begun"; return 1; }; }
ordinary_life_soon() {
    wait_until asks_the_snapshotter
    ordinary_life
}
pulls_again_what_was_begun() {
    local lease
    wait_until cri pull "$deep"
    same "$(container begun "$deep" -- /bin/sh -c "$files")" "$(cat "$images/output-deep")"
    forget_image "$deep"
    # A pull that died with containerd keeps what it had for a day.
    for lease in $(k8s leases ls -q); do k8s leases rm --sync "$lease"; done
    wait_until nothing_lazy
    wait_until no_snapshots
    wait_until nothing_attached
}
nothing_attached() {
    [ "$(counted '"trust"' server_status)" = 0 ] && empty "$run"/ublk.sock.d/{exports,journal}
}

# Stopped with nobody reading, and started again.
goes_on_without_the_server() {
    cri pull "$tiny"
    cri pull "$implied"
    answers_without_the_server
    cri remove "$tiny"
    cri remove "$implied"
    wait_until nothing_lazy
}

# checks_for VERSION: the names of those that show something with this version of
# containerd, in the order in which they build on each other.
checks_for() {
    local all=(pulls_lazily pulls_again runs runs_a_linked_program runs_pods trees_are_overlayfs
        writes_stay_in_the_container gives_disk_figures commits_on_top ten_at_once)
    [ "$1" != 2 ] || all+=(ctr_pulls_lazily maps_ids)
    # 1.6 does not look whether a pod wants any.
    [ "$1" = 1.6 ] || all+=(runs_pods_with_their_own_users)
    ! mounts_natively_here "$1" || all+=(mounts_natively)
    all+=(survives_its_own_death survives_the_servers_death survives_containerds_restart leaves_nothing
        reads_what_the_mount_needs)
    [ "$1" != 2 ] || all+=(runs_a_hundred_layers pulls_without_the_transfer_service
        survives_death_while_pulling survives_a_ufs_that_stalls_while_running)
    [ "$1" = 1.6 ] || all+=(pulls_for_a_runtime_class)
    all+=(doctor_mends_a_configuration doctor_mends_each_fault ends_containerd)
    [ "$1" != 1.7 ] || all+=(follows_the_readme)
    echo "${all[@]}"
}
# Those that are for a machine that is thrown away.
checks_of_guests=(follows_the_readme)
# Those of how images are made.
checks_of_images=(runs_with_overlayfs is_the_same_image writes_a_layout tries_the_right_to_push)
# Those for which one version is enough, on the machine that has made the images.
checks_here=(starts_containerd goes_on_without_the_server falls_back keeps_to_its_ufs refuses_a_hostile_manifest
    exports_what_was_downloaded runs_a_hundred_layers waits_for_a_server_once trusts_ufs_if_told_to
    survives_death_while_pulling survives_a_ufs_that_goes_while_pulling survives_a_ufs_that_stalls_while_running)
# Those whose subject are layers that are unpacked, or that look for them themselves.
checks_of_fallbacks=(falls_back keeps_to_its_ufs refuses_a_hostile_manifest waits_for_a_server_once
    survives_death_while_pulling survives_a_ufs_that_goes_while_pulling follows_the_readme
    doctor_mends_each_fault)
