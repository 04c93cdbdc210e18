# shellcheck shell=dash
# No IOMMU, and VFIO told to hand devices over all the same.

GENERATOR_MODE=noiommu

boot_cases() {
    local mode
    each_nic_in_each_mode noiommu noiommu-cdev
    mixed_modes noiommu noiommu-cdev
    variants noiommu
    address_filter noiommu
    test_case "noiommu opens no iommufd and no cdev" opens noiommu '/dev/vfio/vfio /dev/vfio/noiommu-[0-9]*' '/dev/iommu /dev/vfio/devices.*'
    for mode in noiommu noiommu-cdev; do
        interrupts_of_each_nic "$mode"
        survives_kill "$mode"
    done
    ends_on_signals noiommu
    no_dma_isolation noiommu noiommu-cdev
    test_case "iommufd alone" iommufd_alone
    noiommu_privilege_cases

    bad_arguments
    noiommu_refusals
    for mode in container cdev compat; do
        test_case "refused: $mode without an IOMMU" unusable "$mode" "$(bdf e1000e fwd_rx)" 69 '--vfio-mode noiommu'
    done
    test_case "doctor: all NICs, noiommu" all_usable noiommu
    test_case "doctor: a NIC of the kernel" none_usable
    test_case "refused: noiommu-cdev on a kernel without it" needs_newer_kernel
    test_case "refused: bound to a kernel driver" bound_to_the_kernel noiommu
    test_case "refused: no-IOMMU mode is switched off" noiommu_switched_off
    test_case "refused: no CAP_SYS_RAWIO, noiommu" no_raw_io noiommu /dev/vfio/noiommu-[0-9]*
    test_case "refused: no CAP_SYS_RAWIO, noiommu-cdev" no_raw_io noiommu-cdev /dev/iommu /dev/vfio/devices/noiommu-*
    test_case "refused: no hugepages, too few hugepages" no_hugepages noiommu
    test_case "the memory outlives the NIC" outlived_by_memory
    test_case "the memory outlives the NIC, --in-memory" outlived_by_memory --in-memory
    test_case "the memory outlives the NIC, --huge-dir" outlived_by_memory --huge-dir /dev/hugepages
    test_case "output that nobody takes" output_fails
    test_case "refused: in use, noiommu" in_use noiommu noiommu
    [ -z "$LONG" ] || failing_calls noiommu e1000e
}

noiommu_refusals() {
    refusals <<'TABLE'
69|auto never goes without|FORWARDERS -- -p 3
69|--vfio-mode noiommu|--vfio-mode cdev FORWARDERS -- -p 3
69|--vfio-mode noiommu|--vfio-mode container FORWARDERS -- -p 3
69|--vfio-mode noiommu|--vfio-mode compat FORWARDERS -- -p 3
64|leave --iova-mode out|--iova-mode va --vfio-mode noiommu FORWARDERS -- -p 3
64|leave --isolate-ports out|--isolate-ports --vfio-mode noiommu FORWARDERS -- -p 3
64|leave --no-huge out|--no-huge --vfio-mode noiommu FORWARDERS -- -p 3
TABLE
}

needs_newer_kernel() {
    ! has_noiommu_cdev || skip "this kernel has it"
    unusable noiommu-cdev "$(bdf e1000e fwd_rx)" 69 "7.3"
}
