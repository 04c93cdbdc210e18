# shellcheck shell=dash
# An IOMMU that does not remap interrupts: a NIC could forge any.

boot_cases() {
    isolation container vfio_iommu_type1
    isolation cdev iommufd
    isolation compat iommufd
}

isolation() {
    local parameter="/sys/module/$2/parameters/allow_unsafe_interrupts"
    GENERATOR_MODE=$1
    test_case "refused: no isolated MSI, $1" \
        unusable_as root "$1" "$(bdf e1000e fwd_rx)" 69 "echo 1 > $parameter"
    test_case "no isolated MSI and the user's consent, $1" with_unsafe_interrupts "$parameter"
}

with_unsafe_interrupts() {
    at_end "echo 0 >$1"
    echo 1 >"$1"
    forwards_in_mode "$GENERATOR_MODE" e1000e e1000e
}
