# shellcheck shell=bash
# Counts instructions per packet. One run of apps/l2fwd/examples/insn.rs under callgrind covers all cases: the
# program prints a line for each case, and callgrind writes a profile at the end of each. Instructions of the
# devices in that process are not collected.

INSN_COMMITTED="$SCRIPTS/insn.json"

# DPDK 26.11-rc0 (38f72e500b), counted in the same way: its unmodified drivers and l2fwd, 60-byte packets, MAC rewrite,
# ring 256; burst 0 is an empty poll. Its best virtio path is vector RX, which needs a device without mergeable buffers.
# Its l2fwd keeps packets until it has 32, or until 100 us have passed. Burst 1+0 is therefore the sum of 1 and 0, which is less
# than it would be if each packet were sent alone.
INSN_DPDK='{
    "e1000 82540EM": {"0": 114, "1": 364, "4": 266, "8": 250, "16": 242, "32": 237.5},
    "e1000 82574L": {"0": 114, "1": 364, "4": 266, "8": 250, "16": 242, "32": 237.5},
    "virtio-net split mergeable": {"0": 147, "1": 717, "4": 521, "8": 489, "16": 472, "32": 463.0},
    "virtio-net split non-mergeable": {"32": 444.4},
    "virtio-net split mergeable in-order": {"32": 381.7}
}'
INSN_DPDK_BEST_VIRTIO=327.8

bench_insn() {
    need_cargo
    need_packages valgrind jq
    local program figures="$WORK/insn.json"
    program=$(insn_build)
    insn_count "$program" >"$figures"
    insn_table "$figures"
    [[ -z $OPT_JSON ]] || cp "$figures" "$OPT_JSON"
    [[ -z $OPT_CHECK ]] || insn_check "$figures"
    if [[ -n $OPT_UPDATE ]]; then
        cp "$figures" "$INSN_COMMITTED"
        say "wrote $INSN_COMMITTED"
    fi
}

# Uses the plain release profile, so that a figure depends on the code and not on flags from the environment.
insn_build() {
    RUSTFLAGS='' cargo build --manifest-path "$REPO/Cargo.toml" --release --locked -p vireo-l2fwd --example insn \
        --message-format json-render-diagnostics >"$WORK/build.json" ||
        fail "cargo could not build the example 'insn' of vireo-l2fwd (its message is above)"
    executable insn
}

# Callgrind toggles collection at the entry and the return of each named function. device_half is called
# inside counted_loop, so it switches collection off.
insn_count() {
    local case profile="$WORK/profile"
    valgrind --tool=callgrind --callgrind-out-file="$profile" --toggle-collect='*counted_loop*' \
        --toggle-collect='*device_half*' --dump-after='*whole_case*' "$1" >"$WORK/cases" 2>"$WORK/valgrind.log" ||
        fail "the count failed: $(tail -n1 "$WORK/valgrind.log")" "valgrind --tool=callgrind $1"
    for ((case = 1; case <= $(wc -l <"$WORK/cases"); case++)); do
        awk '$1 == "totals:" {print $2}' "$profile.$case"
    done >"$WORK/totals"
    jq -n --slurpfile cases "$WORK/cases" --slurpfile totals "$WORK/totals" --arg rustc "$(rustc --version)" \
        --argjson dpdk "$INSN_DPDK" --argjson best "$INSN_DPDK_BEST_VIRTIO" '
        def rounded: (. * 100 | round) / 100;
        def of_dpdk: $dpdk["\(.driver) \(.device)"] as $figures |
            if .burst == "1+0" and $figures["1"] then $figures["1"] + $figures["0"] else $figures["\(.burst)"] end;
        [$cases, $totals] | transpose | map(.[0] + {total: .[1]}) |
        (map(select(.addresses == "iommu"))) as $iommu | (map(select(.addresses == "physical"))) as $physical |
        {
            rustc: $rustc, profile: "release, x86-64", packet_bytes: 60, ring: 256,
            rows: $iommu | map({
                driver, device, path, burst, insn_per_packet: (.total / .count | rounded),
                dpdk: of_dpdk,
                doorbells_per_packet: (if .burst > 0 then (.rx_doorbells + .tx_doorbells) / .count else null end)
            }),
            dpdk_best_virtio: $best,
            mode_difference: [
                def case: [.driver, .device, .path, .burst];
                $physical[] | . as $p | $iommu[] | select(case == ($p | case)) |
                {driver, device, path, burst, instructions: ($p.total - .total)}
            ]
        }'
}

