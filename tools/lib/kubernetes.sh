# shellcheck shell=bash
# Kubernetes' programs. Needs common.sh and debian.sh.
#
# The newest that can be built from Debian alone is 1.20, whose source package in Debian
# 12 is complete; later ones have only kubectl. One difference to what users have comes from
# building it with Go 1.19: in custom resources an empty string counts as null.

# kubernetes_programs: builds API server, controller manager, scheduler and kubelet once into
# the cache (7 minutes, 3 GB of temporary files) and prints the directory they are in.
kubernetes_programs() { locked kubernetes _kubernetes_programs; }
_kubernetes_programs() (
    set -euo pipefail
    # A number for what this function does: another build, another directory.
    local build=1 dir tmp program
    dir=$cache/kubernetes-$build
    if [ ! -e "$dir/.complete" ]; then
        apt_install golang-go rsync jq make dpkg-dev >&2
        say "building Kubernetes, once: this takes some minutes"
        tmp=$(mktemp -d "${TMPDIR:-/var/tmp}/accel-kubernetes.XXXXXX")
        trap 'chmod -R u+w "$tmp"; rm -rf --one-file-system "$tmp"' EXIT
        # Their build finds the commit of a checkout that it happens to be in.
        export GIT_CEILING_DIRECTORIES=$tmp
        (
            cd "$tmp"
            suite_apt bookworm source
            apt-get "${suite_options[@]}" source kubernetes </dev/null
            cd kubernetes-*/
            # The vendored reflect2 knows the layout of maps in Go up to 1.17; with a later Go
            # the API server faults on the first custom resource.
            rm vendor/github.com/modern-go/reflect2/*.{go,s}
            cp "$(unpack_deb golang-github-modern-go-reflect2-dev)"/usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} \
                vendor/github.com/modern-go/reflect2/
            mkdir -p .go/src/k8s.io
            ln -s "$PWD" .go/src/k8s.io/kubernetes
            cd .go/src/k8s.io/kubernetes
            GOPATH=$PWD/.go GOCACHE=$tmp/go-build GOFLAGS= CGO_ENABLED=0 \
                make WHAT="cmd/kube-apiserver cmd/kube-controller-manager cmd/kube-scheduler cmd/kubelet"
        ) >"$tmp/log" 2>&1 || { tail -n 40 "$tmp/log" >&2; die "Kubernetes could not be built"; }
        rm -rf "$dir"
        mkdir -p "$dir"
        for program in kube-apiserver kube-controller-manager kube-scheduler kubelet; do
            install -m 755 -s "$(find "$tmp" -path "*/_output/*/bin/*" -name "$program" -type f | head -n 1)" "$dir/"
        done
        touch "$dir/.complete"
    fi
    echo "$dir"
)
