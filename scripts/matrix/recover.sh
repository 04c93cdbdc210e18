# shellcheck shell=dash
# A NIC that stops working, or that the kernel wants back, while l2fwd forwards.

# recovers MODE
recovers() {
    local nic
    for nic in $NICS; do
        test_case "$nic that may do no DMA is restarted, $1" works_without_bus_master "$1" "$nic"
        test_case "$nic is given back to the kernel under traffic, $1" gives_back "$1" "$nic"
    done
}

# What it complains of is what the case is about.
expect_complaint() {
    grep -q "$1" "$WORK/l2fwd.err" || die "l2fwd did not complain of '$1'"
    : >"$WORK/l2fwd.err"
}

# Lines of l2fwd's standard error that await_log has gone over.
LOGGED=0

# await_log TEXT: waits for a further line with TEXT on l2fwd's standard error.
await_log() {
    local line left=$((PATIENCE * 10))
    until line=$(tail -n +$((LOGGED + 1)) "$WORK/l2fwd.err" | grep -nm1 "$1"); do
        left=$((left - 1))
        [ $left -gt 0 ] || die "l2fwd did not come to say '$1'"
        sleep 0.1
    done
    LOGGED=$((LOGGED + ${line%%:*}))
}

# A cleared bus-master bit is a NIC that completes nothing any more, as one that hangs.
works_without_bus_master() {
    start_under_traffic "$1" "$2"
    printf '\003\000' | dd of="/sys/bus/pci/devices/$(bdf "$2" fwd_tx)/config" bs=1 seek=4 conv=notrunc 2>/dev/null
    await_log "port 1: .* it is restarted"
    await_log "port 1 is up again"
    end_traffic
    carries "$2" "$2"
    mv "$WORK/l2fwd.err" "$WORK/complaints.err"
    stop_l2fwd
    grep -q "^Port 1 counted: .*restarts 1" "$WORK/l2fwd.out" || die "port 1 did not count its restart"
}

# The write to `remove` returns when the NIC is free; a scan of the bus finds it again.
gives_back() {
    local nic
    nic=$(bdf "$2" fwd_tx)
    start_under_traffic "$1" "$2"
    at_end bind "$nic" vfio-pci
    at_end "echo 1 >/sys/bus/pci/rescan"
    timeout "$PATIENCE" sh -c "echo 1 >/sys/bus/pci/devices/$nic/remove" || die "the kernel did not get $nic back"
    [ ! -e "/sys/bus/pci/devices/$nic" ] || die "$nic is still there"
    expect_complaint "port 1: the kernel wants $nic back; it is closed"
    end_traffic
    stop_l2fwd
}
