# shellcheck shell=bash
# What tests/cluster-e2e checks. Needs cluster.sh, peers.sh and processes.sh.
#
# In: work, bin, registry

# push_program_images: of our programs.
push_program_images() {
    local program
    "$repo/tools/images" --bin "$bin" "$work/made/programs"
    for program in mkfs-accel accel-controller; do
        push_image "oci:$work/made/programs:$program" "$registry/accel/$program:1"
    done
}

# make_cluster_images: what is converted.
make_cluster_images() {
    local n
    # Two layers; the second image has one more on top.
    "$repo/tools/sample-image" --size tiny "$work/made/tiny"
    push_image "oci:$work/made/tiny:sample" "$registry/team/tiny:1"
    mkdir "$work/made/more"
    echo more >"$work/made/more/of-it"
    tar -C "$work/made/more" -cf "$work/made/more.tar" --numeric-owner --owner=0 --group=0 ./of-it
    umoci tag --image "$work/made/tiny:sample" more
    umoci raw add-layer --image "$work/made/tiny:more" "$work/made/more.tar" >/dev/null
    push_image "oci:$work/made/tiny:more" "$registry/team/more:1"
    # One that takes its time.
    mkdir "$work/made/large"
    head -c 400M /dev/urandom >"$work/made/large/data"
    tar -C "$work/made/large" -cf "$work/made/large.tar" --numeric-owner --owner=0 --group=0 ./data
    rm -r "$work/made/large"
    "$repo/tools/lib/oci_layout.py" "$work/made/large" large "$work/made/large.tar"
    push_image "oci:$work/made/large:large" "$registry/team/large:1"
    rm -r "$work/made/large" "$work/made/large.tar"
    # Some that are quick, for many at once.
    busybox_layer "$work/made/base.tar"
    for n in 1 2 3 4; do
        echo "$n" >"$work/made/more/of-it"
        tar -C "$work/made/more" -cf "$work/made/$n.tar" --numeric-owner --owner=0 --group=0 ./of-it
        "$repo/tools/lib/oci_layout.py" "$work/made/many" "$n" "$work/made/base.tar" "$work/made/$n.tar"
        push_image "oci:$work/made/many:$n" "$registry/many/of:$n"
    done
}

