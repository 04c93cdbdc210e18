# shellcheck shell=bash
# The guest's NICs. Each is alone in its slot and therefore in its IOMMU group. Fixed slots make the addresses
# known:
#
#   virtio-net 00:04.0-00:07.0    e1000 00:08.0-00:0b.0    e1000e 00:0c.0-00:0f.0    igb 01:00.0-04:00.0
#   in the order gen_tx, fwd_rx, fwd_tx, gen_rx; one wire joins the first two, another the last two
#
# An igb is behind a root port, 00:10.0 to 00:13.0, because its virtual functions need addresses for which the
# root bus has no room. The last byte of a MAC address (52:54:00:00:00:XX) is the slot, for an igb the slot of
# its root port.

NIC_ARGS=()

nic_first_slot() {
    case $1 in
        virtio-net) echo 4 ;;
        e1000) echo 8 ;;
        e1000e) echo 12 ;;
        igb) echo 16 ;;
        *) fail "unknown NIC kind '$1' in --nics" "--nics virtio-net,e1000,e1000e,igb" ;;
    esac
}

# nic_add KIND SLOT NETDEV: an empty romfile saves the seconds that booting an option ROM takes.
nic_add() {
    local kind=$1 slot netdev=$3 device place
    slot=$(printf '%02x' "$2")
    case $kind in
        virtio-net)
            device="virtio-net-pci,disable-legacy=on,iommu_platform=$OPT_IOMMU_PLATFORM"
            # When instructions are counted, those of a guest that waits for another thread of QEMU would
            # depend on the host's speed.
            [[ -z $OPT_ICOUNT ]] || device+=",ioeventfd=off"
            ;;
        *) device=$kind ;;
    esac
    place="addr=0x$slot"
    if [[ $kind == igb ]]; then
        NIC_ARGS+=(-device "pcie-root-port,id=port$slot,slot=$2,addr=0x$slot")
        place="bus=port$slot"
    fi
    NIC_ARGS+=(-netdev "$netdev,id=n$slot" -device "$device,netdev=n$slot,$place,mac=52:54:00:00:00:$slot,romfile=")
}

topology_build() {
    NIC_ARGS=()
    local kind kinds first position interface interfaces
    case $OPT_NICS in
        none) ;;
        tap:*,*)
            IFS=, read -ra interfaces <<<"${OPT_NICS#tap:}"
            nic_add e1000e "$(nic_first_slot e1000e)" "tap,ifname=${interfaces[0]},script=no,downscript=no"
            position=$(nic_first_slot virtio-net)
            for interface in "${interfaces[@]:1}"; do
                nic_add virtio-net $((position++)) "tap,ifname=$interface,script=no,downscript=no"
            done
            ;;
        *)
            IFS=, read -ra kinds <<<"$OPT_NICS"
            for kind in "${kinds[@]}"; do
                first=$(nic_first_slot "$kind")
                for position in 0 1 2 3; do
                    # A hub of two ports is a wire. Its number is derived from the slot, so no other kind of
                    # NIC has it.
                    nic_add "$kind" $((first + position)) "hubport,hubid=$(((first + position) / 2))"
                done
            done
            ;;
    esac
}
