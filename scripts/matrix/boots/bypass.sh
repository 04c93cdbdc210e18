# shellcheck shell=dash
# virtio-net that goes round the IOMMU, as QEMU makes it unless told otherwise.

GENERATOR_MODE=auto

boot_cases() {
    local mode
    for mode in container cdev compat; do
        test_case "refused: virtio-net without ACCESS_PLATFORM, $mode" \
            unusable "$mode" "$(bdf virtio-net fwd_rx)" 69 "iommu_platform=on"
    done
}
