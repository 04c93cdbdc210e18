# shellcheck shell=dash
# What the guest has: NICs in the slots of scripts/lib/topology.sh, drivers, hugepages, device nodes.

NICS='virtio-net e1000 e1000e'
HUGEPAGES=/sys/kernel/mm/hugepages/hugepages-2048kB

# All that a program could leave changed behind it.
machine_state() {
    echo /sys/bus/pci/drivers/*/0000:* /dev/iommu /dev/vfio/* /dev/vfio/devices/* /dev/hugepages/* /var/run/vireo/*
    cat $HUGEPAGES/nr_hugepages $HUGEPAGES/free_hugepages
}

# slot KIND POSITION: the last byte of the NIC's MAC address, and its device number.
slot() {
    local first position
    case $1 in
        virtio-net) first=4 ;;
        e1000) first=8 ;;
        e1000e) first=12 ;;
    esac
    case $2 in
        gen_tx) position=0 ;;
        fwd_rx) position=1 ;;
        fwd_tx) position=2 ;;
        gen_rx) position=3 ;;
    esac
    printf %02x $((first + position))
}

bdf() { echo "0000:00:$(slot "$1" "$2").0"; }

mac() { echo "52:54:00:00:00:$(slot "$1" "$2")"; }

# group_node KIND POSITION, cdev_node KIND POSITION: the nodes of a NIC.
group_node() { echo "/dev/vfio/$(basename "$(readlink "/sys/bus/pci/devices/$(bdf "$1" "$2")/iommu_group")")"; }

cdev_node() { echo "/dev/vfio/devices/$(ls "/sys/bus/pci/devices/$(bdf "$1" "$2")/vfio-dev")"; }

# bind BDF DRIVER
bind() {
    local device="/sys/bus/pci/devices/$1"
    echo "$2" >"$device/driver_override"
    [ ! -e "$device/driver" ] || echo "$1" >"$device/driver/unbind"
    echo "$1" >/sys/bus/pci/drivers_probe
    [ -e "/sys/bus/pci/drivers/$2/$1" ] || die "$2 did not take $1"
}

set_hugepages() {
    echo "$1" >$HUGEPAGES/nr_hugepages
    [ "$(cat "$HUGEPAGES/nr_hugepages")" = "$1" ] || die "the kernel has no room for $1 hugepages"
}

has_noiommu_cdev() {
    set -- /dev/vfio/devices/noiommu-*
    [ -e "$1" ]
}

need_noiommu_cdev() { has_noiommu_cdev || skip "this kernel has no cdev without an IOMMU (7.3 has)"; }
