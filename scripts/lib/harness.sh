# shellcheck shell=bash
# The program that has the tests and the soaks: the same executable on this machine and in the guest.

HARNESS=

# Its messages are cargo's own; what it prints on standard output is not for the caller's.
harness_build() {
    say "building the programs"
    WORK=$(mktemp -d "${TMPDIR:-/tmp}/vireo-build.XXXXXX")
    programs_compile
    HARNESS=$(programs_find vireo-harness)
    rm -rf "$WORK"
}
