# shellcheck shell=bash
# A Kubernetes cluster on this machine: etcd, API server, controller manager, scheduler, and
# nodes with kubelet and containerd. Real ones, in a directory of their own, that end with
# the script. Needs common.sh, debian.sh, peers.sh and kubernetes.sh; undo_on_exit must be
# on.
#
# Everything listens on the loopback or on a bridge that leads nowhere but to the pods, so
# that pods and nodes know API server and registry by the same address.

# start_cluster DIR: the control plane, without nodes. Sets
#   cluster             DIR
#   cluster_address     of the bridge
#   KUBECONFIG          exported: an administrator
#   kubectl             an array: Kubernetes' client command
start_cluster() {
    local programs client tokens
    cluster=$1
    programs=$(kubernetes_programs)
    client=$(unpack_deb kubernetes-client)/usr/bin
    kubectl=("$client/kubectl")
    cluster_nodes=()
    mkdir -p "$cluster/log" "$cluster/certificates"
    _cluster_bridge
    _start_etcd

    openssl genrsa -out "$cluster/accounts.key" 2048 2>/dev/null
    tokens=$(openssl rand -hex 16)
    (umask 077 && echo "$tokens,admin,1,\"system:masters\"" >"$cluster/tokens")
    local port
    port=$(free_port "$cluster_address")
    _cluster_process kube-apiserver "$programs/kube-apiserver" --etcd-servers="$_etcd" \
        --bind-address="$cluster_address" --advertise-address="$cluster_address" --secure-port="$port" \
        --cert-dir="$cluster/certificates" --service-account-issuer=https://kubernetes.default.svc \
        --service-account-signing-key-file="$cluster/accounts.key" \
        --service-account-key-file="$cluster/accounts.key" --token-auth-file="$cluster/tokens" \
        --authorization-mode=RBAC --service-cluster-ip-range=10.96.0.0/24 --allow-privileged \
        --kubelet-preferred-address-types=InternalIP
    export KUBECONFIG=$cluster/kubeconfig
    cluster_server=https://$cluster_address:$port
    _cluster_wait kube-apiserver test -s "$cluster/certificates/apiserver.crt"
    (umask 077 && cluster_kubeconfig admin "$tokens" >"$KUBECONFIG")
    _cluster_wait kube-apiserver "${kubectl[@]}" get --raw /readyz
    # Nothing asks them anything here.
    _cluster_process kube-controller-manager "$programs/kube-controller-manager" --kubeconfig="$KUBECONFIG" \
        --service-account-private-key-file="$cluster/accounts.key" \
        --root-ca-file="$cluster/certificates/apiserver.crt" --leader-elect=false --port=0 --secure-port=0
    _cluster_process kube-scheduler "$programs/kube-scheduler" --kubeconfig="$KUBECONFIG" --leader-elect=false \
        --port=0 --secure-port=0
    # Pods cannot be made before it is there.
    _cluster_wait kube-controller-manager "${kubectl[@]}" get serviceaccount default
}

# cluster_kubeconfig NAME TOKEN: prints one.
cluster_kubeconfig() {
    cat <<YAML
apiVersion: v1
kind: Config
current-context: $1
clusters: [{name: cluster, cluster: {server: "$cluster_server", certificate-authority-data: $(base64 -w 0 "$cluster/certificates/apiserver.crt")}}]
users: [{name: $1, user: {token: $2}}]
contexts: [{name: $1, context: {cluster: cluster, user: $1}}]
YAML
}

