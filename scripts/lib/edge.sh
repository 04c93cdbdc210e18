# shellcheck shell=bash
# Kernel sources newer than the machine's release, through a private apt (apt.sh).

EDGE_SUITES=(trixie-backports sid)
# Package and version that everyone tests with, until lab kernel --kernel edge --update moves them forward.
EDGE_PIN="$SCRIPTS/kernel.edge"

edge_apt() { apt_private "$CACHE/apt" "$@"; }

edge_pinned_version() { awk 'NR == 1 {print $2}' "$EDGE_PIN"; }

# Prints "PACKAGE VERSION" of the pinned source, or of the newest one if the archive no longer has the pinned
# version.
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

# Prints "PACKAGE VERSION" of the newest kernel source >= 7.3 in the first suite that has one.
edge_newest() {
    local mirror suite newest
    mirror=$(debian_mirror)
    for suite in "${EDGE_SUITES[@]}"; do
        apt_private_lists "$CACHE/apt" "$mirror" "$suite" "$CACHE/apt-edge.log" || continue
        newest=$(edge_apt apt-cache search --names-only '^linux-source-[0-9]+\.[0-9]+$' |
            awk '{sub("linux-source-", "", $1); print $1}' | sort -V | tail -n1)
        if [[ -n $newest ]] && version_at_least "$newest" 7.3; then
            echo "linux-source-$newest $(edge_apt apt-cache policy "linux-source-$newest" | awk '$1 == "Candidate:" {print $2}')"
            return
        fi
    done
    fail "no linux-source of 7.3 or newer in ${EDGE_SUITES[*]} on $mirror (log: $CACHE/apt-edge.log)" "--kernel PATH"
}
