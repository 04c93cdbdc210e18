# shellcheck shell=dash
# Forwarding with a fault in each round, from a seed; and cables that are pulled and put back.

# Frames of a stream without a fault: so many that starts and ends of programs are the smaller part of the time.
SOAK_COUNT=200000

# monitor COMMAND...: of QEMU.
monitor() {
    local port
    for port in /sys/class/virtio-ports/*; do
        [ "$(cat "$port/name")" != monitor.in ] || echo "$*" >"/dev/${port##*/}"
    done
}

has_monitor() { grep -qx monitor.in /sys/class/virtio-ports/*/name; }

# pull NIC POSITION; put NIC POSITION: QEMU names the end of a wire by its NIC's slot.
pull() { monitor "set_link n$(slot "$1" "$2") off"; }
put() { monitor "set_link n$(slot "$1" "$2") on"; }

# flaps MODE
flaps() {
    local nic times=${LONG:+1000}
    for nic in $NICS; do
        test_case "the link of $nic goes and comes back under traffic, $1" survives_flaps "$1" "$nic" "${times:-3}"
    done
}

# survives_flaps MODE NIC TIMES: while frames pass in between.
survives_flaps() {
    local left=$3
    has_monitor || skip "the guest has no way to QEMU's monitor (lab --monitor)"
    # The traffic has to last for all of them.
    PATIENCE=$((PATIENCE + $3))
    start_under_traffic "$1" "$2"
    at_end put "$2" fwd_tx
    while [ "$left" -gt 0 ]; do
        pull "$2" fwd_tx
        await_log "port 1: link down"
        put "$2" fwd_tx
        await_log "port 1: link up"
        left=$((left - 1))
    done
    end_traffic
    carries "$2" "$2"
    mv "$WORK/l2fwd.err" "$WORK/flaps.err"
    stop_l2fwd
    grep -q "^Port 1 counted: .*link_changes $((2 * $3))" "$WORK/l2fwd.out" || die "port 1 did not count its link's changes"
}

# random N: sets RANDOM_NUMBER to 0..N-1, as scripts/lib/soak.sh does.
random() {
    SOAK_STATE=$(((SOAK_STATE * 1103515245 + 12345) & 0x7fffffff))
    RANDOM_NUMBER=$(((SOAK_STATE >> 12) % $1))
}

# soaks SECONDS PACKETS SEED KINDS MODE...
soaks() {
    local mode nic seconds=$1 packets=$2 seed=$3 kinds=$4
    shift 4
    for mode; do
        for nic in $kinds; do
            test_case "$nic, seed $seed, $mode" soak "$mode" "$nic" "$seconds" "$packets" "$seed"
            [ ! -f "$WORK/figures" ] || sed 's/^/# /' "$WORK/figures"
        done
    done
}

# soak MODE NIC SECONDS PACKETS SEED: lives of l2fwd, each with streams both ways and faults between and under them, until
# the time is over or so many packets (if not 0) came back. What a stream without a fault loses is an error; what one with
# a fault loses is counted.
soak() {
    local life=0 stream faults='' fault
    SOAK_STATE=$(($5 + CASES))
    SENT=0
    RECEIVED=0
    SOAK_END=$(($(date +%s) + $3))
    SOAK_PACKETS=$4
    COUNT=$SOAK_COUNT
    # It may share its machine for hours with whatever else is done there.
    PATIENCE=300
    GENERATOR_MODE=$1
    while soak_goes_on; do
        life=$((life + 1))
        start_l2fwd -l 1 --vfio-mode "$1" -a "$(bdf "$2" fwd_rx)" -a "$(bdf "$2" fwd_tx)" -- -p 3 -q 2 -T 0
        OPEN=
        for stream in 1 2 3; do
            clean_stream "$2" 0 fwd_rx 1
            clean_stream "$2" 1 fwd_tx 0
            measure
            random 4
            case $RANDOM_NUMBER in
                0) fault=lose_bus_master ;;
                1) fault=lose_link ;;
                2) fault=lose_time ;;
                3) fault=true ;;
            esac
            under_fault "$1" "$2" $fault
            faults="$faults $fault"
            soak_goes_on || break
        done
        random 3
        if [ "$RANDOM_NUMBER" = 0 ]; then
            faults="$faults SIGKILL"
            end_l2fwd KILL
            [ "$L2FWD_STATUS" = 137 ] || die "l2fwd exited with $L2FWD_STATUS"
        else
            faults="$faults SIGINT"
            end_l2fwd INT
            [ "$L2FWD_STATUS" = 0 ] || die "l2fwd exited with $L2FWD_STATUS"
        fi
        cat "$WORK/l2fwd.err" >>"$WORK/all.err"
        : >"$WORK/l2fwd.err"
        LOGGED=0
        # The case's own output is kept until its end, and this takes hours.
        echo "$2, $1: $RECEIVED packets came back, $life lives" >"/proc/$$/fd/2"
    done
    # The next start says that it recovers what a killed one left; here it has nothing to say.
    rm -rf /var/run/vireo/fwd*
    echo "{\"mode\":\"$1\",\"nic\":\"$2\",\"seed\":$5,\"lives\":$life,\"sent\":$SENT,\"received\":$RECEIVED," \
        "\"descriptors\":$OPEN,\"faults\":\"${faults# }\"}" >"$WORK/figures"
}

soak_goes_on() {
    [ "$(date +%s)" -lt "$SOAK_END" ] && { [ "$SOAK_PACKETS" = 0 ] || [ "$RECEIVED" -lt "$SOAK_PACKETS" ]; }
}

# Descriptors and private memory of l2fwd, against those at the first stream of its life.
measure() {
    local open anon
    set -- "/proc/$L2FWD/fd"/*
    open=$#
    anon=$(awk '$1 == "RssAnon:" {print $2}' "/proc/$L2FWD/status")
    if [ -n "$OPEN" ]; then
        [ "$open" -le "$OPEN" ] || die "l2fwd has $open descriptors open, and had $OPEN"
        [ $((anon - ANON)) -le 1024 ] || die "l2fwd has $anon KiB of private memory, and had $ANON"
    else
        OPEN=$open
        ANON=$anon
    fi
}

# clean_stream NIC PORT FORWARDER-END PORT: nothing is lost.
clean_stream() {
    generate "$1" "$1" --tx-port "$2" --dst-mac "$(mac "$1" "$3")" --rx-port "$4" --count "$COUNT" --size 60-1514 ||
        die "pktgen exited with $?"
    came_back "$COUNT" "$COUNT"
    SENT=$((SENT + COUNT))
    RECEIVED=$((RECEIVED + COUNT))
}

# under_fault MODE NIC FAULT: frames may be lost, and none may be other than it was sent.
under_fault() {
    start_generator "$2" "$2" --dst-mac "$(mac "$2" fwd_rx)" --duration "$PATIENCE" --size 60-1514
    sleep 2
    "$3" "$2"
    end_traffic
    unharmed
    SENT=$((SENT + $(value sent)))
    RECEIVED=$((RECEIVED + $(value received)))
}

lose_bus_master() {
    printf '\003\000' | dd of="/sys/bus/pci/devices/$(bdf "$1" fwd_tx)/config" bs=1 seek=4 conv=notrunc 2>/dev/null
    await_log "port 1: .* it is restarted"
    await_log "port 1 is up again"
}

lose_link() {
    has_monitor || return 0
    pull "$1" fwd_tx
    await_log "port 1: link down"
    put "$1" fwd_tx
    await_log "port 1: link up"
}

lose_time() {
    kill -STOP "$L2FWD"
    sleep 1
    kill -CONT "$L2FWD"
}

unharmed() {
    local name
    for name in duplicates reordered wrong_address corrupt strays; do
        result $name 0
    done
}