k() { "${kubectl[@]}" "$@"; }
# task NAME SOURCE [LINE OF THE SPEC…]: makes or changes one.
task() {
    local name=$1 source=$2
    shift 2
    {
        printf 'apiVersion: image-accel.io/v1alpha1\nkind: AcceleratedImage\nmetadata: {name: %s}\n' "$name"
        printf 'spec:\n  source: "%s"\n' "$source"
        [ $# = 0 ] || printf '  %s\n' "$@"
    } | k apply -f -
}
of_task() { k get acceleratedimage "$1" -o "jsonpath={.status.$2}"; }
condition() { of_task "$1" "conditions[?(@.type==\"$2\")].$3"; }
# used_by TASK COUNT [NODE…]: as its status says.
used_by() {
    local task=$1 count=$2
    shift 2
    [ "$(of_task "$task" usedByCount) $(of_task "$task" 'usedBy[*]')" = "$count $*" ]
}
phase_is() { [ "$(of_task "$1" phase)" = "$2" ]; }
becomes() { wait_until phase_is "$1" "$2" || { k get acceleratedimage "$1" -o yaml; return 1; }; }
# nothing CMD…: it succeeds, and says nothing.
nothing() { local said; said=$("$@") && [ -z "$said" ]; }
is_gone() { nothing k get acceleratedimage "$1" -o name --ignore-not-found; }
jobs() { k -n image-accel get jobs -o name; }
no_jobs() { nothing jobs; }
pod_ended() { [ "$(k get pod "$1" -o 'jsonpath={.status.phase}')" = Succeeded ]; }
# service LINE OF THE SPEC…
service() {
    {
        printf 'apiVersion: image-accel.io/v1alpha1\nkind: ImageAcceleration\nmetadata: {name: cluster}\nspec:\n'
        printf '  ufs: {claimName: ufs}\n  registry: {plainHttp: true}\n'
        printf '  %s\n' "$@"
    } | k apply -f -
}
leader() { k -n image-accel get lease accel-controller -o 'jsonpath={.spec.holderIdentity}'; }
leads() { [ -n "$(leader)" ]; }
# Another than $before.
another_leads() { [ -n "$(leader)" ] && [ "$(leader)" != "$before" ]; }
events_of() {
    k get events.events.k8s.io -o json |
        jq -r --arg name "$1" '.items[] | select(.regarding.kind == "AcceleratedImage" and .regarding.name == $name) | .reason'
}
accel() { PATH=$bin:$PATH "${kubectl[@]}" accel "$@"; }
# UFS as the node has it: a mount, as ever.
mount_node_ufs() { mount --bind "$work/ufs" "$work/node-ufs"; }
start_agent() {
    "$bin/accel-snapshotter" agent --ufs "$work/node-ufs" --must-be-mounted --node n1 --socket "$run/accel.sock" \
        --health "$run/health.json" --cluster "$(k get namespace kube-system -o 'jsonpath={.metadata.uid}')" \
        >>"$work/agent.log" 2>&1 &
    agent_pid=$!
    at_exit stop_process "$agent_pid"
}
# start_node_agent NODE: as the guide says; KUBECONFIG is the node's own. Sets node_agent_pid.
start_node_agent() {
    local node=$1 token
    "$bin/accel-controller" node-access "$node" | k apply -f -
    has_token() { [ -n "$(k -n image-accel get secret "accel-node-$node" -o 'jsonpath={.data.token}')" ]; }
    wait_until has_token
    token=$(k -n image-accel get secret "accel-node-$node" -o 'jsonpath={.data.token}' | base64 -d)
    (umask 077 && cluster_kubeconfig "$node" "$token" >"$work/$node.kubeconfig")
    KUBECONFIG=$work/$node.kubeconfig "$bin/accel-controller" node --node "$node" --health "$run/health.json" \
        >>"$work/node.log" 2>&1 &
    node_agent_pid=$!
    at_exit stop_process "$node_agent_pid"
}
label=node.uk8s.ucloud.cn/uimgacc
label_of() { k get node "$1" -o "jsonpath={.metadata.labels.${label//./\\.}}"; }
labelled() { [ "$(label_of "${1:-n1}")" = true ]; }
not_labelled() { nothing label_of "${1:-n1}"; }
nodes_are() { [ "$(k get imageacceleration cluster -o 'jsonpath={.status.nodesText}')" = "$1" ]; }
says() { accel nodes | grep -E "^$1 +$2 +$3"; }
with_nodes() { k patch imageacceleration cluster --type merge -p "{\"spec\": {\"nodes\": $1}}"; }
another_node() { printf 'apiVersion: v1\nkind: Node\nmetadata: {name: n2}\n' | k create -f -; }
# Whatever the node is like from here on until never_without_label.
begin_to_watch() {
    "${kubectl[@]}" get node n1 --watch -o "jsonpath={.metadata.labels.${label//./\\.}}{\"\n\"}" >"$work/labels" 3>&- &
    watch_pid=$!
    at_exit stop_process "$watch_pid"
    is_watched() { [ -s "$work/labels" ]; }
    wait_until is_watched
}
never_without_label() {
    local seen
    # What the cluster is told last is seen last.
    seen=$(wc -l <"$work/labels")
    k annotate --overwrite node n1 seen="$seen"
    sees_more() { [ "$(wc -l <"$work/labels")" -gt "$seen" ]; }
    wait_until sees_more
    stop_process "$watch_pid"
    same "$(sort -u "$work/labels")" true
}
canary() { cat "$work/node-ufs/nodes/"*.n1.canary; }
on_ufs() { find "$work/ufs" -name '*.erofs' | wc -l; }

cluster_checks=(
    follows_the_guide
    installs refuses_what_cannot_be waits_for_the_service converts says_what_happened shares_layers runs_lazily
    runs_without_the_service takes_ufs_by_its_path tells_what_is_wrong_with_ufs tells_errors_in_words keeps_to_the_limit survives_kills
    passes_on_the_lead logs_in
    labels_nodes_that_can_serve labels_nodes_that_are_meant takes_the_label_while_ufs_is_away
    keeps_the_label_through_trifles survives_kills_on_the_node tells_prometheus
    waits_for_who_uses_it removes_what_nobody_needs deletes_while_ufs_is_away asks_for_nodes_that_are_silent
    deletes turns_off
    obeys_the_plug_in purges
)

# What somebody does with it from beginning to end, some of it broken meanwhile.
cluster_story=(
    follows_the_guide installs waits_for_the_service converts shares_layers runs_lazily runs_without_the_service
    survives_kills labels_nodes_that_can_serve takes_the_label_while_ufs_is_away survives_kills_on_the_node
    waits_for_who_uses_it removes_what_nobody_needs turns_off
)

# of_guide FROM TO: what the guide says to type between these headings, with the paths that
# things have here. The registry on loopback has no TLS, and this cluster has nothing that leads
# to its services.
of_guide() {
    /usr/bin/python3 - "$repo/deploy/kubernetes/README.md" "$1" "$2" >"$guide/steps" <<'PY'
import re, sys
guide, first, last = sys.argv[1:]
text = open(guide).read()
print("\n".join(re.findall(r"^```sh\n(.*?)^```", text[text.index(first) : text.index(last) if last else None], re.S | re.M)))
PY
    # What comes in must not be taken for what the guide says: /tmp is part of many a path.
    sed -e '/^cargo build /d' -e 's|NODE|n1|g' -e "s|/tmp/|$guide/|g" -e "s|target/release|$bin|g" \
        -e "s|/usr/local/bin/|$guide/bin/|" -e "s|/mnt/ufs|$work/node-ufs|g" -e "s|/run/accel-agent|$guide/run|g" \
        -e "s|/etc/image-accel|$guide/etc|g" -e "s|registry\.example:5000|$registry|g" \
        -e "s|accel-snapshotter agent|& --socket $run/accel.sock|" \
        -e "s|nfs: {server: nfs.example, path: /ufs}|hostPath: {path: $work/ufs, type: Directory}|" \
        -e 's|^ *skopeo copy|& --dest-tls-verify=false|' -e 's|kubectl accel enable|& --plain-http|' \
        -e "s|^kubectl apply -k .*|&; kubectl -n image-accel set env deployment/accel-controller \
KUBERNETES_SERVICE_HOST=$cluster_address KUBERNETES_SERVICE_PORT=${cluster_server##*:}|" "$guide/steps" >"$guide/typed"
    (
        cd "$repo"
        PATH=$guide/bin:$bin:$(dirname "${kubectl[0]}"):$PATH timeout 1200 sh -ex "$guide/typed"
    ) >>"$guide/output" 2>&1 || { cat "$guide/output"; return 1; }
}

# What the guide says, word by word, from nothing to nothing.
follows_the_guide() {
    local guide=$work/guide kustomize
    at_exit end_guide_agents
    mkdir -p "$guide/bin" "$guide/etc"
    umoci config --image "$work/made/tiny:sample" --tag app --config.cmd /bin/sh --config.cmd -c \
        --config.cmd 'trap exit TERM; echo works; while :; do sleep 1; done'
    push_image "oci:$work/made/tiny:app" "$registry/team/app:v1"
    of_guide '## The programs' '## Each node'
    # The machine is both.
    of_guide '## Each node' 'Bring it to the node'
    cp "$guide/n1.kubeconfig" "$guide/etc/kubeconfig"
    cp "$guide/cluster-id" "$guide/etc/"
    of_guide 'Bring it to the node' '## And back'
    app_works() { k logs app | grep -qx works; }
    wait_until app_works
    labelled
    same "$(field fallbacks)" 0
    same "$(field hits)" 2
    # Later versions of kubectl read the base in the same way.
    for kustomize in "${kubectl[0]}" "$(unpack_deb kubectl trixie)/usr/bin/kubectl"; do
        same "$("$kustomize" kustomize "$guide/image-accel" | grep -oE '(image|value): .*accel.*' | sort | xargs)" \
            "image: $registry/accel/accel-controller:1 value: $registry/accel/mkfs-accel:1"
    done
    of_guide '## And back' ''
    # Of what it has made nothing is left.
    not_labelled
    k get crd,namespaces,pv -o name >"$guide/left"
    fails grep -e accel -e ufs "$guide/left"
    k get clusterroles,clusterrolebindings -o name >"$guide/left"
    fails grep accel "$guide/left"
    same "$(on_ufs)" 0
    not_there team/app v1-acc
    # Nor on the node, for what follows.
    # shellcheck disable=SC2046 # a list of names
    node_ctr images remove --sync $(node_ctr images list -q | grep -v "^$pause")
    wait_until nothing_lazy
    holds_nothing() { [ "$(cat "$work/ufs/nodes/"*.n1.*.json | jq '.held | length')" = 0 ]; }
    wait_until holds_nothing
    [ "$(guide_agents | wc -w)" = 2 ]
    end_guide_agents
}
guide_agents() { pid_of "$work/guide/run/health.json"; }
end_guide_agents() {
    # shellcheck disable=SC2046 # a list of numbers
    [ -z "$(guide_agents)" ] || kill $(guide_agents)
    no_guide_agents() { [ -z "$(guide_agents)" ]; }
    wait_until no_guide_agents
    # In a trap `return` gives what was before it.
    true
}
node_ctr() { "$(peer containerd-1.6)/usr/bin/ctr" --address "$node_containerd/socket" -n k8s.io "$@"; }

# The base as it is, with what differs from cluster to cluster.
installs() {
    local overlay=$work/overlay
    mkdir -p "$overlay"
    cp -r "$repo/deploy/kubernetes" "$overlay/base"
    # As kubectl of 1.20 understands it; of today the base is one of the resources, too.
    cat >"$overlay/kustomization.yaml" <<YAML
bases: [base]
namespace: image-accel
images:
  - {name: accel-controller, newName: $registry/accel/accel-controller, newTag: "1"}
patchesStrategicMerge: [controller.yaml]
YAML
    cat >"$overlay/controller.yaml" <<YAML
apiVersion: apps/v1
kind: Deployment
metadata: {name: accel-controller, namespace: image-accel}
spec:
  template:
    spec:
      containers:
        - name: controller
          # On a machine that is busy with other tests, too.
          resources: {requests: {cpu: 300m}}
          env:
            - {name: JOB_IMAGE, value: "$registry/accel/mkfs-accel:1"}
            # This cluster has nothing that leads to its services.
            - {name: KUBERNETES_SERVICE_HOST, value: "$cluster_address"}
            - {name: KUBERNETES_SERVICE_PORT, value: "${cluster_server##*:}"}
YAML
    # The definitions first: what follows needs them.
    k apply -f "$overlay/base/crds"
    k wait --for condition=established crd/acceleratedimages.image-accel.io crd/imageaccelerations.image-accel.io
    k apply -k "$overlay"
    k apply -f - <<YAML
apiVersion: v1
kind: PersistentVolume
metadata: {name: ufs}
spec:
  capacity: {storage: 100Gi}
  accessModes: [ReadWriteMany]
  claimRef: {namespace: image-accel, name: ufs}
  hostPath: {path: $work/ufs, type: Directory}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: ufs, namespace: image-accel}
spec:
  accessModes: [ReadWriteMany]
  storageClassName: ""
  volumeName: ufs
  resources: {requests: {storage: 1Gi}}
YAML
    k -n image-accel rollout status deployment/accel-controller --timeout 300s
    wait_until leads
}

