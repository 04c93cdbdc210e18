# shellcheck shell=bash
# Soak. An epoch is the life of one pair of processes and their successors: at its end, when all have ended in order,
# every frame that was sent is one that came back or one that some counter names. A killed process takes its counts with
# it, so that is compared in the epochs without a SIGKILL, every other one.

# Seconds for which nothing may pass before it counts as hung.
SOAK_PATIENCE=60
SOAK_STEPS_PER_EPOCH=6
# Kibibytes that the private memory of a forwarder may grow in its life: noise of the allocator.
SOAK_GROWTH=1024

# In every epoch; soak_native adds those that kill.
SOAK_FAULTS=(none stop-generator stop-forwarder restart-forwarder)

SOAK_STATE=
GENERATOR=
FORWARDER=

soak_native() {
    # Without and with SIGKILL, each with both ends of each kind; the first is compared, so that any soak compares one.
    local epochs=("iface path" "path iface kill-generator kill-forwarder"
        "path iface" "iface path kill-generator kill-forwarder")
    need_cargo
    need_packages jq
    soak_build
    say "seed $OPT_SEED; again: scripts/soak native --seed $OPT_SEED --seconds $OPT_SECONDS --packets $OPT_PACKETS"
    SOAK_STATE=$OPT_SEED
    SECONDS=0
    STEPS=0 EPOCHS=0 COMPARED=0 COMPARED_LOST=0 RECEIVED=0 NAMED=0 RESTARTS=0 SHORTAGES=0 KILLS=0 GROWTH=0 FDS=0
    GENERATORS=0 FORWARDERS=0 FORWARDERS_TOLD=0
    : >"$WORK/told"
    while soak_goes_on; do
        # shellcheck disable=SC2086  # words
        soak_epoch ${epochs[EPOCHS % ${#epochs[@]}]}
    done
    soak_table
    ((COMPARED > 0)) || soak_wrong "in no epoch were the frames that were lost compared with those that counters name"
}

# The noise of other programs does not matter here: frames are counted, not timed.
soak_guest() {
    local mode mapped=() physical=() nics=${OPT_NICS//,/ } status=0
    for mode in ${OPT_MODES//,/ }; do
        if [[ $mode == noiommu* ]]; then physical+=("$mode"); else mapped+=("$mode"); fi
    done
    SOAK_EACH=$((OPT_SECONDS / ($(wc -w <<<"$nics") * (${#mapped[@]} + ${#physical[@]})) + 1))
    say "seed $OPT_SEED; again: scripts/soak guest --seed $OPT_SEED --seconds $OPT_SECONDS --packets $OPT_PACKETS" \
        "--nics $OPT_NICS --modes $OPT_MODES --kernel $OPT_KERNEL"
    # A device is offered without an IOMMU only where there is none.
    ((${#mapped[@]} == 0)) || soak_boot '' "$nics" "${mapped[@]}" || status=$?
    ((${#physical[@]} == 0)) || soak_boot --no-iommu "$nics" "${physical[@]}" || status=$?
    # A case that failed takes from no other its figures.
    [[ -z $OPT_JSON ]] || sed -n 's/^# {/{/p' "$WORK/guest" >"$OPT_JSON"
    return "$status"
}

# soak_boot OPTION NICS MODE...
soak_boot() {
    local option=$1
    shift
    # shellcheck disable=SC2086  # or no option
    "$SCRIPTS/lab" run --monitor --timeout 0 --kernel "$OPT_KERNEL" $option ${OPT_YES:+--yes} -- \
        guest-soak "$SOAK_EACH" "$OPT_PACKETS" "$OPT_SEED" "$@" | tee -a "$WORK/guest"
}

soak_build() {
    local build
    cargo build --quiet --release --locked --manifest-path "$REPO/Cargo.toml" -p vireo-l2fwd -p vireo-pktgen ||
        fail "cargo could not build l2fwd and pktgen (its message is above)"
    build="$(cargo metadata --no-deps --format-version 1 --manifest-path "$REPO/Cargo.toml" | jq -r .target_directory)/release"
    L2FWD="$build/vireo-l2fwd"
    PKTGEN="$build/vireo-pktgen"
}

soak_goes_on() {
    ((SECONDS < OPT_SECONDS && (OPT_PACKETS == 0 || RECEIVED < OPT_PACKETS)))
}

# soak_random N: sets RANDOM_NUMBER to 0..N-1. The low bits of this generator have short periods.
soak_random() {
    SOAK_STATE=$(((SOAK_STATE * 1103515245 + 12345) & 0x7fffffff))
    RANDOM_NUMBER=$(((SOAK_STATE >> 12) % $1))
}

# soak_sleep MILLISECONDS
soak_sleep() { sleep "$(($1 / 1000)).$(printf %03d $(($1 % 1000)))"; }

# soak_wrong TEXT: a check failed.
soak_wrong() {
    echo "not ok: $1 (seed $OPT_SEED, step $STEPS)"
    for file in "$WORK"/forwarder.err "$WORK"/generator.err; do
        [[ ! -s $file ]] || tail -n20 "$file" | sed "s/^/#   ${file##*/}: /"
    done
    exit 1
}

# soak_epoch FORWARDER-END GENERATOR-END [FAULT...]
soak_epoch() {
    local step fault faults=("${SOAK_FAULTS[@]}" "${@:3}")
    FORWARDER_END=$1 GENERATOR_END=$2
    EPOCHS=$((EPOCHS + 1))
    EPOCH_LOST=0 EPOCH_NAMED=0 EPOCH_KILLS=0
    rm -f "$WORK"/[01]
    if [[ $FORWARDER_END == iface ]]; then
        soak_start_forwarder
        soak_start_generator
    else
        soak_start_generator
        soak_start_forwarder
    fi
    for ((step = 0; step < SOAK_STEPS_PER_EPOCH; step++)); do
        soak_goes_on || break
        STEPS=$((STEPS + 1))
        soak_passes
        soak_measure
        soak_random ${#faults[@]}
        fault=${faults[RANDOM_NUMBER]}
        soak_random 3000
        soak_sleep "$RANDOM_NUMBER"
        say "step $STEPS: $fault, forwarder at its ${FORWARDER_END/path/virtio-user}; $RECEIVED packets so far"
        "soak_${fault//-/_}"
    done
    soak_passes
    soak_end_generator
    soak_end_forwarder
    NAMED=$((NAMED + EPOCH_NAMED))
    if ((EPOCH_KILLS > 0)); then
        say "epoch $EPOCHS: not compared, it had $EPOCH_KILLS SIGKILL"
        return
    fi
    ((EPOCH_LOST == EPOCH_NAMED)) || soak_wrong "$EPOCH_LOST frames did not come back, and counters name $EPOCH_NAMED"
    COMPARED=$((COMPARED + 1))
    COMPARED_LOST=$((COMPARED_LOST + EPOCH_LOST))
    say "epoch $EPOCHS: $EPOCH_LOST frames did not come back, and counters name each"
}

soak_none() { :; }
soak_stop_generator() { soak_pause "$GENERATOR"; }
soak_stop_forwarder() { soak_pause "$FORWARDER"; }

soak_pause() {
    kill -STOP "$1"
    soak_random 1500
    soak_sleep "$RANDOM_NUMBER"
    kill -CONT "$1"
}

soak_kill_generator() {
    soak_kill "$GENERATOR"
    soak_start_generator
}

# A virtio-user port without a control thread, as the generator's, has to end with its peer.
soak_replace_forwarder() {
    "$@"
    [[ $GENERATOR_END == iface ]] || soak_end_generator
    soak_start_forwarder
    [[ $GENERATOR_END == iface ]] || soak_start_generator
}

soak_restart_forwarder() { soak_replace_forwarder soak_end_forwarder; }
soak_kill_forwarder() { soak_replace_forwarder soak_kill "$FORWARDER"; }

soak_kill() {
    kill -KILL "$1"
    { wait "$1" || true; } 2>/dev/null
    EPOCH_KILLS=$((EPOCH_KILLS + 1))
    KILLS=$((KILLS + 1))
}

# soak_devices iface|path: the ports of a process.
soak_devices() {
    local port driver=net_virtio_user more=,queue_size=1024
    [[ $1 == path ]] || driver=net_vhost more=
    DEVICES=(--no-pci --no-huge)
    for port in 0 1; do
        DEVICES+=(--vdev "$driver$port,$1=$WORK/$port$more")
    done
}

# A killed process leaves its sockets' files, so those say nothing. 00010000 is a socket that listens.
soak_await_sockets() {
    local port
    for port in 0 1; do
        await "$SOAK_PATIENCE" grep -q " 00010000 .* $WORK/$port\$" /proc/net/unix || soak_wrong "the sockets were not made"
    done
}

# Every other forwarder with rings of its own has hardly more buffers than they take.
soak_start_forwarder() {
    local buffers=()
    soak_random 2
    [[ $FORWARDER_END == iface || $RANDOM_NUMBER == 0 ]] || buffers=(--total-num-mbufs 2200)
    [[ $FORWARDER_END == iface ]] || soak_await_sockets
    soak_devices "$FORWARDER_END"
    "$L2FWD" -l 1 --file-prefix "soak-fwd-$$" "${DEVICES[@]}" -- -p 3 -q 2 -T 0.2 --json "${buffers[@]}" \
        >"$WORK/forwarder" 2>"$WORK/forwarder.err" </dev/null &
    FORWARDER=$!
    FORWARDERS=$((FORWARDERS + 1))
    ANON='' OPEN=''
    [[ $FORWARDER_END == path ]] || soak_await_sockets
}

soak_start_generator() {
    local sizes=(60 60-1514 1514 60-128)
    soak_random ${#sizes[@]}
    [[ $GENERATOR_END == iface ]] || soak_await_sockets
    soak_devices "$GENERATOR_END"
    "$PKTGEN" -l 0 --file-prefix "soak-gen-$$" "${DEVICES[@]}" -- --duration 1e9 --dst-mac 02:00:00:00:00:99 \
        --expect-dst 02:00:00:00:00:01 --size "${sizes[RANDOM_NUMBER]}" --window 900 --json \
        >"$WORK/generator" 2>"$WORK/generator.err" </dev/null &
    GENERATOR=$!
    GENERATORS=$((GENERATORS + 1))
}

# What the forwarder has received, by its last line of statistics.
soak_received() {
    tail -n2 "$WORK/forwarder" | sed -n 's/.*"statistics".*"port":0,"received":\([0-9]*\).*/\1/p' | tail -n1
}

# Waits until packets pass.
soak_passes() {
    local before now left=$((SOAK_PATIENCE * 10))
    before=$(soak_received)
    while :; do
        sleep 0.1
        now=$(soak_received)
        ((${now:-0} <= ${before:-0})) || return 0
        ((left-- > 0)) || soak_wrong "nothing passes"
        kill -0 "$FORWARDER" 2>/dev/null || soak_wrong "l2fwd ended by itself"
        kill -0 "$GENERATOR" 2>/dev/null || soak_wrong "pktgen ended by itself"
    done
}

# Private memory and descriptors of the forwarder, against those at its first step.
soak_measure() {
    local anon open
    anon=$(awk '$1 == "RssAnon:" {print $2}' "/proc/$FORWARDER/status")
    open=$(find "/proc/$FORWARDER/fd" -mindepth 1 | wc -l)
    if [[ -n $ANON ]]; then
        ((open <= OPEN)) || soak_wrong "l2fwd has $open descriptors open, and had $OPEN"
        ((anon - ANON <= SOAK_GROWTH)) || soak_wrong "l2fwd has $anon KiB of private memory, and had $ANON"
        ((anon - ANON <= GROWTH)) || GROWTH=$((anon - ANON))
    else
        ANON=$anon OPEN=$open
    fi
    FDS=$open
}

# soak_reap PID: sets SOAK_STATUS.
soak_reap() {
    SOAK_STATUS=0
    wait "$1" || SOAK_STATUS=$?
}

soak_end_generator() {
    local sent received bad named
    kill -INT "$GENERATOR"
    soak_reap "$GENERATOR"
    ((SOAK_STATUS <= 1)) || soak_wrong "pktgen exited with $SOAK_STATUS"
    GENERATOR=
    read -r sent received bad named < <(jq -r '[
        .sent, .received, .duplicates + .reordered + .wrong_address + .corrupt + .strays,
        .counters[0].tx_unfinished + .counters[1].rx_unread + .counters[1].rx_errors] | @tsv' "$WORK/generator")
    ((bad == 0)) || soak_wrong "pktgen saw frames that it should not: $(<"$WORK/generator")"
    cat "$WORK/generator" >>"$WORK/told"
    RECEIVED=$((RECEIVED + received))
    EPOCH_LOST=$((EPOCH_LOST + sent - received))
    EPOCH_NAMED=$((EPOCH_NAMED + named))
}

# Its own checks make it exit with another code: buffers that did not come back, packets that do not add up.
soak_end_forwarder() {
    local named restarts shortages
    kill -INT "$FORWARDER"
    soak_reap "$FORWARDER"
    ((SOAK_STATUS == 0)) || soak_wrong "l2fwd exited with $SOAK_STATUS"
    FORWARDER=
    FORWARDERS_TOLD=$((FORWARDERS_TOLD + 1))
    read -r named restarts shortages < <(jq -rs '
        (map(select(.event == "counters")) | map({(.port | tostring): .counters}) | add) as $of |
        (map(select(.event == "balance" and .balance.from == 0)) | .[0].balance) as $balance |
        [$of["0"].rx_unread + $of["0"].rx_errors + $balance.dropped + $balance.tx_errors + $of["1"].tx_unfinished,
            $of["0"].restarts + $of["1"].restarts, $of["0"].rx_no_buffer + $of["1"].rx_no_buffer] | @tsv' "$WORK/forwarder")
    EPOCH_NAMED=$((EPOCH_NAMED + named))
    RESTARTS=$((RESTARTS + restarts))
    SHORTAGES=$((SHORTAGES + shortages))
}

# Sums are of the lives that told their figures; those that were killed did not.
soak_table() {
    local figures
    figures=$(jq -n --arg seed "$OPT_SEED" --argjson seconds "$SECONDS" --argjson steps "$STEPS" --argjson kills "$KILLS" \
        --argjson epochs "$EPOCHS" --argjson compared "$COMPARED" --argjson compared_lost "$COMPARED_LOST" \
        --argjson generators "$GENERATORS" --slurpfile told "$WORK/told" \
        --argjson forwarders "$FORWARDERS" --argjson forwarders_told "$FORWARDERS_TOLD" --argjson named "$NAMED" \
        --argjson restarts "$RESTARTS" --argjson shortages "$SHORTAGES" --argjson growth "$GROWTH" --argjson fds "$FDS" '
        def sum(name): $told | map(.[name]) | add;
        {
            seed: ($seed | tonumber), seconds: $seconds, faults: $steps, sigkills: $kills,
            epochs: $epochs, epochs_compared: $compared, lost_and_named_in_those_compared: $compared_lost,
            lives_of_pktgen: $generators, lives_of_pktgen_that_told_their_figures: ($told | length),
            sent: sum("sent"), received: sum("received"), lost: sum("lost"), corrupt: sum("corrupt"),
            duplicates: sum("duplicates"), reordered: sum("reordered"), wrong_address: sum("wrong_address"),
            strays: sum("strays"),
            lives_of_l2fwd: $forwarders, lives_of_l2fwd_that_told_their_figures: $forwarders_told, lost_by_name: $named,
            port_restarts: $restarts, polls_without_a_buffer: $shortages, most_growth_of_rss_anon_kib: $growth,
            descriptors: $fds}')
    jq -r 'to_entries[] | "\(.key | gsub("_"; " ")): \(.value)"' <<<"$figures"
    [[ -z $OPT_JSON ]] || printf '%s\n' "$figures" >"$OPT_JSON"
}

# Also what an interrupted soak does on its way out.
soak_end() {
    local pid
    for pid in $GENERATOR $FORWARDER; do
        kill -KILL "$pid" 2>/dev/null || true
    done
}
