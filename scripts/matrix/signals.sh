# shellcheck shell=dash
# Signals: a clean end for those that can be caught, and for the one that cannot, a machine on which the next start
# works.

ends_on_signals() {
    local signal
    for signal in INT TERM; do
        test_case "SIG$signal under traffic ends with Bye, $1" ends_on "$signal" "$1"
    done
    test_case "a second signal ends it at once, $1" ends_on_two "$1"
}

ends_on() {
    start_under_traffic "$2" virtio-net
    stop_l2fwd "$1"
    said "Signal"
    # Port 0 receives and port 1 sends.
    tail -n 20 "$WORK/l2fwd.out" | awk '/^port 0: / { got = $7 } /^port 1: / { sent = $4; lost = $10 }
        END { if (got == 0 || got != sent + lost) { print "received " got ", sent " sent ", dropped " lost; exit 1 } }'
    end_traffic
}

# Both signals wait until it runs again, so it cannot end by the first.
ends_on_two() {
    start_under_traffic "$1" e1000e
    kill -STOP "$L2FWD"
    kill -INT "$L2FWD"
    kill -TERM "$L2FWD"
    end_l2fwd CONT
    [ "$L2FWD_STATUS" = 130 ] || die "l2fwd exited with $L2FWD_STATUS"
    end_traffic
    forwards_after_kill e1000e e1000e "$1"
}

# killed_again_and_again MODE: under traffic that never ends, and each time the next start works.
killed_again_and_again() {
    local round=0 free rounds=${LONG:+100}
    rounds=${rounds:-5}
    [ "$1" != noiommu-cdev ] || need_noiommu_cdev
    generate_at_rate e1000e "$1"
    stop_l2fwd
    free=$(cat "$HUGEPAGES/free_hugepages")
    while [ "$round" -lt "$rounds" ]; do
        round=$((round + 1))
        : >"$WORK/l2fwd.err"
        start_l2fwd -l 1 --vfio-mode "$1" -a "$(bdf e1000e fwd_rx)" -a "$(bdf e1000e fwd_tx)" -- -p 3 -q 2 -T 0.02
        [ "$round" = 1 ] || grep -q "^EAL: previous run (pid $L2FWD_KILLED) ended uncleanly, recovered" "$WORK/l2fwd.err" ||
            die "round $round: it did not say that it recovered"
        await_traffic
        L2FWD_KILLED=$L2FWD
        end_l2fwd KILL
        [ "$L2FWD_STATUS" = 137 ] || die "round $round: l2fwd exited with $L2FWD_STATUS"
        [ "$(cat "$HUGEPAGES/free_hugepages")" = "$free" ] || die "round $round: hugepages were not given back"
    done
    end_traffic
    forwards_after_kill e1000e e1000e "$1"
    echo "$rounds of $rounds restarts worked at once" >"$WORK/note"
}

# survives_kill MODE
survives_kill() {
    local nic
    for nic in $NICS; do
        test_case "SIGKILL under traffic, then $nic works, $1" works_after_kill "$1" "$nic"
    done
    test_case "SIGKILL at each step of the start, $1" works_after_early_kills "$1"
    test_case "SIGKILL under traffic and restart, again and again, $1" killed_again_and_again "$1"
}

works_after_kill() {
    [ "$1" != noiommu-cdev ] || need_noiommu_cdev
    start_under_traffic "$1" "$2"
    end_l2fwd KILL
    [ "$L2FWD_STATUS" = 137 ] || die "l2fwd exited with $L2FWD_STATUS"
    end_traffic
    forwards_after_kill "$2" "$2" "$1"
}

# It says on stderr that it found what the dead one left, and nothing else.
forwards_after_kill() {
    start_l2fwd -l 1 --vfio-mode "$3" -a "$(bdf "$1" fwd_rx)" -a "$(bdf "$2" fwd_tx)" -- -p 3 -q 2 -T 0
    grep -q "^EAL: previous run .* ended uncleanly, recovered" "$WORK/l2fwd.err" || die "it did not say that it recovered"
    grep -v "ended uncleanly, recovered" "$WORK/l2fwd.err" >"$WORK/rest.err" || : >"$WORK/l2fwd.err"
    carries "$1" "$2"
    stop_l2fwd
}

# The line after which it is killed stands for the moment.
works_after_early_kills() {
    local line
    [ "$1" != noiommu-cdev ] || need_noiommu_cdev
    for line in "Port 0:" "Lcore 1:" "Port 0, MAC" "Port 1, MAC" "Checking link" "entering"; do
        spawn_l2fwd -l 1 --vfio-mode "$1" -a "$(bdf e1000 fwd_rx)" -a "$(bdf e1000e fwd_tx)" -- -p 3 -q 2 -T 0
        await "$line"
        end_l2fwd KILL
    done
    forwards_after_kill e1000 e1000e "$1"
}

# start_under_traffic MODE NIC: returns when frames pass.
start_under_traffic() {
    start_l2fwd -l 1 --vfio-mode "$1" -a "$(bdf "$2" fwd_rx)" -a "$(bdf "$2" fwd_tx)" -- -p 3 -q 2 -T 0.5
    start_generator "$2" "$2" --dst-mac "$(mac "$2" fwd_rx)" --duration "$PATIENCE"
    await_traffic
}

# generate_at_rate NIC MODE: sends whether or not the frames come back; returns when they pass.
generate_at_rate() {
    start_generator "$1" "$1" --dst-mac "$(mac "$1" fwd_rx)" --rate 5000 --window 100000000 --duration 100000
    start_l2fwd -l 1 --vfio-mode "$2" -a "$(bdf "$1" fwd_rx)" -a "$(bdf "$1" fwd_tx)" -- -p 3 -q 2 -T 0.02
    await_traffic
}

# Frames were lost with the forwarder, which pktgen's exit code tells.
end_traffic() {
    kill -INT "$PKTGEN"
    wait "$PKTGEN" || [ $? = 1 ]
}

# outlived_by_memory ARGUMENTS...: without an IOMMU nothing pins the pages of a killed process. The kernel closes the
# highest descriptor first, so that has to be the NIC's.
outlived_by_memory() {
    local fd target device=0 memory=0
    start_l2fwd -l 1 --vfio-mode noiommu -a "$(bdf e1000e fwd_rx)" "$@" -- -p 1 -T 0
    for fd in /proc/"$L2FWD"/fd/*; do
        target=$(readlink "$fd")
        fd=${fd##*/}
        case $target in
            *vfio-device*) [ "$fd" -lt "$device" ] || device=$fd ;;
            *memfd:* | /dev/hugepages/*) [ "$fd" -lt "$memory" ] || memory=$fd ;;
        esac
    done
    said "no IOMMU: the NICs can reach all memory of this machine"
    stop_l2fwd
    [ "$memory" -gt 0 ] || die "its memory is no file"
    [ "$device" -gt "$memory" ] || die "the NIC is descriptor $device, its memory $memory"
}