refuses_what_cannot_be() {
    local spec
    refused() { { k apply --validate=false --dry-run=server -f - 2>&1 || true; } | grep -F "$1"; }
    spec_refused() { # WHAT IT SAYS, SPEC
        printf 'apiVersion: image-accel.io/v1alpha1\nkind: AcceleratedImage\nmetadata: {name: bad}\nspec: %s\n' "$2" | refused "$1"
    }
    spec_refused 'spec.source in body should match' '{source: "no registry"}'
    spec_refused 'spec.source in body should match' '{source: "h/UPPER:1"}'
    spec_refused 'spec.target in body should match' '{source: "h/a:1", target: "h/a"}'
    spec_refused 'spec.platforms in body should match' '{source: "h/a:1", platforms: [linux]}'
    spec_refused 'spec.secretName in body should match' '{source: "h/a:1", secretName: other/login}'
    spec_refused 'spec.source: Required value' '{target: "h/a:1"}'
    # The definition knows one name.
    printf 'apiVersion: image-accel.io/v1alpha1\nkind: ImageAcceleration\nmetadata: {name: other}\nspec: {ufs: {claimName: u}}\n' |
        refused 'metadata.name in body should match'
    # UFS is in one place.
    ufs_is() { # SPEC
        printf 'apiVersion: image-accel.io/v1alpha1\nkind: ImageAcceleration\nmetadata: {name: cluster}\nspec: {ufs: %s}\n' "$1"
    }
    ufs_is '{}' | refused 'must validate one and only one schema'
    ufs_is '{claimName: u, hostPath: /u}' | refused 'must validate one and only one schema'
    ufs_is '{nfs: {server: h, path: u}}' | refused 'spec.ufs.nfs.path in body should match'
    ufs_is '{hostPath: u}' | refused 'spec.ufs.hostPath in body should match'
    for spec in '{claimName: u}' '{nfs: {server: h, path: /u}}' '{hostPath: /u}'; do
        ufs_is "$spec" | k apply --dry-run=server -f -
    done
    # And none of these fails because of something else.
    printf 'apiVersion: image-accel.io/v1alpha1\nkind: AcceleratedImage\nmetadata: {name: good}\nspec: {source: "h/a:1", platforms: [linux/amd64, all]}\n' |
        k apply --dry-run=server -f -
}

waits_for_the_service() {
    task tiny "$registry/team/tiny:1"
    becomes tiny Creating
    same "$(condition tiny Accepted reason)" Disabled
    no_jobs
}

converts() {
    service 'jobs: {limit: 2, retries: 0, memoryMib: 256, cpuMillis: 300}'
    becomes tiny Ready
    same "$(of_task tiny target)" "$registry/team/tiny:1-acc"
    same "$(of_task tiny targetDigest)" "$(skopeo inspect --tls-verify=false --format '{{.Digest}}' "docker://$registry/team/tiny:1-acc")"
    same "$(of_task tiny layers)" 2
    same "$(of_task tiny originalBytes)" \
        "$(skopeo inspect --tls-verify=false --raw "docker://$registry/team/tiny:1" | jq '[.layers[].size] | add')"
    # By what is on top nodes tell which image they use: none does.
    same "$(of_task tiny 'chainIds[*]')" \
        "$("$bin/mkfs-accel" inspect "docker://$registry/team/tiny:1" --ufs "$work/ufs" --json | jq -r '.layers[-1].chain_id')"
    wait_until used_by tiny 0
    # Every byte that it left there is the original's.
    "$bin/mkfs-accel" verify "docker://$registry/team/tiny:1" --ufs "$work/ufs"
    # What the Job had to say is in the status; nothing is left of it.
    wait_until no_jobs
    service_counts() { [ "$(k get imageacceleration cluster -o 'jsonpath={.status.images}')" = 1 ]; }
    wait_until service_counts
    same "$(k get imageacceleration cluster -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" True
}

says_what_happened() {
    same "$(events_of tiny | sort | xargs)" 'Creating Ready'
    k get acceleratedimages | grep -E '^tiny +Ready .*team/tiny:1 .*team/tiny:1-acc .*MiB +0 +[0-9]'
}

shares_layers() {
    local before
    before=$(on_ufs)
    task more "$registry/team/more:1" "target: $registry/elsewhere/more:fast"
    becomes more Ready
    same "$(on_ufs)" $((before + 1))
    same "$(of_task more layers)" 3
    same "$(of_task more sharedBytes)" "$(of_task tiny storedBytes)"
    same "$(of_task tiny sharedBytes)" 0
    skopeo inspect --tls-verify=false "docker://$registry/elsewhere/more:fast" >/dev/null
}

# On the node, which has the snapshotter: no layer is downloaded.
runs_lazily() {
    begin_log
    k run lazy --image "$registry/team/tiny:1-acc" --image-pull-policy Always --restart Never --command -- \
        /bin/sh -c /app/hello
    wait_until pod_ended lazy
    k logs lazy | grep .
    same "$(since_then | grep /blobs/)" "$(the_config "$registry/team/tiny:1-acc")"
    same "$(field fallbacks)" 0
}

# The same tag on a node that has nothing of ours: an ordinary image.
runs_without_the_service() {
    local kubelet ours=$node_containerd containerd=$containerd_pid output
    output=$(k logs lazy)
    begin_log
    start_cluster_node plain "$pause"
    kubelet=${_cluster_pids[kubelet-plain]}
    k run plain --image "$registry/team/tiny:1-acc" --image-pull-policy Always --restart Never \
        --overrides '{"apiVersion": "v1", "spec": {"nodeName": "plain"}}' --command -- /bin/sh -c /app/hello
    wait_until pod_ended plain
    same "$(k logs plain)" "$output"
    # Config and both layers.
    same "$(since_then | grep -c '/team/tiny/blobs/')" 3
    k delete pod plain --grace-period 0 --timeout 120s
    stop_process "$kubelet"
    stop_process "$containerd_pid"
    k delete node plain
    node_containerd=$ours containerd_pid=$containerd
}

