# shellcheck shell=dash
# One TAP line for each case. A case is a command in a shell of its own: it fails by exit code, and whatever it did,
# the machine has to be afterwards as it was before.

WORK=/tmp/matrix
CASES=0
FAILED=0

tap_begin() {
    RELEASE=$(uname -r)
    BEFORE=$(machine_state)
}

# test_case DESCRIPTION COMMAND...
test_case() {
    local name="$RELEASE $BOOT: $1" status after
    shift
    CASES=$((CASES + 1))
    rm -rf "$WORK"
    mkdir "$WORK"
    (
        trap case_end EXIT
        set -eu
        "$@"
    ) </dev/null >"$WORK/log" 2>&1
    status=$?
    after=$(machine_state)
    if [ $status = 0 ] && [ "$after" != "$BEFORE" ]; then
        status=1
        printf 'the machine is not as before:\n%s\n' "$after" >>"$WORK/log"
    fi
    if [ $status != 0 ]; then
        rm -rf /var/run/vireo/*
        BEFORE=$(machine_state)
        FAILED=$((FAILED + 1))
        echo "not ok $CASES - $name"
        sed 's/^/#   /' "$WORK"/log "$WORK"/*.out "$WORK"/*.err 2>/dev/null
    elif [ -f "$WORK/skip" ]; then
        echo "ok $CASES - $name # SKIP $(cat "$WORK/skip")"
    else
        echo "ok $CASES - $name"
        [ ! -f "$WORK/note" ] || sed 's/^/# /' "$WORK/note"
    fi
}

# The plan comes last: who reads it knows that nothing was cut off.
tap_end() {
    echo "1..$CASES"
    exit $((FAILED > 0))
}

die() {
    echo "$*"
    exit 1
}

skip() {
    echo "$*" >"$WORK/skip"
    exit 0
}

CHILDREN=
UNDO=

# at_end COMMAND...: run when the case ends, however it ends; the last one first.
at_end() { UNDO="$* ; $UNDO"; }

case_end() {
    local child
    for child in $CHILDREN; do
        kill -KILL "$child" 2>/dev/null && wait "$child"
    done
    eval "$UNDO"
}
