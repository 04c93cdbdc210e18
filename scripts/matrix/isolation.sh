# shellcheck shell=dash
# What a NIC reaches: its own memory and no other, with an IOMMU; everything, without.

# Seconds for a proof: an 82540EM needs one for each frame.
PROOF_PATIENCE=120

# stops_dma MODE NIC: a descriptor that points where it should not is stopped and reported, and the NIC and the process
# go on.
stops_dma() {
    dma_proof "$1" "$2"
    proven 3 'memory: nothing was written'
    proven 1 'memory: WRITTEN: nothing separates ports that share an address space'
    proven 3 "kernel: .*DMA Write.*$(bdf "$2" fwd_rx | cut -d: -f2-)\]"
    proven 4 'NIC after a reset: works'
}

# lets_dma_pass MODE NIC
lets_dma_pass() {
    [ "$1" != noiommu-cdev ] || need_noiommu_cdev
    dma_proof "$1" "$2"
    proven 3 'memory: WRITTEN: without an IOMMU nothing stops a NIC'
    proven 3 'NIC after a reset: works'
}

dma_proof() {
    timeout "$PROOF_PATIENCE" vfio-bench dma-proof --modes "$1" --nic "$(bdf "$2" fwd_rx)" --neighbour "$(bdf "$2" fwd_tx)" \
        --json "$WORK/proof.json" >"$WORK/proof.out" 2>"$WORK/proof.err" || die "vfio-bench exited with $?"
}

# proven NUMBER PATTERN
proven() {
    [ "$(grep -c "^  $2" "$WORK/proof.out")" = "$1" ] || die "not $1 times: $2"
}

# forwards_isolated MODE RX TX CALLS: each port has an address space of its own. The maps are one of the packet buffers
# and one or two of rings for each port: virtio's descriptors are apart, because the device only reads them.
forwards_isolated() {
    forwards "$2" "$3" '' '' "-l 1 --vfio-mode $1 --isolate-ports"
    said "Isolated: 2 ports in 2 address spaces, $4 map calls"
}

# pinned MODE STARTS|REFUSED: two isolated ports of an ordinary user who may lock 24 MiB; the packet buffers take 18. In
# cdev the second address space copies the mapping of the first, and pins nothing. Each container pins for itself.
pinned() {
    local nodes='/dev/iommu /dev/vfio/[0-9]* /dev/vfio/devices/*' arguments
    at_end "chown root $nodes"
    # shellcheck disable=SC2086  # patterns
    chown nobody $nodes
    # shellcheck disable=SC2016  # for the script
    printf '#!/bin/sh\nexec su nobody -s /bin/sh -c "exec $*"\n' >"$WORK/limited"
    chmod +x "$WORK/limited"
    arguments="-l 1 --vfio-mode $1 --isolate-ports -a $(bdf e1000e fwd_rx) -a $(bdf e1000e fwd_tx) -- -p 3 -q 2 -T 0"
    # shellcheck disable=SC3045  # busybox's ulimit has -l
    ulimit -l 24576
    # shellcheck disable=SC2086  # words of a command line
    case $2 in
        STARTS)
            UNDER="$WORK/limited"
            start_l2fwd $arguments
            stop_l2fwd
            UNDER=
            ;;
        REFUSED)
            LIMIT='' refused_as nobody 71 'run: ulimit -l' --file-prefix nobody $arguments
            [ "$(sed -n 's/.*run: ulimit -l \([0-9]*\),.*/\1/p' "$WORK/refused.err")" -gt 24576 ] || die "the cure is no higher limit"
            ;;
    esac
}

dma_isolation() {
    local mode nic
    for mode; do
        test_case "virtio-net, --isolate-ports, $mode" forwards_isolated "$mode" virtio-net virtio-net 6
        test_case "e1000 to e1000e, --isolate-ports, $mode" forwards_isolated "$mode" e1000 e1000e 4
        for nic in e1000 e1000e; do
            test_case "DMA of $nic where it should not be is stopped, $mode" stops_dma "$mode" "$nic"
        done
    done
    test_case "isolated ports pin packet buffers once, cdev" pinned cdev STARTS
    test_case "isolated ports pin packet buffers once each, container" pinned container REFUSED
    test_case "isolated ports pin packet buffers once each, compat" pinned compat REFUSED
}

no_dma_isolation() {
    local mode nic
    for mode; do
        for nic in e1000 e1000e; do
            test_case "DMA of $nic arrives everywhere, $mode" lets_dma_pass "$mode" "$nic"
        done
    done
}