# As nodes have it mounted, and through the claim again.
takes_ufs_by_its_path() {
    accel enable --host-path "$work/ufs" --wait
    same "$(of_service UfsReady reason)" Tried
    of_service UfsReady message | grep -F "$work/ufs of the Jobs' nodes"
    task by-path "$registry/many/of:4" "target: $registry/many/of:by-path"
    becomes by-path Ready
    "$bin/mkfs-accel" verify "docker://$registry/many/of:4" --ufs "$work/ufs"
    accel enable --claim ufs --wait
    same "$(k get imageacceleration cluster -o 'jsonpath={.spec.ufs}' | jq -c .)" '{"claimName":"ufs"}'
}

# What the Jobs cannot have is told by a Job that has tried, and mended is found to be good.
tells_what_is_wrong_with_ufs() {
    local nowhere=$work/no-such-ufs said=$work/enable
    # refused_with WORDS [OPTION…]: it comes back by itself, and says that.
    refused_with() {
        local words=$1
        shift
        fails accel enable "$@" --wait --timeout 300 2>"$said"
        grep -F -- "$words" "$said"
        same "$(of_service Ready status)" False
        of_service UfsReady message | grep -F -- "$words"
    }
    refused_with 'nowhere.invalid:/x cannot be mounted: ' --nfs nowhere.invalid:/x
    same "$(of_service UfsReady reason)" NotMounted
    # What the node says, and not that a node had no time.
    of_service UfsReady message | grep -iE 'mount|nfs|resolve'
    refused_with "$nowhere of the Jobs' nodes cannot be mounted: " --host-path "$nowhere"
    same "$(of_service UfsReady reason)" NotMounted
    # It is there, and somebody else's.
    install -d -m 755 -o 0 -g 0 "$nowhere"
    refused_with 'Permission denied' --host-path "$nowhere"
    same "$(of_service UfsReady reason)" NotUsable
    of_service UfsReady message | grep -F 'spec.jobs.user'
    chown 65532:65532 "$nowhere"
    accel enable --host-path "$nowhere" --wait
    same "$(of_service UfsReady status)" True
    same "$(find "$nowhere" -type f)" ''
    accel enable --claim ufs --wait
    rm -r "$nowhere"
}

tells_errors_in_words() {
    task wrong "$registry/team/missing:1"
    becomes wrong CreateError
    same "$(condition wrong RegistryAccess reason)" NotFound
    of_task wrong message | grep 'the image cannot be had'
    same "$(events_of wrong | sort | xargs)" 'CreateError Creating'
    # It can be looked at.
    k -n image-accel logs "$(k get acceleratedimage wrong -o 'jsonpath={.metadata.uid}' |
        sed 's|.*|job/accel-&-1-0|')" | grep 'team/missing'
    # Equal names are nothing that a schema could see.
    task wrong "$registry/team/tiny:1" "target: $registry/team/tiny:1"
    refused_by_name() { [ "$(condition wrong Accepted reason)" = Invalid ]; }
    wait_until refused_by_name
    condition wrong Accepted message | grep '^spec.target: '
    # Mended, it becomes what it should have been.
    task wrong "$registry/many/of:1"
    becomes wrong Ready
}

keeps_to_the_limit() {
    local n at_work
    service 'jobs: {limit: 1, retries: 0, memoryMib: 256, cpuMillis: 300}'
    for n in 2 3 4; do task "many-$n" "$registry/many/of:$n"; done
    for ((n = 0; n < 600; n++)); do
        # One that tries UFS may still be on its way out.
        at_work=$(k -n image-accel get jobs -l 'app.kubernetes.io/component!=check' -o json | jq '[.items[] | select(.status.conditions == null)] | length')
        [ "$at_work" -le 1 ]
        ! { phase_is many-2 Ready && phase_is many-3 Ready && phase_is many-4 Ready; } || return 0
        sleep 0.2
    done
    k get acceleratedimages,jobs --all-namespaces
    return 1
}

# pid_of WORD: of the processes that have it as an argument.
pid_of() { { grep -lszxF -- "$1" /proc/[0-9]*/cmdline || true; } | cut -d/ -f3; }

# A conversion that takes a while, and everything that works on it killed meanwhile.
survives_kills() {
    local pid uid target=$registry/team/large:fast
    service 'jobs: {limit: 1, retries: 3, memoryMib: 256, cpuMillis: 300}'
    task large "$registry/team/large:1" "target: $target"
    uid=$(k get acceleratedimage large -o 'jsonpath={.metadata.uid}')
    has_begun() { grep -qs '"progress"' "/var/log/pods/image-accel_accel-$uid-1-0-"*/convert/0.log; }
    for _ in {1..3000}; do
        ! has_begun || break
        sleep 0.01
    done
    # Held, so that what is told of it meanwhile can be seen.
    pid=$(pid_of "docker://$target")
    kill -STOP "$pid"
    tells() { [ -n "$(of_task large progress.text)" ]; }
    wait_until tells
    of_task large progress
    same "$(of_task large progress.layers)" 1
    phase_is large Creating
    kill -KILL "$pid"
    # shellcheck disable=SC2046 # a list of numbers
    kill -KILL $(pid_of "--job-image=$registry/accel/mkfs-accel:1")
    becomes large Ready
    # It was killed: the Job has had more than one pod.
    k -n image-accel get events -o json | jq -e --arg task "$uid" \
        '[.items[] | select(.reason == "SuccessfulCreate" and (.involvedObject.name | contains($task)))] | length >= 2'
    "$bin/mkfs-accel" verify "docker://$registry/team/large:1" --ufs "$work/ufs"
    k -n image-accel rollout status deployment/accel-controller --timeout 300s
}

# The leader's machine is asked to end it; the other one goes on at once.
passes_on_the_lead() {
    local before said=$work/said-of-the-lead
    wait_until leads
    before=$(leader)
    k -n image-accel delete pod "${before%-*}" --wait=false
    wait_until another_leads
    task after "$registry/many/of:1" "target: $registry/many/of:after"
    becomes after Ready
    k -n image-accel rollout status deployment/accel-controller --timeout 300s
    leader_is_said() { service_is ControllerReady True Leads && of_service ControllerReady message | grep -F "$(leader) leads"; }
    wait_until leader_is_said
    accel get --service | grep -Fx "controller: $(leader) leads"
    # When none is there nobody but the Lease can say so.
    k -n image-accel scale deployment/accel-controller --replicas 0
    no_controllers() { nothing k -n image-accel get pods -l app.kubernetes.io/name=accel-controller -o name; }
    wait_until no_controllers
    accel get --service >"$said"
    grep -E '^False +[A-Z][a-z]+ +False ' "$said"
    grep '^controller: not running since 20' "$said"
    same "$(accel get --service -o json | jq -c '[.controller.running, (.controller.since | length > 0), .service.metadata.name]')" \
        '[false,true,"cluster"]'
    accel get after 2>"$said" | grep -E '^after +Ready '
    grep '^controller: not running since 20' "$said"
    # That it was well once is not taken for what is.
    fails accel enable --claim ufs --wait --timeout 15 2>"$said"
    grep -F '(controller: not running since 20' "$said"
    k -n image-accel scale deployment/accel-controller --replicas 2
    accel enable --claim ufs --wait
    wait_until leader_is_said
    k -n image-accel rollout status deployment/accel-controller --timeout 300s
}

