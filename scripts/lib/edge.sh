# shellcheck shell=bash
# Kernel sources newer than the machine's release, through an apt of our own: the machine's sources, lists and
# pins are neither read nor written, only its keyring and the mirror that it already uses.

EDGE_SUITES=(trixie-backports sid)
# Package and version that everybody tests with, until lab kernel --kernel edge --update moves them forward.
EDGE_PIN="$SCRIPTS/kernel.edge"
EDGE_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# The mirror is what the machine's own sources name for its release itself (the security archive has no other suites).
debian_mirror() {
    local codename
    # shellcheck disable=SC1091
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [[ -n $codename ]] || fail "no Debian release named in /etc/os-release, so the mirror for edge kernels is unknown" "--kernel PATH"
    # shellcheck disable=SC2016  # the parentheses are apt's
    LC_ALL=C apt-get indextargets --format '$(SITE) $(RELEASE) $(CODENAME)' 'Created-By: Packages' |
        awk -v suite="$codename" '$2 == suite || $3 == suite {mirror = $1} END {print mirror}'
}

edge_apt() {
    local tool=$1 dir="$CACHE/apt"
    shift
    "$tool" -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o Dir::State="$dir/state" -o Dir::State::status=/dev/null -o Dir::Cache="$dir/cache" \
        -o APT::Architecture=amd64 -o APT::Sandbox::User=root -o Debug::NoLocking=1 "$@"
}

edge_pinned_version() { awk 'NR == 1 {print $2}' "$EDGE_PIN"; }

# Prints "PACKAGE VERSION" of what is pinned, or where the archive has moved on, of the newest there is.
edge_source() {
    local pinned newest
    pinned=$(<"$EDGE_PIN")
    newest=$(edge_newest)
    if [[ -n $(edge_apt apt-cache madison "${pinned% *}" | awk -v version="${pinned#* }" '$3 == version') ]]; then
        echo "$pinned"
    else
        say "the archive has ${newest#* } instead of ${pinned#* }, which scripts/kernel.edge pins"
        echo "$newest"
    fi
}

# Prints "PACKAGE VERSION" of the newest kernel source >= 7.3 of the first suite that has one.
edge_newest() {
    local dir="$CACHE/apt" mirror suite newest
    mirror=$(debian_mirror)
    [[ -n $mirror ]] || fail "no Debian mirror in this machine's apt sources" "apt-get update, or --kernel PATH"
    [[ -r $EDGE_KEYRING ]] || need_packages debian-archive-keyring
    for suite in "${EDGE_SUITES[@]}"; do
        rm -rf "$dir"
        mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
        echo "deb [signed-by=$EDGE_KEYRING] $mirror $suite main" >"$dir/sources.list"
        edge_apt apt-get update >"$CACHE/apt-edge.log" 2>&1 || continue
        newest=$(edge_apt apt-cache search --names-only '^linux-source-[0-9]+\.[0-9]+$' |
            awk '{sub("linux-source-", "", $1); print $1}' | sort -V | tail -n1)
        if [[ -n $newest ]] && version_at_least "$newest" 7.3; then
            echo "linux-source-$newest $(edge_apt apt-cache policy "linux-source-$newest" | awk '$1 == "Candidate:" {print $2}')"
            return
        fi
    done
    fail "no linux-source of 7.3 or newer in ${EDGE_SUITES[*]} on $mirror (log: $CACHE/apt-edge.log)" "--kernel PATH"
}
