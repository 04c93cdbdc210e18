# shellcheck shell=bash
# Builds the program that runs the tests and soaks: the same executable on this machine and in the guest.

HARNESS=

harness_build() {
    say "building the programs"
    WORK=$(mktemp -d "${TMPDIR:-/tmp}/vireo-build.XXXXXX")
    trap 'rm -rf "$WORK"' EXIT
    programs_compile
    HARNESS=$(programs_find vireo-harness)
    # The callers use exec, which does not run the EXIT trap.
    rm -rf "$WORK"
}