access_is() { [ "$(condition "$1" RegistryAccess reason)" = "$2" ]; }
of_service() { k get imageacceleration cluster -o "jsonpath={.status.conditions[?(@.type==\"$1\")].$2}"; }
# service_is CONDITION STATUS REASON
service_is() { [ "$(of_service "$1" status) $(of_service "$1" reason)" = "$2 $3" ]; }
# Jobs that try UFS.
checks_at_work() {
    k -n image-accel get jobs -l app.kubernetes.io/component=check -o json |
        jq -r '.items[] | select(.status.conditions == null) | .metadata.name'
}
service_access_is() { [ "$(of_service RegistryAccess reason)" = "$1" ]; }
# logs_in_with SECRET: from now on; registries are asked anew.
logs_in_with() {
    k patch imageacceleration cluster --type merge -p '{"spec": {"registry": {"secretName": null}}}'
    wait_until service_access_is NothingToCheck
    k patch imageacceleration cluster --type merge -p "{\"spec\": {\"registry\": {\"secretName\": \"$1\"}}}"
}
# login_secret NAME REGISTRY PASSWORD [OPTION…]
login_secret() {
    local name=$1 registry=$2 password=$3
    shift 3
    k "$@" create secret docker-registry "$name" --docker-server "$registry" --docker-username robot \
        --docker-password "$password" --dry-run=client -o yaml | k "$@" apply -f - >/dev/null
}
# is_nowhere PASSWORD: but in Secrets: neither in what the cluster has and says of it, nor in
# logs, nor among programs' arguments, nor on UFS.
is_nowhere() {
    local said=$work/said word
    {
        k get acceleratedimages,imageaccelerations,jobs,pods,events,events.events.k8s.io,configmaps,leases \
            --all-namespaces -o yaml
        k describe acceleratedimages,imageaccelerations,jobs,pods --all-namespaces
        k -n image-accel logs --tail -1 -l app.kubernetes.io/name=accel-controller
        cat /var/log/pods/image-accel_*/*/*.log
        cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' || true
        find "$work/ufs" -name '*.json' -exec cat {} +
    } >"$said"
    # All of it is there to be looked at.
    for word in 'kind: AcceleratedImage' RegistryAccess starts accel-controller "$private"; do
        grep -qF -- "$word" "$said"
    done
    # The Secret has it as base64 of USER:PASSWORD, and in base64 as a whole.
    for word in "$1" "$(printf 'robot:%s' "$1" | base64 | cut -c 1-20)"; do
        fails grep -F -- "$word" "$said"
    done
    rm "$said"
}

# With logins that the Jobs have and nobody else, and that are nowhere to be seen.
logs_in() {
    local password=not-for-everybody wrong=and-this-is-wrong registry=$registry private
    registry_login=robot:$password registry_address=$cluster_address start_registry "$work/private"
    private=$registry
    skopeo copy --quiet --dest-tls-verify=false --dest-creds "robot:$password" "oci:$work/made/many:1" "docker://$private/one:1"
    service 'jobs: {limit: 2, memoryMib: 256, cpuMillis: 300}'
    task private "$private/one:1"
    becomes private CreateError
    access_is private NoLogin
    condition private RegistryAccess message | grep 'no Secret is named'
    # It is told without any task what is wrong with it: there is none,
    logs_in_with login
    wait_until service_access_is NoSecret
    of_service Ready message | grep 'Secret login'
    same "$(of_service Ready status)" False
    # it has another registry's login,
    login_secret login elsewhere.example "$password" -n image-accel
    task private "$private/one:1" "target: $private/one:other"
    no_login() { condition private RegistryAccess message | grep "the Secret login .* has no login for $private"; }
    wait_until no_login
    # or a wrong one.
    login_secret login "$private" "$wrong" -n image-accel
    logs_in_with login
    wait_until service_access_is Unauthorized
    of_service RegistryAccess message | grep "correct user and password for $private in the Secret login"
    task private "$private/one:1" "target: $private/one:third"
    # The Job and its log, too. What the task says may still be of its last version.
    job_says_it() {
        k -n image-accel logs "$(k get acceleratedimage private -o 'jsonpath={.metadata.uid}' | sed 's/.*/job\/accel-&-3-0/')" |
            grep Unauthorized
    }
    wait_until job_says_it
    wait_until access_is private Unauthorized
    is_nowhere "$wrong"
    login_secret login "$private" "$password" -n image-accel
    logs_in_with login
    wait_until service_access_is Checked
    same "$(of_service Ready status)" True
    # Another version of the task: it is tried at once.
    task private "$private/one:1" "target: $private/one:fast"
    becomes private Ready
    access_is private Checked
    # An address at which there is nothing.
    login_secret nobody "$cluster_address:1" "$password" -n image-accel
    logs_in_with nobody
    wait_until service_access_is Unreachable
    # A task that has its own, in its own namespace, which lets the controller read it.
    login_secret mine "$private" "$password"
    task own "$private/one:1" "target: $private/one:own" 'secretName: mine'
    wait_until access_is own SecretNotReadable
    condition own RegistryAccess message | grep 'accel-controller secret-access default mine'
    "$bin/accel-controller" secret-access default mine | k apply -f -
    becomes own Ready
    no_copies() { nothing k -n image-accel get secrets -l app.kubernetes.io/managed-by=accel-controller -o name; }
    wait_until no_copies
    can() { k auth can-i "$@" --as system:serviceaccount:image-accel:accel-controller; }
    can get secrets/mine
    fails can get secrets/mine -n image-accel
    fails can get secrets/login -n image-accel
    fails can list secrets
    logs_in_with login
    wait_until service_access_is Checked
    is_nowhere "$password"
}

# What the node says on UFS.
says_used() { [ "$(cat "$work/ufs/nodes/"*.n1.*.json | jq '.used | length')" = "$1" ]; }
layers_of() { # IMAGE: files on UFS
    "$bin/mkfs-accel" inspect "docker://$1" --ufs "$work/ufs" --json | jq -r '.layers[].erofs.path' | sort
}
not_there() { fails curl -sf -H 'Accept: application/vnd.oci.image.manifest.v1+json' "http://$registry/v2/$1/manifests/$2" -o /dev/null; }

