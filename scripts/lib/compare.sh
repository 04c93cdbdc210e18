# shellcheck shell=bash
# Compares the modes. Each benchmark takes two boots, because VFIO offers devices without an IOMMU only on a
# machine that has none.

# Disturbances of the machine, as arguments of the report.
COMPARE_DISTURBANCES=()

# Guest memory in MiB with which the kernel finds an aligned GiB for a page.
COMPARE_GIANT_MEM=4096

lab_compare() {
    local report=()
    compare_choose_references
    compare_prepare compare
    compare_counted
    compare_boots timed run "${COMMAND[@]}"
    [[ -z $OPT_JSON ]] || report+=(--json "$OPT_JSON")
    [[ -z $OPT_HTML ]] || report+=(--html "$OPT_HTML")
    "$(programs_find vireo-vfio-bench)" report "$OPT_SHARE"/timed-{iommu,noiommu}.json \
        --counted "$OPT_SHARE/counted-iommu.json" --counted "$OPT_SHARE/counted-noiommu.json" \
        "${COMPARE_DISTURBANCES[@]}" "${report[@]}"
}

lab_count() {
    local report=()
    [[ -z $OPT_HTML ]] || fail "lab count writes no HTML" "lab compare --html FILE"
    compare_prepare count
    compare_counted "${COMMAND[@]}"
    [[ -z $OPT_JSON ]] || report+=(--json "$OPT_JSON")
    "$(programs_find vireo-vfio-bench)" count report "$OPT_SHARE"/counted-{iommu,noiommu}.json "${report[@]}"
}

compare_prepare() {
    OPT_TIMEOUT=${OPT_TIMEOUT:-3600}
    guest_prepare "$1"
    if [[ -z $OPT_SHARE ]]; then
        OPT_SHARE="$WORK/share"
        mkdir "$OPT_SHARE"
    fi
}

# Compares with testpmd only if Debian's DPDK is already installed.
compare_choose_references() {
    if [[ -z $OPT_REFERENCES ]]; then
        OPT_REFERENCES=bridge
        if testpmd_installed; then
            OPT_REFERENCES+=,testpmd
        else
            say "DPDK's testpmd is left out, because dpdk-testpmd is not installed; to compare with it: apt-get install dpdk-dev"
        fi
    elif [[ $OPT_REFERENCES == *testpmd* ]] && ! testpmd_installed; then
        fail "dpdk-testpmd is not installed" "${SUDO[*]:+${SUDO[*]} }apt-get install dpdk-dev"
    fi
}

compare_counted() {
    # shellcheck disable=SC2034 # read by what compare_boots calls
    local OPT_CPUS OPT_ICOUNT OPT_ACCEL ACCEL=tcg QEMU_EXTRA=("${QEMU_EXTRA[@]}")
    options_icount
    compare_boots counted count run "$@"
}

# compare_boots NAME WORD...: runs vfio-bench WORD... with and without an IOMMU. The recordings are NAME-* in
# OPT_SHARE.
compare_boots() {
    local name=$1
    shift
    [[ -z $OPT_NICS_GIVEN ]] || set -- "$@" --nics "$OPT_NICS"

    OPT_IOMMU=1
    if [[ $name == timed ]]; then
        compare_boot_with_references "$name-iommu" container,cdev,compat "$@"
    else
        compare_boot "$name-iommu" container,cdev,compat "$@"
    fi
    OPT_IOMMU=
    compare_boot "$name-noiommu" "$(compare_noiommu_modes)" "$@"
}

# compare_boot_with_references BOOT MODES WORD...: as compare_boot, with the reference forwarders.
compare_boot_with_references() {
    local ADDED=("${ADDED[@]}") TESTPMD_VERSION='' references=()
    if [[ $OPT_REFERENCES != none ]]; then
        references=(--references "$OPT_REFERENCES")
    fi
    if [[ $OPT_REFERENCES == *testpmd* ]]; then
        testpmd_find
        ADDED+=("${TESTPMD_FILES[@]}")
        # shellcheck disable=SC2034 # read by initramfs_environment
        TESTPMD_VERSION=$(testpmd_version)
        references+=(--plugins "$(IFS=,; echo "${TESTPMD_PLUGINS[*]}")")
    fi
    compare_boot "$@" "${references[@]}"
}

