# shellcheck shell=bash
# Reports of real recordings whose outcome is known: of one mode under two names, and of a mode that was
# slowed down.

CLAIMS_MODES=container,cdev
CLAIMS_SLOWER=0.2
CLAIMS_BUSY=()

bench_claims() {
    need_packages jq stress-ng
    need_cargo
    cargo build --manifest-path "$REPO/Cargo.toml" --profile lab --locked -p vireo-vfio-bench ||
        fail "cargo could not build (its message is above)"
    mkdir "$WORK/share"
    trap 'claims_host 1; rm -rf "$WORK"' EXIT
    claims_reports null "$OPT_REPORTS" --null
    claims_reports slow $(((OPT_REPORTS + 1) / 2)) --null --slow cdev --slower "$CLAIMS_SLOWER"
    claims_say
}

# claims_reports KIND COUNT OPTION...: makes COUNT reports, every second one on a busy host.
claims_reports() {
    local kind=$1 count=$2 number
    shift 2
    for ((number = 1; number <= count; number++)); do
        claims_host $((number % 2))
        claims_report "$kind-$number" "$@"
    done
    claims_host 1
}

# claims_host IDLE: 1 stops the load that keeps the CPUs busy, 0 starts it.
claims_host() {
    if ((${#CLAIMS_BUSY[@]})); then
        kill "${CLAIMS_BUSY[@]}" 2>/dev/null || true
        wait "${CLAIMS_BUSY[@]}" 2>/dev/null || true
        CLAIMS_BUSY=()
    fi
    if (($1 == 0)); then
        stress-ng --cpu 0 --quiet &
        CLAIMS_BUSY=($!)
    fi
}

# claims_report NAME OPTION...
claims_report() {
    local name=$1 json="$WORK/share/$1.json"
    shift
    "$SCRIPTS/lab" run --timeout 900 --share "$WORK/share" -- vfio-bench run --nics e1000e --modes "$CLAIMS_MODES" \
        --seconds 0.1 --frame-sizes 60 --trial 0.05 --map-mib 32 --limit 40 --json "/share/$name.json" "$@" >"$WORK/lab.log" 2>&1 ||
        fail "the recording failed: $(tail -n1 "$WORK/lab.log")"
    "$REPO/target/lab/vireo-vfio-bench" report "$json" --json "$WORK/$name.json" >/dev/null ||
        fail "report failed (its message is above)"
    say "$name: $(jq -r '
        [.timed.pairs[] | select(.verdict == "differs") | "\(.subject) \(.metric) \(.ratio * 100 | round / 100)"] |
        if . == [] then "no difference" else join(", ") end' "$WORK/$name.json")"
}

claims_say() {
    local kind figures
    figures=$(for kind in null slow; do
        jq -s --arg kind "$kind" '
            def claims: [.timed.pairs[] | select(.verdict == "differs")];
            # Doorbells say nothing about speed: a slower forwarder finds fuller rings and needs fewer of them.
            def claims_of_speed: claims | map(select(.metric != "doorbells"));
            def slower: if .metric == "forward_pps" or .metric == "throughput" then .ratio < 1 else .ratio > 1 end;
            {
                kind: $kind,
                reports: length,
                comparisons: .[0].timed.family.comparisons,
                with_claims: map(select(claims != [])) | length,
                found_slower: map(select(any(claims_of_speed[]; slower))) | length,
                found_faster: map(select(any(claims_of_speed[]; slower | not))) | length
            }' "$WORK/$kind"-*.json
    done | jq -s .)
    [[ -z $OPT_JSON ]] || echo "$figures" >"$OPT_JSON"
    jq -r '.[] | if .kind == "null"
        then "\(.reports) reports of one mode under two names: \(.with_claims) claim a difference"
        else "\(.reports) reports of a mode that was slowed by 20 %: \(.found_slower) find it slower, \(.found_faster) claim that it is faster in some way"
        end' <<<"$figures"
}
