# shellcheck shell=bash
# The QEMU that boots the guest: normally the machine's own. Debian 12's QEMU is older than igb (8.0), so for
# that NIC a private apt fetches the one of Debian's backports and unpacks it in the cache. The machine's own
# QEMU does not change.

QEMU=(qemu-system-x86_64)
EMULATOR_PACKAGES=(qemu-system-x86 qemu-system-common qemu-system-data seabios)
EMULATOR_RELEASE=bookworm

# Checks the output, because QEMU also exits with 0 if it does not know the device.
qemu_has() { [[ $("${QEMU[@]}" -device "$1,help" 2>/dev/null) == "$1 options:"* ]]; }

qemu_version() { "${QEMU[@]}" --version | awk 'NR == 1 {print $4}'; }

# emulator_choose: sets QEMU to one that has the guest's NICs.
emulator_choose() {
    local dir
    if [[ ,$OPT_NICS, != *,igb,* ]] || qemu_has igb; then return; fi
    mkdir -p "$CACHE/qemu"
    dir=$(emulator_cached)
    [[ -n $dir ]] || dir=$(emulator_fetch)
    QEMU=(
        env "QEMU_MODULE_DIR=$dir/usr/lib/x86_64-linux-gnu/qemu" "$dir/usr/bin/qemu-system-x86_64"
        -L "$dir/usr/share/qemu" -L "$dir/usr/share/seabios"
    )
    qemu_has igb || emulator_missing "the QEMU in $dir has no igb, or does not run here"
    say "QEMU $(qemu_version) of Debian's backports, which has igb"
}

# Prints the directory of the newest unpacked QEMU, so that runs need no network.
emulator_cached() { find "$CACHE/qemu" -mindepth 1 -maxdepth 1 -type d -name '[0-9]*' | sort -V | tail -n1; }

# emulator_missing WHY: fails with WHY. Under the harness it also prints SKIPPED, and the tests skip the cases
# that need this QEMU.
emulator_missing() {
    [[ -z $OPT_HARNESS ]] || say "SKIPPED: $1"
    fail "$1" "--nics virtio-net,e1000,e1000e"
}

# Fetches and unpacks QEMU, and prints its directory.
emulator_fetch() {
    local apt="$CACHE/apt-qemu" log="$CACHE/qemu/fetch.log" work="$CACHE/qemu/fetching" mirror version lock
    if ! apt_available || [[ $(release_codename) != "$EMULATOR_RELEASE" ]]; then
        emulator_missing "this machine's QEMU $(qemu_version) has no igb (QEMU 8.0 has it), and the lab fetches a newer one only on Debian 12"
    fi
    exec {lock}>"$CACHE/qemu/lock"
    flock "$lock"
    if [[ -n $(emulator_cached) ]]; then
        # Another lab has just fetched it.
        emulator_cached
        return
    fi
    progress "QEMU of $EMULATOR_RELEASE-backports: package lists"
    mirror=$(debian_mirror)
    apt_private_lists "$apt" "$mirror" "$EMULATOR_RELEASE-backports" "$log" ||
        emulator_missing "the lists of $EMULATOR_RELEASE-backports could not be read (log: $log)"
    version=$(apt_private "$apt" apt-cache policy qemu-system-x86 | awk '$1 == "Candidate:" && $2 != "(none)" {print $2}')
    # Drop the epoch, because a colon separates paths in environment variables.
    version=${version#*:}
    [[ -n $version ]] || emulator_missing "$EMULATOR_RELEASE-backports has no qemu-system-x86"
    rm -rf "$work"
    mkdir -p "$work/download" "$work/root"
    progress "QEMU $version: download"
    (cd "$work/download" && apt_private "$apt" apt-get download "${EMULATOR_PACKAGES[@]}") >>"$log" 2>&1 ||
        emulator_missing "QEMU $version could not be downloaded (log: $log)"
    progress "QEMU $version: unpack"
    find "$work/download" -name '*.deb' -exec dpkg-deb -x {} "$work/root" \; >>"$log" 2>&1 ||
        fail "QEMU $version could not be unpacked into $work (log: $log)" "df -h $CACHE"
    # One rename, so that no lab finds a half-unpacked QEMU.
    mv -T "$work/root" "$CACHE/qemu/$version"
    rm -rf "$work"
    progress_end
    exec {lock}>&-
    echo "$CACHE/qemu/$version"
}