insn_table() {
    jq -r '
        "instructions per forwarded packet; burst 0: per empty poll (\(.rustc), \(.profile))\n",
        (["driver", "device", "path", "burst", "vireo", "dpdk", "ratio", "doorbells"] | @tsv),
        (.rows[] | [
            .driver, .device, .path, .burst, .insn_per_packet, .dpdk // "-",
            (if .dpdk then "\(.insn_per_packet / .dpdk * 100 | round) %" else "-" end),
            (.doorbells_per_packet // "-" | if type == "number" then . * 1000 | round / 1000 else . end)
        ] | @tsv)' "$1" | awk -F'\t' '
        NF < 2 {print; next}
        {printf "%-11s %-27s %-7s %5s %9s %8s %7s %10s\n", $1, $2, $3, $4, $5, $6, $7, $8}'
    jq -r '
        .dpdk_best_virtio as $best |
        "\nvirtio-net compared with DPDK'\''s best path (vector RX, burst 32, \($best)): " +
            ([.rows[] | select(.driver == "virtio-net" and .burst == 32) |
                "\(.device), \(.path) \(.insn_per_packet / $best * 100 | round) %"] | join(", ")),
        "doorbell writes per packet at one packet per poll, e1000: " +
            "\([.rows[] | select(.driver == "e1000" and .burst == 1).doorbells_per_packet] | max | . * 1000 | round / 1000)" +
            " (DPDK: 1 + 1/32)",
        "difference between VFIO modes (IOVAs or physical addresses): " +
            "\([.mode_difference[].instructions | fabs] | add) instructions in \(.mode_difference | length) cases"
        ' "$1"
}

# Skips the check under another compiler, whose different code says nothing about a change in Vireo.
insn_check() {
    local rustc
    [[ -f $INSN_COMMITTED ]] || fail "there is no $INSN_COMMITTED to check against" "scripts/bench insn --update"
    rustc=$(jq -r .rustc "$INSN_COMMITTED")
    if [[ $rustc != "$(jq -r .rustc "$1")" ]]; then
        say "check SKIPPED: the committed figures are from $rustc, but this is $(rustc --version)"
        return 0
    fi
    jq -rn --slurpfile committed "$INSN_COMMITTED" --slurpfile now "$1" '
        def name: "\(.driver), \(.device), \(.path), burst \(.burst)";
        ($committed[0].rows | map({(name): .insn_per_packet}) | add) as $old |
        ($now[0].rows | map({(name): .insn_per_packet}) | add) as $new |
        ($old + $new | keys_unsorted[] | {name: ., old: $old[.], new: $new[.]} |
            if .old == null or .new == null then "failed: \(.name): not in both"
            elif .new > .old * 1.01 then "failed: \(.name): \(.old) became \(.new)"
            elif .new < .old * 0.99 then "fell: \(.name): \(.old) became \(.new)"
            else empty end),
        ($now[0].mode_difference[] | select(.instructions != 0) |
            "failed: \(name): \(.instructions) instructions between VFIO modes")' >"$WORK/verdict"
    while IFS= read -r line; do say "$line"; done <"$WORK/verdict"
    if grep -q '^fell' "$WORK/verdict"; then
        say "figures fell by more than 1 %; commit them: scripts/bench insn --update"
    fi
    if grep -q '^failed' "$WORK/verdict"; then
        say "check failed; if the cost is intended: scripts/bench insn --update"
        exit 1
    fi
    say "check passed: no figure rose by more than 1 %"
}