# start_cluster_node NAME SANDBOX [TOML]: a node, ready. SANDBOX is the image that holds a
# pod together; TOML is more of containerd's configuration. Sets node_containerd to the
# containerd's directory.
start_cluster_node() {
    local name=$1 sandbox=$2 more=${3:-} dir=$cluster/node-$1 number=${#cluster_nodes[@]} programs ctr
    programs=$(kubernetes_programs)
    node_containerd=$dir/containerd
    mkdir -p "$dir/net.d" "$dir/hosts/$registry" "$dir/kubelet" "$dir/certificates" "$dir/volume-plugins"
    cat >"$dir/net.d/10-bridge.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "$name", "plugins": [{
    "type": "bridge", "bridge": "$_bridge", "ipMasq": false, "hairpinMode": true,
    "ipam": {"type": "host-local", "dataDir": "$dir/addresses",
        "ranges": [[{"subnet": "${cluster_address%.*}.0/24", "gateway": "$cluster_address",
            "rangeStart": "${cluster_address%.*}.$((16 + number * 32))", "rangeEnd": "${cluster_address%.*}.$((47 + number * 32))"}]],
        "routes": [{"dst": "0.0.0.0/0"}]}}]}
JSON
    # containerd 1.6 wants a host beside the server.
    printf 'server = "http://%s"\n[host."http://%s"]\n' "$registry" "$registry" >"$dir/hosts/$registry/hosts.toml"
    cat - ${more:+"$more"} >"$dir/cri.toml" <<TOML
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$sandbox"
  # Not every machine lets its root lower an OOM score.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "$(unpack_deb containernetworking-plugins)/usr/lib/cni"
  conf_dir = "$dir/net.d"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "$dir/hosts"
TOML
    at_exit unmount_below "$dir"
    start_containerd "$node_containerd" "$dir/cri.toml"
    at_exit _end_containers "${ctr[@]}"
    cat >"$dir/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $cluster_address
