# shellcheck shell=bash
# A shell has no event for what another process does.

# await SECONDS COMMAND...: until the command succeeds.
await() {
    local left=$(($1 * 50))
    shift
    until "$@"; do
        ((left-- > 0)) || return
        sleep 0.02
    done
}