labels_nodes_that_can_serve() {
    not_labelled
    wait_until nodes_are 0/1
    says n1 no 'says nothing'
    start_agent
    start_node_agent n1
    node_pid=$node_agent_pid
    wait_until labelled
    wait_until nodes_are 1/1
    says n1 yes 'reads from UFS'
    same "$(accel nodes -o json | jq -r '.[] | "\(.name) \(.ready)"')" 'n1 true'
    # It may say how it is, and nothing else.
    can() { KUBECONFIG=$work/n1.kubeconfig "${kubectl[@]}" auth can-i "$@"; }
    can patch leases/accel-node-n1 -n image-accel
    fails can patch leases/accel-node-n2 -n image-accel
    fails can patch leases/accel-controller -n image-accel
    fails can get leases/accel-node-n1 -n image-accel
    fails can patch nodes/n1
    fails can list secrets -n image-accel
    # A canary is no layer of an image: only those of the container that has ended are used.
    wait_until says_used 2
    wait_until used_by tiny 1 n1
    # A node that comes later; it has no kubelet, which is not what counts here.
    another_node
    wait_until nodes_are 1/2
    start_node_agent n2
    wait_until labelled n2
    wait_until nodes_are 2/2
    # Its agent is the same, and says the same.
    wait_until used_by tiny 2 n1 n2
    # One of the same name that comes in its place has what it says, too.
    k delete node n2
    wait_until nodes_are 1/1
    wait_until used_by tiny 1 n1
    another_node
    wait_until labelled n2
    wait_until used_by tiny 2 n1 n2
    # When nobody says anything any more it is gone. Containers are not.
    kill -STOP "$node_agent_pid"
    wait_until not_labelled n2
    labelled
    used_by tiny 2 n1 n2
    kill -CONT "$node_agent_pid"
    stop_process "$node_agent_pid"
    k delete node n2
    wait_until nodes_are 1/1
}

labels_nodes_that_are_meant() {
    # Others' hands: what is taken comes back, what is given a node that cannot serve goes.
    k label node n1 "$label-"
    wait_until labelled
    another_node
    k label node n2 "$label=true"
    wait_until not_labelled n2
    k delete node n2
    # One that somebody keeps out.
    k label --overwrite node n1 "$label=false"
    wait_until nodes_are 0/1
    says n1 no 'is kept out'
    same "$(label_of n1)" false
    k label node n1 "$label-"
    wait_until labelled
    with_nodes '{"selector": {"pool": "fast"}}'
    wait_until not_labelled
    wait_until nodes_are 0/0
    says n1 no 'is not meant'
    k label node n1 pool=fast
    wait_until labelled
    wait_until nodes_are 1/1
    # Another key takes the place of ours.
    with_nodes '{"selector": null, "label": "example.com/fast"}'
    wait_until not_labelled
    same "$(k get node n1 -o 'jsonpath={.metadata.labels.example\.com/fast}')" true
    with_nodes 'null'
    wait_until labelled
    same "$(k get node n1 -o 'jsonpath={.metadata.labels.example\.com/fast}')" ''
}

# The pod as the product's guide has it.
guided_pod() {
    k apply -f - <<YAML
apiVersion: v1
kind: Pod
metadata: {name: guided}
spec:
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
          - matchExpressions:
              - {key: $label, operator: In, values: ["true"]}
  containers:
    - name: app
      image: $registry/team/tiny:1-acc
      imagePullPolicy: Always
      command: [/bin/sh, -c, 'while :; do sleep 1; done']
YAML
    k wait --for condition=ready pod/guided --timeout 300s
}
still_runs() { same "$(k get pod guided -o 'jsonpath={.status.phase} {.status.containerStatuses[0].restartCount}')" 'Running 0'; }

# The pod runs on whatever happens to the label.
takes_the_label_while_ufs_is_away() {
    wait_until service_is Ready True Working
    guided_pod
    # UFS is unmounted, nobody has it open any more, and no Job can have it.
    umount -l "$work/node-ufs"
    mv "$work/ufs" "$work/ufs-away"
    # shellcheck disable=SC2046 # a list of numbers
    kill -KILL $(server_status | jq '.sources[].worker')
    wait_until not_labelled
    wait_until nodes_are 0/1
    # A read may have been under way.
    says n1 no '.*(UFS is not mounted|does not answer)'
    # Nobody takes the directory for UFS that it was mounted at.
    same "$(find "$work/node-ufs" -mindepth 1)" ''
    # The service says so, once a Job could not have it either.
    wait_until service_is UfsReady False NotMounted
    service_is Ready False UfsReady
    of_service Ready message | grep -F 'the PersistentVolumeClaim ufs cannot be mounted: '
    same "$(checks_at_work | wc -l)" 1
    mv "$work/ufs-away" "$work/ufs"
    mount_node_ufs
    wait_until labelled
    wait_until service_is UfsReady True Tried
    wait_until service_is Ready True Working
    # Nothing answers.
    kill -STOP "$server_pid"
    wait_until not_labelled
    says n1 no '.*does not answer'
    kill -CONT "$server_pid"
    wait_until labelled
    # The snapshotter is not there: nothing could be started.
    kill_now "$snapshotter_pid"
    wait_until not_labelled
    says n1 no '.*the snapshotter'
    start_snapshotter
    wait_until labelled
    still_runs
    k delete pod guided --grace-period 0 --timeout 120s
}

# All that a node has is killed under a pod that runs, goes on, and is not started again.
survives_kills_on_the_node() {
    local top
    guided_pod
    kill -KILL "$server_pid" "$snapshotter_pid" "$containerd_pid" "$agent_pid" "$node_pid"
    # Who was reading over FUSE just then is not gone before it has its answer.
    wait "$server_pid" 2>/dev/null || true
    start_server "$work/node-ufs"
    wait "$snapshotter_pid" "$containerd_pid" "$agent_pid" "$node_pid" 2>/dev/null || true
    start_snapshotter
    start_containerd "$node_containerd" "$node_containerd/../cri.toml"
    start_agent
    start_node_agent n1
    node_pid=$node_agent_pid
    # What nobody has read before comes from UFS.
    top=$(skopeo inspect --raw "oci:$work/made/tiny:sample" | jq -r '.layers[-1].digest | sub(":"; "/")')
    read_in_pod() { k exec guided -- /bin/busybox md5sum /app/data/random | cut -d' ' -f1 >"$work/read"; }
    wait_until read_in_pod
    same "$(cat "$work/read")" "$(tar -xzOf "$work/made/tiny/blobs/$top" ./app/data/random | md5sum | cut -d' ' -f1)"
    wait_until labelled
    wait_until nodes_are 1/1
    still_runs
    k delete pod guided --grace-period 0 --timeout 120s
    k run lazy-again --image "$registry/team/tiny:1-acc" --image-pull-policy Always --restart Never --command -- \
        /bin/sh -c /app/hello
    wait_until pod_ended lazy-again
    same "$(field fallbacks)" 0
    k delete pod lazy-again --grace-period 0 --timeout 120s
}

keeps_the_label_through_trifles() {
    local digest before
    begin_to_watch
    # One read that fails is nothing: the canary is damaged, and another one comes.
    digest=$(canary)
    another_canary() { [ -n "$(canary)" ] && [ "$(canary)" != "$digest" ]; }
    truncate -s 0 "$work/node-ufs/nodes/${digest#*:}.canary"
    truncate -s 256M "$work/node-ufs/nodes/${digest#*:}.canary"
    wait_until another_canary
    # Nor is who looks and who tells when they are killed.
    digest=$(canary)
    kill_now "$agent_pid"
    start_agent
    kill_now "$node_pid"
    start_node_agent n1
    node_pid=$node_agent_pid
    wait_until another_canary
    # An agent that is ended takes its canary with it.
    stop_process "$agent_pid"
    same "$(find "$work/node-ufs/nodes" -name '*canary*')" ''
    same "$(server_status | jq '[.exports[] | select(.name | startswith("canary"))] | length')" 0
    start_agent
    wait_until canary
    # Nor is a controller that is replaced.
    before=$(leader)
    k -n image-accel delete pod "${before%-*}" --wait=false
    wait_until another_leads
    another_node
    wait_until nodes_are 1/2
    k delete node n2
    wait_until nodes_are 1/1
    k -n image-accel rollout status deployment/accel-controller --timeout 300s
    never_without_label
}

