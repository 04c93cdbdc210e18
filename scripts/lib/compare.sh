# shellcheck shell=bash
# The main job: one benchmark in two boots, because a device is offered without an IOMMU only where there is none.

lab_compare() {
    local report=()
    compare_boots compare run
    [[ -z $OPT_JSON ]] || report+=(--json "$OPT_JSON")
    [[ -z $OPT_HTML ]] || report+=(--html "$OPT_HTML")
    "$(programs_find vireo-vfio-bench)" report "$OPT_SHARE/iommu.json" "$OPT_SHARE/noiommu.json" "${report[@]}"
}

# The same boots with a clock that counts instructions and jumps over waiting: QEMU's -icount, which only software emulation
# has. Two virtual CPUs would take turns, and each count the other's.
lab_count() {
    local report=()
    [[ -z $OPT_HTML ]] || fail "lab count writes no HTML" "lab count --json FILE"
    OPT_CPUS=1
    OPT_ACCEL=tcg
    OPT_ICOUNT=1
    QEMU_EXTRA+=(-icount 'shift=0,sleep=off')
    compare_boots count count run
    [[ -z $OPT_JSON ]] || report+=(--json "$OPT_JSON")
    "$(programs_find vireo-vfio-bench)" count report "$OPT_SHARE/iommu.json" "$OPT_SHARE/noiommu.json" "${report[@]}"
}

# compare_boots NAME WORD...: vfio-bench WORD... with and without an IOMMU; recordings are in OPT_SHARE.
compare_boots() {
    OPT_TIMEOUT=${OPT_TIMEOUT:-1800}
    guest_prepare "$1"
    shift
    if [[ -z $OPT_SHARE ]]; then
        OPT_SHARE="$WORK/share"
        mkdir "$OPT_SHARE"
    fi
    [[ -z $OPT_NICS_GIVEN ]] || COMMAND+=(--nics "$OPT_NICS")

    OPT_IOMMU=1
    compare_boot iommu container,cdev,compat "$@"
    OPT_IOMMU=
    compare_boot noiommu "$(compare_noiommu_modes)" "$@"
}

compare_noiommu_modes() {
    if version_at_least "$(kernel_release "$GUEST_IMAGE")" 7.3; then
        echo noiommu,noiommu-cdev
    else
        echo noiommu
    fi
}

# compare_boot BOOT MODES WORD...: what the benchmark prints on the way is progress; the only thing on our stdout is the
# table at the end.
compare_boot() {
    local boot=$1 modes=$2 machine="--kernel $OPT_KERNEL --timeout $OPT_TIMEOUT"
    shift 2
    [[ -n $OPT_IOMMU ]] || machine+=" --no-iommu"
    [[ -z $OPT_ICOUNT ]] || machine+=" --cpus 1 --accel tcg --qemu-arg -icount --qemu-arg shift=0,sleep=off"
    say "boot '$boot': $modes"
    guest_boot "$GUEST_IMAGE" pipe vireo-vfio-bench "$@" --json "/share/$boot.json" --modes "$modes" "${COMMAND[@]}" >&2
    ((GUEST_STATUS == 0)) ||
        fail "boot '$boot': $GUEST_ERROR (guest kernel's log: $GUEST_LOG)" \
            "lab run $machine -- vfio-bench $* --json /dev/stdout --modes $modes${COMMAND[*]:+ ${COMMAND[*]}}"
}
