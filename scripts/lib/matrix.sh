# shellcheck shell=bash
# The guest matrix: /bin/guest-matrix prints TAP in each boot.

# A boot's name, which is its file in scripts/matrix/boots, and the options that make its machine.
matrix_boots() {
    cat <<'TABLE'
iommu --kernel-arg hugepagesz=1G
noiommu --no-iommu
narrow --nics virtio-net,e1000e --qemu-arg -global --qemu-arg intel-iommu.aw-bits=39
bypass --nics virtio-net,e1000e --no-iommu-platform
unsafe-msi --nics e1000e --qemu-arg -global --qemu-arg intel-iommu.intremap=off
shared-group --nics e1000e --qemu-arg -device --qemu-arg e1000,addr=0x10.0,multifunction=on,romfile= --qemu-arg -device --qemu-arg e1000,addr=0x10.1,romfile=
TABLE
}

# COMMAND names the boots, if not all.
lab_test() {
    local kernel kernels=(default edge) failed=0 name options wanted=" ${COMMAND[*]} "
    OPT_TIMEOUT=${OPT_TIMEOUT:-${OPT_LONG:+14400}}
    OPT_TIMEOUT=${OPT_TIMEOUT:-1800}
    OPT_MONITOR=1
    [[ -z $OPT_KERNEL_GIVEN ]] || kernels=("$OPT_KERNEL")
    matrix_know "${COMMAND[@]}"
    guest_prepare
    for kernel in "${kernels[@]}"; do
        guest_use_kernel "$kernel"
        while read -r name options; do
            [[ $wanted == *" $name "* || -z ${COMMAND[*]} ]] || continue
            # shellcheck disable=SC2086  # words of a command line
            matrix_boot "$name" $options || failed=1
        done < <(matrix_boots)
    done
    return "$failed"
}

matrix_know() {
    local boot names
    names=$(matrix_boots | cut -d' ' -f1)
    for boot; do
        grep -qx -- "$boot" <<<"$names" || fail "lab test knows no boot '$boot'" "lab test ${names//$'\n'/ }"
    done
}

# matrix_boot NAME OPTIONS...: the options end with it.
matrix_boot() {
    local name=$1 OPT_IOMMU=$OPT_IOMMU OPT_NICS=$OPT_NICS OPT_IOMMU_PLATFORM=$OPT_IOMMU_PLATFORM
    local QEMU_EXTRA=("${QEMU_EXTRA[@]}") KERNEL_EXTRA=("${KERNEL_EXTRA[@]}")
    shift
    options_parse "$@"
    echo "# kernel $(kernel_release "$GUEST_IMAGE"), boot '$name'"
    guest_boot "$GUEST_IMAGE" pipe guest-matrix "$name" ${OPT_LONG:+long}
    ((GUEST_STATUS == 0)) && return
    echo "Bail out! $GUEST_ERROR (guest kernel's log: $GUEST_LOG)"
    return 1
}
