# shellcheck shell=bash
# Compares Vireo and DPDK's testpmd in turn on shared-memory virtio rings, at one end and at both.

bench_native() {
    need_cargo
    [[ -n $OPT_TESTPMD ]] || command -v dpdk-testpmd >/dev/null || need_packages dpdk-dev
    need_packages valgrind jq
    local workload testpmd=${OPT_TESTPMD:-dpdk-testpmd}
    workload=$(coherence_build)
    RUSTFLAGS='' cargo build --manifest-path "$REPO/Cargo.toml" --release --locked -p vireo-l2fwd -p vireo-vfio-bench \
        --message-format json-render-diagnostics >"$WORK/build.json" || fail "cargo could not build (its message is above)"
    VIREO_LAB_DPDK=$(native_version)
    VIREO_LAB_DATE=$(date -u +%FT%TZ)
    VIREO_LAB_COMMIT=$(git -C "$REPO" describe --always --dirty 2>/dev/null || echo unknown)
    export VIREO_LAB_DPDK VIREO_LAB_DATE VIREO_LAB_COMMIT
    "$(executable vireo-vfio-bench)" native --pairs "$OPT_PAIRS" --testpmd "$testpmd" --coherence "$workload" \
        ${OPT_JSON:+--json "$OPT_JSON"}
}

# Prints the version of testpmd: what a given one says, whose exit code says nothing, or Debian's.
native_version() {
    local version
    if [[ -n $OPT_TESTPMD ]]; then
        version=$("$OPT_TESTPMD" --version 2>&1 || true)
        version=$(sed -n "s/.*RTE Version: 'DPDK \(.*\)'.*/\1/p" <<<"$version")
    else
        version=$(dpkg-query -W -f='${Version}' dpdk-dev 2>/dev/null || true)
    fi
    echo "${version:-unknown}"
}
