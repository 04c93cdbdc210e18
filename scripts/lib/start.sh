# shellcheck shell=bash
# Measures the time from process start to the first forwarded packet, for l2fwd and DPDK's testpmd in turn. It
# takes three boots of the lab's guest, because VFIO offers devices without an IOMMU only on a machine that
# has none, and offers them as cdevs only from Linux 7.3 on; and two in which the guest's clock counts
# instructions. The start of the EAL alone needs no guest.

bench_start() {
    need_cargo
    need_packages dpdk-dev libdpdk-dev libbsd-dev libnuma-dev
    command -v pkg-config >/dev/null || need_packages pkg-config
    RUSTFLAGS='' cargo build --manifest-path "$REPO/Cargo.toml" --release --locked -p vireo-eal -p vireo-vfio-bench \
        --bins --examples --message-format json-render-diagnostics >"$WORK/build.json" ||
        fail "cargo could not build (its message is above)"
    mkdir "$WORK/share"
    start_eal
    start_boot counted container,cdev,compat --icount
    start_boot counted-noiommu noiommu --no-iommu --icount
    start_boot iommu container,cdev,compat
    start_boot noiommu noiommu --no-iommu
    start_boot noiommu-cdev noiommu-cdev --no-iommu --kernel edge
    "$(start_built vireo-vfio-bench)" start report \
        "$WORK"/share/{counted,counted-noiommu,iommu,noiommu,noiommu-cdev,eal}.json \
        ${OPT_JSON:+--json "$OPT_JSON"}
}

start_built() { grep -o "\"executable\":\"[^\"]*/$1\"" "$WORK/build.json" | cut -d'"' -f4; }

start_eal() {
    local libraries
    read -ra libraries <<<"$(pkg-config --libs libdpdk)"
    start_compile shared "${libraries[@]}"
    # A static DPDK loads no plug-ins. The EAL needs only these of its libraries.
    start_compile static -l:librte_eal.a -l:librte_kvargs.a -l:librte_telemetry.a -lnuma -lbsd
    say "timing the EAL's start without devices"
    VIREO_LAB_DPDK=$(start_version) "$(start_built vireo-vfio-bench)" start eal --json "$WORK/share/eal.json" \
        --vireo "$(start_built vireo-eal-start)" \
        --dpdk "shared as Debian has it=$WORK/shared" --dpdk "static, no plug-ins=$WORK/static"
}

start_version() { pkg-config --modversion libdpdk; }

# start_compile OUTPUT LIBRARY...
start_compile() {
    local output=$1 flags
    shift
    read -ra flags <<<"$(pkg-config --cflags libdpdk)"
    cc -O2 "${flags[@]}" "$SCRIPTS/eal-start.c" -o "$WORK/$output" "$@" ||
        fail "cc could not build $SCRIPTS/eal-start.c against DPDK (its message is above)"
}

# start_boot NAME MODES [LAB OPTION...]
start_boot() {
    local name=$1 modes=$2 file add=() counted=()
    shift 2
    [[ " $* " != *' --icount '* ]] || counted=(--counted)
    testpmd_find
    for file in "${TESTPMD_FILES[@]}"; do
        add+=(--add "$file")
    done
    say "boot '$name': $modes"
    "$SCRIPTS/lab" run ${OPT_YES:+--yes} --cpus 3 --nics virtio-net,e1000e --timeout 1800 --share "$WORK/share" \
        "${add[@]}" "$@" -- env "VIREO_LAB_DPDK=$(start_version)" \
        vireo-vfio-bench start run --json "/share/$name.json" --modes "$modes" "${counted[@]}" \
        --rounds "$OPT_ROUNDS" --plugins "$(IFS=,; echo "${TESTPMD_PLUGINS[*]}")" >&2 ||
        fail "boot '$name' failed (see above)"
}
