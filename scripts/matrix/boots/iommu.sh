# shellcheck shell=dash
# An IOMMU that translates for every NIC.

GENERATOR_MODE=auto

boot_cases() {
    local mode nic
    each_nic_in_each_mode container cdev compat
    mixed_modes container cdev
    mixed_modes container compat
    mixed_modes cdev compat
    variants cdev
    test_case "--no-huge, container" forwards virtio-net e1000 '' '' '-l 1 --no-huge --vfio-mode container'
    test_case "--no-huge, cdev" forwards e1000e e1000e '' '' '-l 1 --no-huge --vfio-mode cdev'
    test_case "group is container" forwards e1000 e1000 '' '' '-l 1 --vfio-mode group'
    address_filter cdev
    test_case "auto is cdev" auto_is cdev
    test_case "auto without /dev/iommu is container" auto_without_iommufd

    test_case "cdev opens no group" opens cdev '/dev/iommu /dev/vfio/devices/vfio[0-9]*' '/dev/vfio/vfio /dev/vfio/[0-9].*'
    test_case "container opens no iommufd and no cdev" opens container '/dev/vfio/vfio /dev/vfio/[0-9]*' '/dev/iommu /dev/vfio/devices.*'
    test_case "compat opens groups and iommufd only" opens compat '/dev/iommu /dev/vfio/[0-9]*' '/dev/vfio/vfio /dev/vfio/devices.*'

    for mode in container cdev compat; do
        for nic in $NICS; do
            test_case "descriptors of $nic passed to another process, $mode" hands_over "$nic" "$mode"
        done
        interrupts_of_each_nic "$mode"
        ends_on_signals "$mode"
        survives_kill "$mode"
        recovers "$mode"
        flaps "$mode"
    done
    dma_isolation container cdev compat
    test_case "iommufd alone" iommufd_alone
    privilege_cases

    bad_arguments
    iommu_refusals
    for mode in noiommu noiommu-cdev; do
        test_case "refused: $mode with an IOMMU" unusable "$mode" "$(bdf e1000e fwd_rx)" 69 'use --vfio-mode cdev or container'
    done
    test_case "doctor: all NICs, container" all_usable container
    test_case "doctor: a NIC of the kernel" none_usable
    test_case "refused: bound to a kernel driver" bound_to_the_kernel cdev
    test_case "refused: vfio-pci is not loaded" not_loaded
    test_case "refused: no hugepages, too few hugepages" no_hugepages cdev
    huge_dirs
    test_case "refused: no /dev/iommu, cdev" without_node /dev/iommu cdev 'modprobe iommufd'
    test_case "refused: no /dev/iommu, compat" without_node /dev/iommu compat 'modprobe iommufd'
    test_case "refused: no /dev/vfio/vfio, container" without_node /dev/vfio/vfio container 'modprobe vfio-pci'
    test_case "refused: no /dev/vfio/devices, cdev" without_node /dev/vfio/devices cdev 'udevadm trigger --subsystem-match=vfio-dev'
    test_case "refused: little memlock, cdev" little_memlock cdev 'all processes of this user together' /dev/iommu /dev/vfio/devices/vfio*
    test_case "refused: little memlock, container" little_memlock container 'this process, which has' /dev/vfio/[0-9]*
    test_case "refused: little memlock, compat" little_memlock compat 'all processes of this user together' /dev/iommu /dev/vfio/[0-9]*
    test_case "refused: no mapping left, container" entry_limit
    test_case "refused: no permission for iommufd, cdev" no_permission cdev /dev/iommu 'KERNEL=="iommu"'
    test_case "refused: no permission for a device, cdev" no_permission_for_device
    test_case "refused: no permission for a group, container" no_permission container "$(group_node e1000e fwd_rx)" 'SUBSYSTEM=="vfio"'
    test_case "refused: in use by somebody else, cdev" hidden_user cdev /dev/iommu /dev/vfio/devices/vfio*
    test_case "refused: in use by somebody else, container" hidden_user container /dev/vfio/[0-9]*
    test_case "refused: a core outside the affinity" outside_the_affinity
    test_case "a core that is offline, and a single core" offline_core
    test_case "output that nobody takes" output_fails
    for mode in container cdev compat; do
        test_case "refused: in use, $mode" in_use "$mode" "$mode"
        test_case "refused: same --file-prefix, $mode" same_prefix "$mode"
    done
    test_case "refused: in use by container, cdev" in_use container cdev
    test_case "refused: in use by cdev, container" in_use cdev container
    test_case "refused: in use by compat, cdev" in_use compat cdev
    for mode in container cdev ${LONG:+compat}; do
        failing_calls "$mode" e1000e
    done
}

no_permission_for_device() {
    at_end chmod 600 /dev/iommu
    chmod 666 /dev/iommu
    no_permission cdev "$(cdev_node e1000e fwd_rx)" 'SUBSYSTEM=="vfio-dev"'
}

iommu_refusals() {
    refusals <<'TABLE'
69|use --vfio-mode cdev or container|--vfio-mode noiommu FORWARDERS -- -p 3
69|use --vfio-mode cdev or container|--vfio-mode noiommu-cdev FORWARDERS -- -p 3
64|leave --iova-mode out|--iova-mode pa --vfio-mode cdev FORWARDERS -- -p 3
TABLE
}

auto_is() {
    forwards e1000e e1000e
    said "in mode $1: auto"
}

auto_without_iommufd() {
    at_end mv /dev/iommu.away /dev/iommu
    mv /dev/iommu /dev/iommu.away
    auto_is container
    said "there is no /dev/iommu"
}
