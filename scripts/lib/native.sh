# shellcheck shell=bash
# Compares Vireo and DPDK's testpmd in turn on shared-memory virtio rings, at one end and at both.

bench_native() {
    need_cargo
    command -v dpdk-testpmd >/dev/null || need_packages dpdk-dev
    need_packages valgrind jq
    local workload
    workload=$(coherence_build)
    RUSTFLAGS='' cargo build --manifest-path "$REPO/Cargo.toml" --release --locked -p vireo-l2fwd -p vireo-vfio-bench \
        --message-format json-render-diagnostics >"$WORK/build.json" || fail "cargo could not build (its message is above)"
    VIREO_LAB_DPDK=$(dpkg-query -W -f='${Version}' dpdk-dev 2>/dev/null || echo unknown)
    VIREO_LAB_DATE=$(date -u +%FT%TZ)
    VIREO_LAB_COMMIT=$(git -C "$REPO" describe --always --dirty 2>/dev/null || echo unknown)
    export VIREO_LAB_DPDK VIREO_LAB_DATE VIREO_LAB_COMMIT
    "$(executable vireo-vfio-bench)" native --pairs "$OPT_PAIRS" --coherence "$workload" ${OPT_JSON:+--json "$OPT_JSON"}
}
