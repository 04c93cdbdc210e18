# shellcheck shell=dash
# Two functions of one slot and so of one IOMMU group: a group is for user space as a whole, or not at all.

GENERATOR_MODE=auto
FIRST=0000:00:10.0
SECOND=0000:00:10.1

boot_cases() {
    local mode
    for mode in container cdev compat; do
        test_case "both ports of a group, $mode" both_ports "$mode"
        test_case "refused: a group that is not viable, $mode" not_viable "$mode"
    done
    test_case "refused: the other port of the group is in use, container" other_port_in_use container
    test_case "refused: the ports of a group in cdev and container" mixed_group cdev container
    test_case "refused: the ports of a group in container and compat" mixed_group container compat
}

both_ports() {
    usable "$1" $FIRST
    start_l2fwd -l 1 --vfio-mode "$1" -a $FIRST -a $SECOND -- -p 3 -q 2 -T 0
    stop_l2fwd
}

not_viable() {
    at_end bind $SECOND vfio-pci
    bind $SECOND e1000
    unusable_as root "$1" $FIRST 69 "bound to kernel drivers are $SECOND (e1000); run for each: vireo-devbind --bind vfio-pci $SECOND"
    bind $SECOND vfio-pci
    starts_again
}

other_port_in_use() {
    start_l2fwd -l 1 --vfio-mode "$1" -a $FIRST -- -p 1 -T 0
    unusable_as root "$1" $SECOND 75 "in use by pid $L2FWD (l2fwd)"
    stop_l2fwd
}

# mixed_group MODE MODE: whichever port is the second one is refused.
mixed_group() {
    refused_as root 64 'is open here already, in another way; give all its devices the same vfio-mode' \
        -l 1 -a $FIRST,vfio-mode="$1" -a $SECOND,vfio-mode="$2" -- -p 3
}