compare_noiommu_modes() {
    if version_at_least "$(kernel_release "$GUEST_IMAGE")" 7.3; then
        echo noiommu,noiommu-cdev
    else
        echo noiommu
    fi
}

# compare_boot BOOT MODES WORD...: the benchmark's own output is progress and goes to stderr. The final table
# is the only output on stdout. If the guest itself ends early, its kernel or QEMU has crashed: a second guest goes on
# with what the first one has recorded.
compare_boot() {
    local boot=$1 modes=$2 machine="--kernel $OPT_KERNEL --timeout $OPT_TIMEOUT" since=$SECONDS before
    local record=(--json "/share/$boot.json" --modes "$modes")
    shift 2
    [[ -n $OPT_IOMMU ]] || machine+=" --no-iommu"
    [[ -z $OPT_ICOUNT ]] || machine+=" --icount"
    # Only with an IOMMU: without one, all memory must be within reach of a NIC with 32 address bits.
    if [[ -n $OPT_ICOUNT && -n $OPT_IOMMU ]]; then
        # shellcheck disable=SC2034 # read by what guest_boot calls
        local KERNEL_EXTRA=("${KERNEL_EXTRA[@]}" hugepagesz=1G hugepages=1) \
            OPT_MEM=$((OPT_MEM > COMPARE_GIANT_MEM ? OPT_MEM : COMPARE_GIANT_MEM))
        machine+=" --mem $OPT_MEM --kernel-arg hugepagesz=1G --kernel-arg hugepages=1"
    fi
    say "boot '$boot': $modes"
    before=$(compare_ticks_of_others)
    guest_boot "$GUEST_IMAGE" pipe vireo-vfio-bench "$@" "${record[@]}" >&2
    if ((GUEST_STATUS == 125)); then
        say "boot '$boot': $GUEST_ERROR (guest kernel's log: $GUEST_LOG); booting once more"
        COMPARE_DISTURBANCES+=(--disturbance "boot '$boot' was repeated from where it stopped: $GUEST_ERROR")
        [[ -n $OPT_ICOUNT || ! -s $OPT_SHARE/$boot.json ]] || record+=(--resume)
        guest_boot "$GUEST_IMAGE" pipe vireo-vfio-bench "$@" "${record[@]}" >&2
    fi
    ((GUEST_STATUS == 0)) ||
        fail "boot '$boot': $GUEST_ERROR (guest kernel's log: $GUEST_LOG)" \
            "lab run $machine -- vfio-bench $* --json /dev/stdout --modes $modes"
    [[ -n $OPT_ICOUNT ]] || compare_disturbance "$boot" $((SECONDS - since)) $(($(compare_ticks_of_others) - before))
}

# Prints the clock ticks that all CPUs spent on programs other than this script and its children.
compare_ticks_of_others() {
    local all own
    read -r -a all </proc/stat
    read -r -a own </proc/$$/stat
    # user, nice, system, irq, softirq and steal, minus user and system of this script's children.
    echo $((all[1] + all[2] + all[3] + all[6] + all[7] + all[8] - own[15] - own[16]))
}

# compare_disturbance BOOT SECONDS TICKS: records the CPU time of other programs if it was 0.3 CPUs or more.
compare_disturbance() {
    local tenths=$((10 * $3 / ($(getconf CLK_TCK) * ($2 + 1))))
    ((tenths >= 3)) || return 0
    COMPARE_DISTURBANCES+=(--disturbance "boot '$1': other programs on the host used $((tenths / 10)).$((tenths % 10)) of its $(nproc) CPUs")
}