# metric NAME[{LABELS}]: as the controller that leads says it.
metric() {
    local address
    address=$(k -n image-accel get pod "$(leader | sed 's/-[0-9]*$//')" -o 'jsonpath={.status.podIP}')
    curl -sf "http://$address:8080/metrics" | awk -v name="$1" '$1 == name { print $2; found = 1 } END { exit !found }'
}
is_more() { [ "$(metric "$1")" -gt "$2" ]; }
metric_is() { [ "$(metric "$1")" = "$2" ]; }

# What this very controller has done: each number moves.
tells_prometheus() {
    local name refused='accel_controller_refusals_total{reason="NotFound"}' ready='accel_controller_conversions_total{result="ready"}'
    local failed='accel_controller_conversions_total{result="failed"}' removed='accel_controller_removals_total{result="removed"}'
    local -A before
    wait_until leads
    wait_until metric_is accel_controller_leads 1
    for name in "$ready" "$failed" "$removed" accel_controller_{jobs_started,converted_bytes,written_bytes,looks}_total \
        accel_controller_conversion_seconds_count; do
        before[$name]=$(metric "$name")
    done
    wait_until metric_is accel_controller_nodes_ready 1
    wait_until metric_is 'accel_controller_tasks{phase="Ready"}' \
        "$(k get acceleratedimages -o json | jq '[.items[] | select(.status.phase == "Ready")] | length')"
    # One waits for the other.
    service 'jobs: {limit: 1, retries: 0, memoryMib: 256, cpuMillis: 300}'
    task counted "$registry/many/of:2" "target: $registry/many/of:counted"
    task counted-later "$registry/many/of:3" "target: $registry/many/of:counted-later"
    wait_until is_more accel_controller_queue 0
    wait_until is_more accel_controller_jobs_at_work 0
    becomes counted Ready
    becomes counted-later Ready
    task missed "$registry/team/missing:2"
    becomes missed CreateError
    wait_until is_more 'accel_controller_tasks{phase="CreateError"}' 0
    wait_until is_more "$refused" 0
    k delete acceleratedimages counted counted-later missed --timeout 300s
    for name in "${!before[@]}"; do
        wait_until is_more "$name" "${before[$name]}"
    done
    same "$(metric accel_controller_queue)" 0
    # The other one has nothing to tell.
    for name in $(k -n image-accel get pods -l app.kubernetes.io/name=accel-controller -o 'jsonpath={.items[*].status.podIP}'); do
        curl -sf "http://$name:8080/metrics" | grep '^accel_controller_leads'
    done | sort | xargs | grep -x 'accel_controller_leads 0 accel_controller_leads 1'
    service 'jobs: {limit: 2, retries: 0, memoryMib: 256, cpuMillis: 300}'
}

# run_user: a container on elsewhere/more:fast.
run_user() {
    k run user --image "$registry/elsewhere/more:fast" --image-pull-policy Always --restart Never --command -- \
        /bin/sh -c 'while :; do sleep 1; done'
    k wait --for condition=ready pod/user --timeout 300s
}

# Two images with two layers in common, and a container runs on the one that has one more.
waits_for_who_uses_it() {
    more_layers=$(layers_of "$registry/team/more:1") tiny_layers=$(layers_of "$registry/team/tiny:1")
    same "$(comm -13 <(echo "$more_layers") <(echo "$tiny_layers"))" ''
    wait_until used_by more 0
    run_user
    wait_until used_by more 1 n1
    accel get more -o wide | grep -E ' 3 +n1 +nodes can start it'
    k delete pod user --grace-period 0 --timeout 120s
    wait_until used_by more 0
    run_user
    wait_until says_used 3
    wait_until used_by more 1 n1
    k delete acceleratedimage more --wait=false
    is_in_use() { [ "$(condition more InUse status)" = True ]; }
    wait_until is_in_use
    condition more InUse message | grep -w n1
    phase_is more Deleting
    same "$(layers_of "$registry/team/more:1")" "$more_layers"
    skopeo inspect --tls-verify=false "docker://$registry/elsewhere/more:fast" >/dev/null
    # Looked at again, it still waits.
    sleep 15
    phase_is more Deleting
    used_by more 1 n1
    same "$(layers_of "$registry/team/more:1")" "$more_layers"
}

removes_what_nobody_needs() {
    local layer
    k delete pod user --grace-period 0 --timeout 120s
    wait_until is_gone more
    no_jobs
    for layer in $(comm -23 <(echo "$more_layers") <(echo "$tiny_layers")); do
        [ ! -e "$work/ufs/$layer" ]
        [ ! -e "$work/ufs/${layer%.erofs}.idx" ]
    done
    "$bin/mkfs-accel" verify "docker://$registry/team/tiny:1" --ufs "$work/ufs"
    not_there elsewhere/more fast
    skopeo inspect --tls-verify=false "docker://$registry/team/more:1" >/dev/null
    events_of more | grep -x InUse
    events_of more | grep -x Removed
    # As if it had never been there.
    task more "$registry/team/more:1" "target: $registry/elsewhere/more:fast"
    becomes more Ready
    "$bin/mkfs-accel" verify "docker://$registry/team/more:1" --ufs "$work/ufs"
}

deletes_while_ufs_is_away() {
    # Another's, who may not write there: an answer, and none at all.
    chmod 000 "$work/ufs"
    chown 0:0 "$work/ufs"
    k delete acceleratedimage more --wait=false
    becomes more DeleteError
    of_task more message | grep -F '/ufs'
    k get acceleratedimage more -o wide
    chown 65532:65532 "$work/ufs"
    chmod 755 "$work/ufs"
    wait_until is_gone more
    service 'jobs: {limit: 2, retries: 0, memoryMib: 256, cpuMillis: 300, deadlineSeconds: 60}'
    mv "$work/ufs" "$work/ufs-away"
    k delete acceleratedimage large --wait=false
    becomes large DeleteError
    of_task large message | grep '^UFS does not answer'
    # The node has it open still: that Jobs cannot have it the task has told.
    labelled
    wait_until service_is UfsReady False NotMounted
    mv "$work/ufs-away" "$work/ufs"
    wait_until is_gone large
    # Whoever has mended it need not wait until it is tried again.
    accel enable --claim ufs --wait
    service_is UfsReady True Tried
    [ -z "$(find "$work/ufs" -name '*.erofs' -size +200M)" ]
    service 'jobs: {limit: 2, retries: 0, memoryMib: 256, cpuMillis: 300, deadlineSeconds: 21600}'
}

