# shellcheck shell=dash
# Signals: a clean end for those that can be caught, and for the one that cannot, a machine on which the next start
# works.

ends_on_signals() {
    local signal
    for signal in INT TERM; do
        test_case "SIG$signal under traffic ends with Bye, $1" ends_on "$signal" "$1"
    done
}

ends_on() {
    start_under_traffic "$2" virtio-net
    stop_l2fwd "$1"
    said "Signal"
    end_traffic
}

# survives_kill MODE
survives_kill() {
    local nic
    for nic in $NICS; do
        test_case "SIGKILL under traffic, then $nic works, $1" works_after_kill "$1" "$nic"
    done
    test_case "SIGKILL at each step of the start, $1" works_after_early_kills "$1"
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
    start_l2fwd -l 1 --vfio-mode "$1" -a "$(bdf "$2" fwd_rx)" -a "$(bdf "$2" fwd_tx)" -- -p 3 -q 2 -T 0.05
    generate "$2" "$2" --dst-mac "$(mac "$2" fwd_rx)" --duration "$PATIENCE" &
    PKTGEN=$!
    CHILDREN="$CHILDREN $PKTGEN"
    await "port 0: sent 0 (0/s) received 1"
}

# Frames were lost with the forwarder, which pktgen's exit code tells.
end_traffic() {
    kill -INT "$PKTGEN"
    wait "$PKTGEN" || [ $? = 1 ]
}
