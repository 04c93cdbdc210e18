# shellcheck shell=bash
# Messages for the user: one line per fact, all on stderr, because stdout belongs to the guest's command.

ME=${0##*/}

say() { printf '%s: %s\n' "$ME" "$*" >&2; }

# fail WHAT-AND-WHY [COMMAND THAT FIXES IT]
fail() {
    progress_end
    printf '%s: %s%s\n' "$ME" "$1" "${2:+; try: $2}" >&2
    exit 125
}

# Names the command at which errexit stops, so that no script ends silently. Subshells are left to their
# caller, and after exit code 125 fail has already printed the error.
ui_stopped() {
    local status=$1
    ((BASH_SUBSHELL == 0 && status != 125)) || return 0
    progress_end
    printf '%s: stopped at %s:%s: exit code %s of: %s\n' "$ME" "${BASH_SOURCE[1]##*/}" "${BASH_LINENO[0]}" "$status" "$BASH_COMMAND" >&2
}
set -o errtrace
trap 'ui_stopped $?' ERR

PROGRESS_SHOWN=
PROGRESS_NEXT=0

# On a terminal, a line that rewrites itself. In a pipe (CI), a plain line every 30 s, so that the run does
# not seem to hang.
progress() {
    if [[ -t 2 ]]; then
        printf '\r\033[K%s: %s' "$ME" "$*" >&2
        PROGRESS_SHOWN=1
    elif ((SECONDS >= PROGRESS_NEXT)); then
        say "$*"
        PROGRESS_NEXT=$((SECONDS + 30))
    fi
}

progress_end() {
    if [[ -n $PROGRESS_SHOWN ]]; then
        printf '\r\033[K' >&2
        PROGRESS_SHOWN=
    fi
    PROGRESS_NEXT=0
}

elapsed() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
