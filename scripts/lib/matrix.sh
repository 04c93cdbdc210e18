# shellcheck shell=bash
# The guest matrix: /bin/guest-matrix prints TAP in each boot.

lab_test() {
    local kernel kernels=(default edge) failed=0
    options_take_no_command test
    OPT_TIMEOUT=${OPT_TIMEOUT:-1800}
    [[ -z $OPT_KERNEL_GIVEN ]] || kernels=("$OPT_KERNEL")
    guest_prepare
    for kernel in "${kernels[@]}"; do
        guest_use_kernel "$kernel"
        OPT_IOMMU=1
        matrix_boot iommu || failed=1
        OPT_IOMMU=
        matrix_boot noiommu || failed=1
    done
    return "$failed"
}

matrix_boot() {
    echo "# kernel $(kernel_release "$GUEST_IMAGE"), boot '$1'"
    guest_boot "$GUEST_IMAGE" pipe guest-matrix "$1"
    ((GUEST_STATUS == 0)) && return
    echo "Bail out! $GUEST_ERROR (guest kernel's log: $GUEST_LOG)"
    return 1
}
