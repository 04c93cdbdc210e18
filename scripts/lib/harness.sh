# shellcheck shell=bash
# The program that has the tests and the soaks: the same executable on this machine and in the guest.

HARNESS=

harness_build() {
    say "building the programs"
    WORK=$(mktemp -d "${TMPDIR:-/tmp}/vireo-build.XXXXXX")
    trap 'rm -rf "$WORK"' EXIT
    programs_compile
    HARNESS=$(programs_find vireo-harness)
    # The callers exec, which runs no trap.
    rm -rf "$WORK"
}