port: $(free_port "$cluster_address")
healthzPort: 0
readOnlyPort: 0
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failSwapOn: false
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 99
imageGCLowThresholdPercent: 98
volumePluginDir: $dir/volume-plugins
syncFrequency: 5s
YAML
    at_exit _remove_logs "$cluster/log/kubelet-$name"
    _cluster_process "kubelet-$name" "$programs/kubelet" --kubeconfig="$KUBECONFIG" --config="$dir/kubelet.yaml" \
        --container-runtime=remote --container-runtime-endpoint="unix://$containerd_socket" \
        --root-dir="$dir/kubelet" --cert-dir="$dir/certificates" --hostname-override="$name" \
        --node-ip="$cluster_address"
    cluster_nodes+=("$name")
    [ ${#cluster_nodes[@]} -gt 1 ] || at_exit _end_pods
    _cluster_wait "kubelet-$name" _node_is_ready "$name"
}
_node_is_ready() {
    [ "$("${kubectl[@]}" get node "$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]
}

# claim_cluster DIR: for this script; fails if another one that lives has it. What a script
# that was killed has left there is ended.
claim_cluster() {
    local dir=$1 pid started
    if read -r pid started 2>/dev/null <"$dir/owner" && [ "$(_started "$pid")" = "$started" ]; then
        die "$dir is in use by process $pid"
    fi
    end_shims "$dir"
    # Ours have a path below it among their arguments; somebody's editor is none of ours.
    for pid in $(grep -lzF -- "$dir/" /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3); do
        [[ $(readlink "/proc/$pid/exe") != "$cache"/* ]] || kill -KILL "$pid" 2>/dev/null || true
    done
    unmount_below "$dir"
    [ ! -e "$dir/bridge" ] || ip link delete "$(cat "$dir/bridge")" 2>/dev/null || true
    [ ! -e "$dir/bridge" ] || ip link delete "$(cat "$dir/bridge")-p" 2>/dev/null || true
    find "$dir" -mindepth 1 -maxdepth 1 -exec rm -rf --one-file-system {} +
    echo "$$ $(_started $$)" >"$dir/owner"
    at_exit rm -f "$dir/owner"
}

# When it started: numbers are given again.
_started() { awk '{ sub(/.*\) /, ""); print $20 }' "/proc/$1/stat" 2>/dev/null; }
# _cluster_process NAME CMD…: in the background, until the script ends.
_cluster_process() {
    local name=$1 pid
    shift
    "$@" >>"$cluster/log/$name" 2>&1 </dev/null &
    pid=$!
    at_exit stop_process "$pid"
    _cluster_pids[$name]=$pid
}
declare -A _cluster_pids=()
# _cluster_wait NAME CMD…: until CMD succeeds, as long as that process lives, five minutes at most.
_cluster_wait() {
    local name=$1 i
    shift
    for ((i = 0; i < 1500; i++)); do
        "$@" >/dev/null 2>&1 && return
        kill -0 "${_cluster_pids[$name]}" 2>/dev/null || break
        sleep 0.2
    done
    tail -n 30 "$cluster/log/$name" >&2
    die "the cluster's $name has not come up"
}
_cluster_bridge() {
    local n
    for ((n = 0; n < 200; n++)); do
        [ -z "$(ip -o address show to "10.211.$n.0/24")" ] || continue
        _bridge=accel-k8s-$n cluster_address=10.211.$n.1
        # With an address of its own: otherwise it takes that of one of its ports, another one
        # with each pod that comes, and pods lose sight of it for a while.
        ip link add "$_bridge" address "$(printf '02:ac:ce:10:00:%02x' "$n")" type bridge 2>/dev/null || continue
        echo "$_bridge" >"$cluster/bridge"
        at_exit ip link delete "$_bridge"
        ip address add "$cluster_address/24" dev "$_bridge"
        # Without a port a bridge has no carrier, and its address cannot be used before the
        # first pod.
        ip link add "$_bridge-p" type dummy 2>/dev/null && at_exit ip link delete "$_bridge-p" &&
            ip link set "$_bridge-p" master "$_bridge" up
        ip link set "$_bridge" up
        return
    done
    die "no bridge can be made for the cluster's pods"
}
_start_etcd() {
    local client peer
    client=$(free_port) peer=$(free_port)
    _etcd=http://127.0.0.1:$client
    _cluster_process etcd "$(unpack_deb etcd-server)/usr/bin/etcd" --data-dir "$cluster/etcd" --name one \
        --listen-client-urls "$_etcd" --advertise-client-urls "$_etcd" \
        --listen-peer-urls "http://127.0.0.1:$peer" --initial-advertise-peer-urls "http://127.0.0.1:$peer" \
        --initial-cluster "one=http://127.0.0.1:$peer" --unsafe-no-fsync
    _cluster_wait etcd curl -sf "$_etcd/health"
}
# What pods have of the network and of control groups goes when the kubelet ends them.
_end_pods() {
    local i
    "${kubectl[@]}" delete deployments,daemonsets,jobs --all --all-namespaces --wait=false --timeout=20s >/dev/null 2>&1
    "${kubectl[@]}" delete pods --all --all-namespaces --grace-period=1 --wait=false --timeout=20s >/dev/null 2>&1
    for ((i = 0; i < 100; i++)); do
        [ -n "$("${kubectl[@]}" get pods --all-namespaces -o name --request-timeout=5s 2>/dev/null)" ] || return 0
        sleep 0.2
    done
    true
}
# _remove_logs LOG: the pods' logs, whose place is fixed. This kubelet's are those whose UIDs it
# speaks of.
_remove_logs() {
    local pod log
    for pod in /var/log/pods/*_*; do
        grep -qsF -- "${pod##*_}" "$1" || continue
        for log in /var/log/containers/*; do
            [[ $(readlink "$log") != "$pod"/* ]] || rm -f "$log"
        done
        rm -rf --one-file-system "$pod"
    done
}
# _end_containers CTR…: whatever is left of them.
_end_containers() {
    local ctr=("$@" -n k8s.io) container
    for container in $("${ctr[@]}" containers list -q 2>/dev/null); do
        "${ctr[@]}" tasks kill -a -s KILL "$container" >/dev/null 2>&1
        "${ctr[@]}" tasks delete -f "$container" >/dev/null 2>&1
        "${ctr[@]}" containers delete "$container" >/dev/null 2>&1
    done
    end_shims "$cluster"
}
