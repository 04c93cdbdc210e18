# shellcheck shell=dash
# Forwarding: one body, stamped over modes, NICs and arguments.

# forwards RX TX [RX-DEVARGS [TX-DEVARGS [EAL-ARGUMENTS [L2FWD-ARGUMENTS]]]]: from the first kind of NIC to the second
# and back.
forwards() {
    local rx=$1 tx=$2
    # shellcheck disable=SC2086  # the last two are lists
    start_l2fwd ${5:--l 1} -a "$(bdf "$rx" fwd_rx)${3:+,$3}" -a "$(bdf "$tx" fwd_tx)${4:+,$4}" -- -p 3 -T 0 ${6:--q 2}
    carries "$rx" "$tx"
    stop_l2fwd
    counted 0 "$COUNT" "$COUNT"
    counted 1 "$COUNT" "$COUNT"
}

# each_nic_in_each_mode MODES...
each_nic_in_each_mode() {
    local mode nic
    for mode; do
        for nic in $NICS; do
            test_case "$nic, $mode" forwards_in_mode "$mode" "$nic" "$nic"
        done
        test_case "virtio-net to e1000, $mode" forwards_in_mode "$mode" virtio-net e1000
        test_case "virtio-net to e1000e, $mode" forwards_in_mode "$mode" virtio-net e1000e
        test_case "e1000 to e1000e, $mode" forwards_in_mode "$mode" e1000 e1000e
    done
}

forwards_in_mode() {
    [ "$1" != noiommu-cdev ] || need_noiommu_cdev
    # Of each kind once.
    [ "$2" != "$3" ] || usable "$1" "$(bdf "$2" fwd_rx)"
    forwards "$2" "$3" '' '' "-l 1 --vfio-mode $1"
    said "in mode $1: as asked"
}

# mixed_modes MODE MODE: each port in a mode of its own, in one process.
mixed_modes() {
    local nic
    for nic in $NICS; do
        test_case "$nic, port 0 $1 and port 1 $2" forwards_mixed "$1" "$2" "$nic" "$nic"
    done
    test_case "virtio-net $1 and e1000e $2" forwards_mixed "$1" "$2" virtio-net e1000e
}

forwards_mixed() {
    case $1,$2 in
        *noiommu-cdev*) need_noiommu_cdev ;;
    esac
    forwards "$3" "$4" "vfio-mode=$1" "vfio-mode=$2"
    said "in mode $1: as asked"
    said "in mode $2: as asked"
}

# variants MODE: what else changes the way of a packet.
variants() {
    local name rx tx rx_args tx_args eal app
    while IFS='|' read -r name rx tx rx_args tx_args eal app; do
        test_case "$name, $1" forwards "$rx" "$tx" "$rx_args" "$tx_args" "--vfio-mode $1 $eal" "$app"
    done <<'TABLE'
virtio-net without mergeable buffers|virtio-net|virtio-net|mrg_rxbuf=0|mrg_rxbuf=0|-l 1|
virtio-net, mergeable to not mergeable|virtio-net|virtio-net|mrg_rxbuf=1|mrg_rxbuf=0|-l 1|
--in-memory|e1000e|e1000e|||-l 1 --in-memory|
--huge-dir|e1000|e1000|||-l 1 --huge-dir /dev/hugepages|
-m|e1000e|e1000e|||-l 1 -m 64|
two lcores, virtio-net|virtio-net|virtio-net|||-l 0-1|-q 1
two lcores, e1000|e1000|e1000|||-l 0-1|-q 1
two lcores, e1000e|e1000e|e1000e|||-l 0-1|-q 1
promiscuous, virtio-net|virtio-net|virtio-net|||-l 1|-q 2 -P
promiscuous, e1000e|e1000e|e1000e|||-l 1|-q 2 -P
ports paired by --portmap|virtio-net|e1000e|||-l 1|-q 2 --portmap (1,0)
TABLE
}

# address_filter MODE: frames to somebody else's address pass only with -P.
address_filter() {
    local nic
    for nic in $NICS; do
        test_case "$nic ignores frames to others, $1" strangers "$1" "$nic" 0
        test_case "$nic takes them with -P, $1" strangers "$1" "$nic" 100 -P
    done
}

# strangers MODE NIC EXPECTED [-P]
strangers() {
    local expected=$3
    start_l2fwd -l 1 --vfio-mode "$1" -a "$(bdf "$2" fwd_rx)" -a "$(bdf "$2" fwd_tx)" -- -p 3 -q 2 -T 0 ${4:+"$4"}
    generate "$2" "$2" --dst-mac 52:54:00:00:00:99 --count 100 || [ "$expected" = 0 ]
    came_back 100 "$expected"
    stop_l2fwd
    counted 0 0 "$expected"
}
