# shellcheck shell=bash
# The main job: one benchmark in two boots, because a device is offered without an IOMMU only where there is none.

lab_compare() {
    local report=()
    OPT_TIMEOUT=${OPT_TIMEOUT:-1800}
    guest_prepare compare
    if [[ -z $OPT_SHARE ]]; then
        OPT_SHARE="$WORK/share"
        mkdir "$OPT_SHARE"
    fi
    [[ -z $OPT_NICS_GIVEN ]] || COMMAND+=(--nics "$OPT_NICS")

    OPT_IOMMU=1
    compare_boot iommu container,cdev,compat
    OPT_IOMMU=
    compare_boot noiommu "$(compare_noiommu_modes)"

    [[ -z $OPT_JSON ]] || report+=(--json "$OPT_JSON")
    [[ -z $OPT_HTML ]] || report+=(--html "$OPT_HTML")
    "$(programs_find vireo-vfio-bench)" report "$OPT_SHARE/iommu.json" "$OPT_SHARE/noiommu.json" "${report[@]}"
}

compare_noiommu_modes() {
    if version_at_least "$(kernel_release "$GUEST_IMAGE")" 7.3; then
        echo noiommu,noiommu-cdev
    else
        echo noiommu
    fi
}

# What the benchmark prints on the way is progress; the only thing on our stdout is the table at the end.
compare_boot() {
    local machine="--kernel $OPT_KERNEL --timeout $OPT_TIMEOUT"
    [[ -n $OPT_IOMMU ]] || machine+=" --no-iommu"
    say "boot '$1': $2"
    guest_boot "$GUEST_IMAGE" pipe vireo-vfio-bench run --json "/share/$1.json" --modes "$2" "${COMMAND[@]}" >&2
    ((GUEST_STATUS == 0)) ||
        fail "boot '$1': $GUEST_ERROR (guest kernel's log: $GUEST_LOG)" \
            "lab run $machine -- vfio-bench run --json /dev/stdout --modes $2${COMMAND[*]:+ ${COMMAND[*]}}"
}
