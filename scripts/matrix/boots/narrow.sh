# shellcheck shell=dash
# An IOMMU of 39 bits: what virtual addresses would ask for lies outside it.

GENERATOR_MODE=auto

boot_cases() {
    local mode
    for mode in container cdev compat; do
        test_case "e1000e, $mode" forwards_in_mode "$mode" e1000e e1000e
        test_case "virtio-net, $mode" forwards_in_mode "$mode" virtio-net virtio-net
    done
}
