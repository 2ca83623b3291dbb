# shellcheck shell=bash
# The dependencies as cargo built them, kept in the cache for other checkouts: a first build
# spends most of its time on them. They are hard links; a cache on another file system than
# the checkout keeps none. Cargo tells by a hash in each name what was built from what, how
# and with which compiler, and takes only what fits. Needs common.sh.

# One directory for each compiler and Cargo.lock; only the last one used is kept.
_kept_dependencies() {
    local key
    key=$({ rustc -vV && cat "$repo/Cargo.lock"; } | sha256sum) || return
    echo "$cache/dependencies/${key%% *}"
}

# borrow_dependencies PROFILE…: puts them where a checkout without a build of PROFILE
# (a directory in cargo's target) has its own.
borrow_dependencies() {
    local target=${CARGO_TARGET_DIR:-$repo/target} kept profile
    kept=$(_kept_dependencies) || return 0
    for profile; do
        [ -d "$kept/$profile" ] && [ ! -e "$target/$profile" ] || continue
        mkdir -p "$target"
        cp -al "$kept/$profile" "$target/.borrowed.$$" 2>/dev/null && mv -T "$target/.borrowed.$$" "$target/$profile" ||
            rm -rf "$target/.borrowed.$$"
    done
}

# keep_dependencies PROFILE…: keeps those that are there, without what is the workspace's.
keep_dependencies() {
    local target=${CARGO_TARGET_DIR:-$repo/target} kept profile room new own
    kept=$(_kept_dependencies) || return 0
    own=$(cargo metadata --locked --no-deps --format-version 1 --manifest-path "$repo/Cargo.toml" |
        /usr/bin/python3 -c '
import json, sys
names = {t["name"] for p in json.load(sys.stdin)["packages"] for t in [p, *p["targets"]]}
print("|".join(sorted(names | {n.replace("-", "_") for n in names})))') || return 0
    for profile; do
        [ -d "$target/$profile" ] && [ ! -e "$kept/$profile" ] || continue
        mkdir -p "$kept"
        new=$(mktemp -d "$kept/new.XXXXXX")
        at_exit rm -rf "$new"
        for room in .fingerprint build deps; do
            mkdir "$new/$room"
            find "$target/$profile/$room" -mindepth 1 -maxdepth 1 -regextype posix-extended \
                ! -regex ".*/(lib)?($own)-[0-9a-f]{16}([.].*)?" -exec cp -al -t "$new/$room" {} + 2>/dev/null ||
                { rm -rf "$new"; continue 2; }
        done
        mv -T "$new" "$kept/$profile" 2>/dev/null || rm -rf "$new"
    done
    find "$cache/dependencies" -mindepth 1 -maxdepth 1 ! -path "$kept" -exec rm -rf {} +
}
