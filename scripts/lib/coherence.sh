# shellcheck shell=bash
# Counts the cache lines that move between the two ends of a shared-memory connection. Lackey, a tool of valgrind,
# records the accesses of apps/l2fwd/examples/coherence.rs, and vireo-vfio-bench simulates the caches of two cores.

bench_coherence() {
    need_cargo
    need_packages valgrind jq
    local workload
    workload=$(coherence_build)
    # Unlike the workload, the simulator may be slow, and the unit tests build most of it in this profile.
    RUSTFLAGS='' cargo build --manifest-path "$REPO/Cargo.toml" --locked -p vireo-vfio-bench \
        --message-format json-render-diagnostics >"$WORK/build.json" || fail "cargo could not build (its message is above)"
    local status=0
    "$(executable vireo-vfio-bench)" coherence "$workload" ${OPT_JSON:+--json "$OPT_JSON"} ${OPT_CHECK:+--check} || status=$?
    case $status in
        0) ;;
        70) exit 1 ;; # EX_SOFTWARE: the check failed
        *) exit 125 ;;
    esac
}

# The feature makes prefetches visible to Lackey. Everything else is the plain release profile.
coherence_build() {
    RUSTFLAGS='' cargo build --manifest-path "$REPO/Cargo.toml" --release --locked -p vireo-l2fwd --example coherence \
        --features vireo-eal/trace-prefetches --message-format json-render-diagnostics >"$WORK/build.json" ||
        fail "cargo could not build the example 'coherence' of vireo-l2fwd (its message is above)"
    executable coherence
}

# Path of a program that cargo just built.
executable() {
    jq -r --arg name "$1" 'select(.target.name == $name).executable | strings' "$WORK/build.json"
}
