# shellcheck shell=bash
# Debian's packages without naming any archive: addresses, suites and keys come
# from this machine's own apt configuration.

debian_codename() { (. /etc/os-release && echo "$VERSION_CODENAME"); }

# apt_sources CODENAME: the machine's Debian sources of that release (with its
# updates and security suites), one-line style.
apt_sources() {
    apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)' 'Created-By: Packages' |
        awk -v want="$1" '
            $4 == "Debian" && ($2 == want || $2 == want "-updates" || $2 == want "-security") && $3 == "main" {
                print "deb " $1 " " $2 " main"
            }' | sort -u
}

# installed PKG…: are all of them?
installed() {
    local states
    states=$(dpkg-query -W -f '${db:Status-Status}\n' "$@" 2>/dev/null) || return 1
    ! grep -qvx installed <<<"$states"
}

# apt_install PKG…: installs what is missing. Services that a package brings are
# not started: policy-rc.d says no while apt runs, and is put back as it was.
apt_install() {
    installed "$@" && return 0
    local missing=() p
    for p in "$@"; do installed "$p" || missing+=("$p"); done
    [ "$(id -u)" = 0 ] || die "missing packages, and only root can install them: ${missing[*]}"
    say "installing ${missing[*]}"
    apt_update
    (
        policy=/usr/sbin/policy-rc.d
        if [ ! -e "$policy" ]; then
            trap 'rm -f "$policy"' EXIT
            printf '#!/bin/sh\nexit 101\n' >"$policy"
            chmod 755 "$policy"
        fi
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
            -o DPkg::Lock::Timeout=600 "${missing[@]}" </dev/null >&2
    ) || die "apt-get could not install: ${missing[*]}"
}

# Package lists, once per day.
apt_update() {
    local stamp=$cache/apt-updated
    if [ -z "$(find "$stamp" -mmin -1440 2>/dev/null)" ] || [ -z "$(ls /var/lib/apt/lists/*Packages* 2>/dev/null)" ]; then
        apt-get update -q -o DPkg::Lock::Timeout=600 </dev/null >&2 || die "apt-get update failed"
        mkdir -p "$cache" && touch "$stamp"
    fi
}

# unpack_deb PKG: unpacks the package (without its dependencies) below the cache
# and prints where. For daemons that only tests run: nothing gets installed, so
# nothing gets enabled or started.
unpack_deb() { locked "deb-$1" _unpack_deb "$1"; }
_unpack_deb() {
    local pkg=$1 dir=$cache/debs/$1 tmp
    if [ ! -e "$dir/.complete" ]; then
        apt_update
        tmp=$(mktemp -d "${TMPDIR:-/tmp}/unpack-deb.XXXXXX")
        chmod 755 "$tmp"
        (cd "$tmp" && apt-get download -q "$pkg" -o APT::Sandbox::User=root </dev/null >&2) ||
            { rm -rf "$tmp"; die "apt-get could not download $pkg"; }
        rm -rf "$dir"
        mkdir -p "$dir"
        dpkg-deb -x "$tmp"/*.deb "$dir"
        rm -rf "$tmp"
        touch "$dir/.complete"
    fi
    echo "$dir"
}
