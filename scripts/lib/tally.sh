# shellcheck shell=bash
# Runs tests of several kinds, prints one TAP stream, and counts.

PASSED=0
FAILED=0
SKIPPED=0
TALLY_LOG=

tally_begin() {
    TALLY_LOG=$(mktemp "${TMPDIR:-/tmp}/vireo-test.XXXXXX")
    trap 'rm -f "$TALLY_LOG"' EXIT
    echo "TAP version 13"
}

# tally_line ok|not-ok|skip DESCRIPTION [REASON]
tally_line() {
    local number=$((PASSED + FAILED + SKIPPED + 1))
    case $1 in
        ok) PASSED=$((PASSED + 1)); echo "ok $number - $2" ;;
        skip) SKIPPED=$((SKIPPED + 1)); echo "ok $number - $2 # SKIP $3" ;;
        *) FAILED=$((FAILED + 1)); echo "not ok $number - $2" ;;
    esac
}

tally_skip() { tally_line skip "$1" "$2"; }

# tally_command DESCRIPTION COMMAND...: one case, which fails by its exit code, or says that it was SKIPPED.
tally_command() {
    local name=$1
    shift
    say "$name"
    if "$@" >"$TALLY_LOG" 2>&1; then
        if grep -q SKIPPED "$TALLY_LOG"; then
            tally_skip "$name" "$(grep -m1 SKIPPED "$TALLY_LOG")"
        else
            tally_line ok "$name"
        fi
    else
        tally_line not-ok "$name"
        sed 's/^/#   /' "$TALLY_LOG"
    fi
}

# tally_component DESCRIPTION cargo COMPONENT...: Debian's Rust comes without some of cargo's components.
tally_component() {
    if "$2" "$3" --version >/dev/null 2>&1; then
        tally_command "$@"
    else
        tally_skip "$1" "this Rust has no cargo $3"
    fi
}

# tally_cargo_tests COMMAND...: a case for each test that cargo reports.
tally_cargo_tests() {
    local line status=0
    say "unit tests"
    "$@" >"$TALLY_LOG" 2>&1 || status=$?
    while IFS= read -r line; do
        case $line in
            "test "*" ... ok") tally_line ok "${line% ... ok}" ;;
            "test "*" ... FAILED") tally_line not-ok "${line% ... FAILED}" ;;
            "test "*" ... ignored"*) tally_skip "${line% ... ignored*}" "${line##*ignored, }" ;;
        esac
    done <"$TALLY_LOG"
    if ((status != 0)); then
        tally_line not-ok "unit tests"
        sed 's/^/#   /' "$TALLY_LOG"
    fi
}

# tally_tap COMMAND...: passes TAP on under our numbers; a command that fails with no failed case is one.
tally_tap() {
    local line status=0 failed=$FAILED
    say "$*"
    while IFS= read -r line; do
        case $line in
            "ok "*"# SKIP"*) line=${line#ok * - }; tally_line skip "${line% # SKIP*}" "${line##*# SKIP }" ;;
            "ok "*) tally_line ok "${line#ok * - }" ;;
            "not ok "*) tally_line not-ok "${line#not ok * - }" ;;
            "TAP version"* | 1..*) ;;
            "Bail out!"*) tally_line not-ok "${line#Bail out! }" ;;
            *) printf '%s\n' "$line" ;;
        esac
    done < <("$@" || echo "Bail out! ${1##*/} ${2-} exited with $?")
    return 0
}

tally_end() {
    echo "1..$((PASSED + FAILED + SKIPPED))"
    echo "$PASSED passed, $FAILED failed, $SKIPPED skipped"
    ((FAILED == 0))
}
