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
        export DEBIAN_FRONTEND=noninteractive
        # What an interruption has left half done: apt refuses everything until then.
        [ -z "$(ls /var/lib/dpkg/updates)" ] || dpkg --configure -a </dev/null >&2
        apt-get install -y -q --no-install-recommends \
            -o DPkg::Lock::Timeout=600 "${missing[@]}" </dev/null >&2
    ) || die "apt-get could not install: ${missing[*]}"
}

# Package lists, once per day.
apt_update() {
    local stamp=$cache/apt-updated
    if [ -z "$(find "$stamp" -mmin -1440 2>/dev/null)" ] || [ -z "$(ls /var/lib/apt/lists/*Packages* 2>/dev/null)" ]; then
        apt-get update -q -o DPkg::Lock::Timeout=600 </dev/null >&2 || die "apt-get update failed"
        mkdir -p "$cache"
        touch "$stamp"
    fi
}

# unpack_deb PKG [SUITE]: unpacks the package (without its dependencies) below the cache
# and prints where. For daemons that only tests run: nothing gets installed, so
# nothing gets enabled or started. SUITE: another release than the machine's, read
# through an apt directory of its own.
unpack_deb() { locked "deb-$1${2:+-$2}" _unpack_deb "$@"; }
_unpack_deb() {
    local pkg=$1 suite=${2:-} dir=$cache/debs/$1${2:+-$2} tmp
    if [ ! -e "$dir/.complete" ]; then
        [ -n "$suite" ] || apt_update
        local suite_options=()
        [ -z "$suite" ] || suite_apt "$suite"
        tmp=$(mktemp -d "${TMPDIR:-/tmp}/unpack-deb.XXXXXX")
        chmod 755 "$tmp"
        (cd "$tmp" && apt-get "${suite_options[@]}" download -q "$pkg" -o APT::Sandbox::User=root </dev/null >&2) ||
            { rm -rf "$tmp"; die "apt-get could not download $pkg${suite:+ of $suite}"; }
        rm -rf "$dir"
        mkdir -p "$dir"
        dpkg-deb -x "$tmp"/*.deb "$dir"
        rm -rf "$tmp"
        touch "$dir/.complete"
    fi
    echo "$dir"
}

# suite_apt SUITE [source]: sets suite_options to those of an apt that knows that release
# only: its packages, or its source packages. Its lists are read once per day.
suite_apt() {
    local suite=$1 kind=${2:-} keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    local dir=$cache/apt-$suite${kind:+-$kind} archive
    suite_options=(
        -q -o "Dir::State=$dir" -o "Dir::State::lists=$dir/lists" -o "Dir::State::status=$dir/status"
        -o "Dir::Cache=$dir" -o "Dir::Cache::archives=$dir/archives" -o "Dir::Log=$dir"
        -o "Dir::Etc::sourcelist=$dir/sources.list" -o "Dir::Etc::sourceparts=$dir/parts"
        -o Dir::Etc::preferences=/dev/null -o "Dir::Etc::preferencesparts=$dir/parts"
        -o APT::Sandbox::User=root -o Acquire::Retries=3
    )
    locked "apt-$suite${kind:+-$kind}" _suite_lists
}
_suite_lists() {
    [ -z "$(find "$dir/updated" -mmin -1440 2>/dev/null)" ] || return 0
    archive=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)' 'Created-By: Packages' |
        awk -v want="$(debian_codename)" '$4 == "Debian" && $2 == want && $3 == "main" { print $1; exit }')
    [ -n "$archive" ] || die "this machine's apt configuration names no archive of Debian's $(debian_codename) main"
    [ -f "$keyring" ] || keyring=
    mkdir -p "$dir/lists/partial" "$dir/archives/partial" "$dir/parts"
    touch "$dir/status"
    case $kind in
    source) echo "deb-src ${keyring:+[signed-by=$keyring] }$archive $suite main" ;;
    *) echo "deb [target=Packages${keyring:+ signed-by=$keyring}] $archive $suite main" ;;
    esac >"$dir/sources.list"
    apt-get "${suite_options[@]}" -o APT::Update::Error-Mode=any update </dev/null >&2 ||
        die "the package lists of $suite cannot be read"
    touch "$dir/updated"
}