# An agent that is gone, and a node.
asks_for_nodes_that_are_silent() {
    local said cluster
    task more "$registry/team/more:1" "target: $registry/elsewhere/more:fast"
    becomes more Ready
    run_user
    wait_until says_used 3
    wait_until used_by more 1 n1
    stop_process "$agent_pid"
    k delete pod user --grace-period 0 --timeout 120s
    said=$(echo "$work/ufs/nodes/"*.n1.*.json)
    touch -d '10 minutes ago' "$said"
    cluster=$(basename "$said" | cut -d. -f1)
    same "$cluster" "$(k get namespace kube-system -o 'jsonpath={.metadata.uid}')"
    # The same of one that has been taken from the cluster.
    cp -p "$said" "$work/ufs/nodes/$cluster.n9.00000000000000000001.json"
    k delete acceleratedimage more --wait=false
    wait_until is_in_use
    condition more InUse message | grep -w n1 | grep -w n9
    only_n1() { condition more InUse message | grep -w n1 && ! condition more InUse message | grep -w n9; }
    wait_until only_n1
    phase_is more Deleting
    # Nobody has said anything else since.
    used_by more 1 n1
    layers_of "$registry/team/more:1" >/dev/null
    start_agent
    wait_until is_gone more
}

deletes() {
    # A container that has ended can be looked at still: it counts until it is gone.
    k delete pod lazy --grace-period 0 --timeout 120s
    # The registry with a login removes no tags: a word about it, and that is all.
    k delete acceleratedimage private --timeout 300s
    events_of private | grep -x RemovedInPart
    task slow "$registry/team/missing:1"
    becomes slow CreateError
    k delete acceleratedimages --all --timeout 300s
    no_jobs
    same "$(k get acceleratedimages -o name)" ''
}

turns_off() {
    # An agent that was away for long is believed again.
    wait_until labelled
    task last "$registry/many/of:2" "target: $registry/many/of:last"
    becomes last Ready
    k run old --image "$registry/many/of:last" --image-pull-policy Always --restart Never --command -- \
        /bin/busybox sleep 1000000
    k wait --for condition=ready pod/old --timeout 300s
    wait_until used_by last 1 n1
    k delete imageacceleration cluster --timeout 60s
    wait_until not_labelled
    task later "$registry/team/tiny:1"
    becomes later Creating
    same "$(condition later Accepted reason)" Disabled
    # What runs goes on until it ends, and the original is what runs next.
    phase_is last Ready
    k exec old -- /bin/busybox cat /of-it | grep -x 2
    same "$(k get pod old -o 'jsonpath={.status.phase} {.status.containerStatuses[0].restartCount}')" 'Running 0'
    used_by last 1 n1
    k delete pod old --grace-period 0 --timeout 120s
    wait_until used_by last 0
    k run original --image "$registry/many/of:2" --image-pull-policy Always --restart Never --command -- /bin/busybox cat /of-it
    wait_until pod_ended original
    same "$(k logs original)" 2
    k delete pod original --grace-period 0 --timeout 120s
    k delete acceleratedimage later last --timeout 60s
}

# The same with `kubectl accel`, from nothing to nothing.
obeys_the_plug_in() {
    accel enable --claim ufs --plain-http --limit 2 --wait
    k patch imageacceleration cluster --type merge -p '{"spec": {"jobs": {"retries": 0, "memoryMib": 256, "cpuMillis": 300}}}'
    # What is not named stays.
    accel enable --claim ufs --limit 3
    same "$(k get imageacceleration cluster -o 'jsonpath={.spec.jobs.limit} {.spec.jobs.memoryMib} {.spec.registry.plainHttp}')" \
        '3 256 true'
    # Another place for what has no target of its own.
    accel enable --claim ufs --push-to "$registry/pushed" --wait
    accel create "$registry/many/of:4" --name pushed --wait | grep "pushed is ready: $registry/pushed/many/of:4-acc"
    skopeo inspect --tls-verify=false "docker://$registry/pushed/many/of:4-acc" >/dev/null
    accel delete pushed --wait
    not_there pushed/many/of 4-acc
    k patch imageacceleration cluster --type merge -p '{"spec": {"registry": {"pushTo": null}}}'
    accel create "$registry/many/of:4" --target "$registry/many/of:by-hand" --wait | grep "of-4 is ready: $registry/many/of:by-hand"
    accel create "$registry/many/of:4" --target "$registry/many/of:by-hand" | grep unchanged
    fails accel create "$registry/many/of:3" --name of-4
    fails accel create "$registry/team/missing:1" --wait
    accel get | grep -E '^of-4 +Ready '
    accel get missing-1 -o wide | grep 'cannot be had'
    same "$(accel get "$registry/many/of:by-hand" -o json | jq -r '.items[].metadata.name')" of-4
    accel get -A -o yaml | grep 'name: missing-1'
    accel delete "$registry/team/missing:1" --wait
    accel delete "$registry/many/of:4" --wait
    same "$(k get acceleratedimages -o name)" ''
    fails accel delete of-4
    # All that was made stays,
    # Of what no other tag is left (many/of:2 has one): a registry removes all of a manifest at once.
    accel create "$registry/many/of:3" --target "$registry/many/of:to-stay" --name stays --wait
    accel disable --wait
    fails accel disable
    phase_is stays Ready
    skopeo inspect --tls-verify=false "docker://$registry/many/of:to-stay" >/dev/null
}

# unless it is to go: not while it is in use, though.
purges() {
    local layers layer
    accel enable --claim ufs --plain-http --wait
    k patch imageacceleration cluster --type merge -p '{"spec": {"jobs": {"retries": 0, "memoryMib": 256, "cpuMillis": 300}}}'
    accel create "$registry/team/more:1" --target "$registry/elsewhere/more:purged" --name used --wait
    k run user --image "$registry/elsewhere/more:purged" --image-pull-policy Always --restart Never --command -- \
        /bin/sh -c 'while :; do sleep 1; done'
    k wait --for condition=ready pod/user --timeout 300s
    wait_until says_used 3
    layers=$(layers_of "$registry/team/more:1")
    accel disable --purge
    purged_says() { of_service Purged message | grep -F "$1"; }
    wait_until is_gone stays
    wait_until purged_says 'in use: default/used'
    not_there many/of to-stay
    skopeo inspect --tls-verify=false "docker://$registry/elsewhere/more:purged" >/dev/null
    wait_until not_labelled
    # One that comes now has made nothing.
    task later "$registry/many/of:3"
    becomes later Creating
    same "$(condition later Accepted reason)" Disabled
    k delete pod user --grace-period 0 --timeout 120s
    k wait --for delete imageacceleration/cluster --timeout 300s
    is_gone used
    not_there elsewhere/more purged
    for layer in $layers; do [ ! -e "$work/ufs/$layer" ]; done
    phase_is later Creating
    k delete acceleratedimage later --timeout 60s
}

report_cluster() {
    local failed=0 log
    if [ -n "$current" ]; then
        failed=1
        echo "test $current ... FAILED"
        "${kubectl[@]}" -n image-accel logs --prefix --tail 40 -l app.kubernetes.io/name=accel-controller >"$work/controller.log" 2>&1
        "${kubectl[@]}" get acceleratedimages,pods,jobs --all-namespaces >"$work/objects.log" 2>&1
        "${kubectl[@]}" get events --all-namespaces 2>&1 | tail -n 30 >"$work/events.log"
        for log in "$current" controller objects events agent node snapshotter ublk-server; do
            echo "--- the end of $log"
            tail -n 40 "$work/$log.log" 2>/dev/null | cut -c 1-400 | sed 's/^/    /'
        done
    fi
    echo "test result: $passed passed; $failed failed; 0 ignored"
} >&3
