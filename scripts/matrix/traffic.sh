# shellcheck shell=dash disable=SC3045  # busybox's read has -t
# l2fwd as a process that is watched, and pktgen that sends through it.

# Seconds for which a program may be silent before it counts as hung.
PATIENCE=30
# Enough to go round the rings of 1024 many times.
COUNT=20000

L2FWD=
L2FWD_STATUS=

# start_l2fwd ARGUMENTS...: returns when it forwards.
start_l2fwd() {
    spawn_l2fwd "$@"
    await "entering main loop"
}

spawn_l2fwd() {
    [ -p "$WORK/stdout" ] || mkfifo "$WORK/stdout"
    # shellcheck disable=SC2086  # UNDER is a command with its arguments
    ${UNDER:-} l2fwd --file-prefix fwd "$@" >"$WORK/stdout" 2>>"$WORK/l2fwd.err" &
    L2FWD=$!
    CHILDREN="$CHILDREN $L2FWD"
    exec 3<"$WORK/stdout"
}

# await TEXT: reads on to a line with TEXT.
await() {
    local line
    while IFS= read -r -t "$PATIENCE" line <&3; do
        echo "$line" >>"$WORK/l2fwd.out"
        case $line in
            *"$1"*) return ;;
        esac
    done
    die "l2fwd did not come to '$1'"
}

# await_traffic: reads on to the first packets. What l2fwd prints afterwards nobody reads: with a table every 0.5 s it
# takes minutes to fill the pipe, and then l2fwd would wait for a reader.
await_traffic() {
    local line
    while IFS= read -r -t "$PATIENCE" line <&3; do
        echo "$line" >>"$WORK/l2fwd.out"
        case $line in
            *" received 0 "*) ;;
            "port 0: "*) return ;;
        esac
    done
    die "no traffic came through l2fwd"
}

# end_l2fwd SIGNAL: sets L2FWD_STATUS.
end_l2fwd() {
    kill "-$1" "$L2FWD"
    reap_l2fwd
}

reap_l2fwd() {
    local line
    while IFS= read -r -t "$PATIENCE" line <&3; do
        echo "$line" >>"$WORK/l2fwd.out"
    done
    exec 3<&-
    # Silence and end look the same to read; but only what runs has an executable.
    ! readlink "/proc/$L2FWD/exe" || die "l2fwd does not end"
    L2FWD_STATUS=0
    wait "$L2FWD" || L2FWD_STATUS=$?
}

# A run that ends as it should: all buffers back, the last word said, no complaints.
stop_l2fwd() {
    end_l2fwd "${1:-INT}"
    [ "$L2FWD_STATUS" = 0 ] || die "l2fwd exited with $L2FWD_STATUS"
    [ "$(tail -n1 "$WORK/l2fwd.out")" = "Bye..." ] || die "l2fwd did not say Bye..."
    [ ! -s "$WORK/l2fwd.err" ] || die "l2fwd complained"
}

# said TEXT: l2fwd printed it.
said() { grep -qF -- "$1" "$WORK/l2fwd.out" || die "l2fwd did not say '$1'"; }

# counted PORT SENT RECEIVED: what l2fwd said at its end.
counted() {
    case $(grep "^port $1: " "$WORK/l2fwd.out" | tail -n1) in
        "port $1: sent $2 ("*") received $3 ("*") dropped 0") ;;
        *) die "port $1 of l2fwd did not count $2 sent, $3 received, 0 dropped" ;;
    esac
}

# carries RX TX: COUNT frames each way between the generator's NICs of these kinds, through the forwarder's. They have
# to come back each once, in order, and with the addresses that the forwarder gives them.
carries() {
    stream "$1" "$2" 0 "$(mac "$1" fwd_rx)" 1 "$(mac "$2" fwd_tx)"
    stream "$1" "$2" 1 "$(mac "$2" fwd_tx)" 0 "$(mac "$1" fwd_rx)"
}

# stream RX TX PORT MAC PORT MAC: the generator's and the forwarder's ports have the same numbers, those of the order of
# their addresses.
stream() {
    generate "$1" "$2" --tx-port "$3" --dst-mac "$4" --rx-port "$5" --expect-dst "02:00:00:00:00:0$5" --expect-src "$6" \
        --count $COUNT || die "pktgen exited with $?"
    came_back $COUNT $COUNT
}

# generate RX TX ARGUMENTS...: to its end.
generate() {
    local ports
    ports=$(generator_ports "$1" "$2")
    shift 2
    # shellcheck disable=SC2086  # words of a command line
    timeout "$PATIENCE" pktgen $ports -- "$@" --json >"$WORK/pktgen.out" 2>"$WORK/pktgen.err"
}

# start_generator RX TX ARGUMENTS...: PKTGEN is the program itself. A function in the background would be a shell in
# between, and one that ignores SIGINT.
start_generator() {
    local ports
    ports=$(generator_ports "$1" "$2")
    shift 2
    # shellcheck disable=SC2086  # words of a command line
    pktgen $ports -- "$@" --json >"$WORK/pktgen.out" 2>"$WORK/pktgen.err" &
    PKTGEN=$!
    CHILDREN="$CHILDREN $PKTGEN"
}

generator_ports() {
    echo "-l 0 --file-prefix gen --vfio-mode $GENERATOR_MODE -a $(bdf "$1" gen_tx) -a $(bdf "$2" gen_rx)"
}

# came_back SENT RECEIVED: what pktgen saw, and nothing else.
came_back() {
    result sent "$1"
    result received "$2"
    result duplicates 0
    result reordered 0
    result wrong_address 0
    result corrupt 0
    result strays 0
}

# value NAME: of what pktgen printed.
value() { sed -n "s/.*[{,]\"$1\":\([0-9]*\)[,}].*/\1/p" "$WORK/pktgen.out"; }

result() {
    local value
    value=$(value "$1")
    [ "$value" = "$2" ] || die "pktgen has $1 = $value, not $2"
}
