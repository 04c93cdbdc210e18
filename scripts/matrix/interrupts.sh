# shellcheck shell=dash
# Interrupts of every kind, by software and, for the e1000 family, by the device; and iommufd without any device.

interrupts_of_each_nic() {
    local nic
    for nic in $NICS; do
        test_case "interrupts of $nic, $1" interrupts "$1" "$nic"
    done
}

interrupts() {
    local kind kinds
    [ "$1" != noiommu-cdev ] || need_noiommu_cdev
    case $2 in
        virtio-net) kinds='Intx Msix' ;;
        e1000) kinds='Intx' ;;
        e1000e) kinds='Intx Msi Msix' ;;
    esac
    timeout "$PATIENCE" vireo-interrupts "$(bdf "$2" fwd_rx)" "$1" >"$WORK/interrupts.out"
    for kind in $kinds; do
        grep -q "^$kind: by software" "$WORK/interrupts.out" || die "no $kind by software"
        # QEMU 7.2 does not survive an MSI-X interrupt of an e1000e that is switched off soon after.
        [ "$2" = virtio-net ] || [ "$kind" = Msix ] || grep -q "^$kind: by the device" "$WORK/interrupts.out" || die "no $kind by the device"
    done
    [ "$(cut -d: -f1 "$WORK/interrupts.out" | uniq | wc -l)" = "$(echo "$kinds" | wc -w)" ] || die "not just $kinds"
}

iommufd_alone() {
    timeout "$PATIENCE" vireo-ioas >"$WORK/ioas.out"
    grep -q 'the same pages, read-only, at' "$WORK/ioas.out" || die "no copy of the mapping"
}
