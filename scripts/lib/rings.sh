# shellcheck shell=bash
# Programs on shared-memory virtio rings, on this machine itself: no VFIO, NIC, hugepages or root.

RINGS_CASES=0
RINGS_FAILED=0
RINGS_FORWARDER=
RINGS_GENERATOR=
# Seconds for which a program may be silent before it counts as hung.
RINGS_PATIENCE=30
RINGS_COUNT=200000

# rings_tests: TAP.
rings_tests() {
    rings_build || return
    rings_case "pktgen on virtio-user, through l2fwd on vhost" rings_circle l2fwd iface path
    rings_case "pktgen on vhost, through l2fwd on virtio-user" rings_circle l2fwd path iface
    rings_case "a machine that is paused under traffic goes on without a storm of statistics" rings_paused
    if command -v dpdk-testpmd >/dev/null; then
        rings_case "pktgen on virtio-user, through DPDK's testpmd on vhost" rings_circle testpmd iface path
        rings_case "pktgen on vhost, through DPDK's testpmd on virtio-user" rings_circle testpmd path iface
        rings_case "two pairs of queues: l2fwd on vhost, testpmd on virtio-user" rings_pairs iface path
        rings_case "two pairs of queues: l2fwd on virtio-user, testpmd on vhost" rings_pairs path iface
    else
        rings_skip "pktgen through DPDK's testpmd" "dpdk-testpmd is not installed (Debian's dpdk-dev)"
    fi
    echo "1..$RINGS_CASES"
    return $((RINGS_FAILED > 0))
}

# rings_build: sets L2FWD and PKTGEN.
rings_build() {
    local build
    cargo build --quiet --release --locked -p vireo-l2fwd -p vireo-pktgen || return
    build="$(cargo metadata --no-deps --format-version 1 | grep -o '"target_directory":"[^"]*"' | cut -d'"' -f4)/release"
    L2FWD="$build/vireo-l2fwd"
    PKTGEN="$build/vireo-pktgen"
}

# rings_case DESCRIPTION COMMAND...
rings_case() {
    local name=$1 status=0
    shift
    RINGS_CASES=$((RINGS_CASES + 1))
    RINGS_DIR=$(mktemp -d "${TMPDIR:-/tmp}/vireo-rings.XXXXXX")
    (
        trap rings_end EXIT
        "$@"
    ) >"$RINGS_DIR/log" 2>&1 </dev/null || status=$?
    if ((status == 0)); then
        echo "ok $RINGS_CASES - $name"
        [[ ! -f $RINGS_DIR/note ]] || sed 's/^/# /' "$RINGS_DIR/note"
    else
        RINGS_FAILED=$((RINGS_FAILED + 1))
        echo "not ok $RINGS_CASES - $name"
        tail -qn 30 "$RINGS_DIR"/{log,pktgen,forwarder,testpmd} 2>/dev/null | sed 's/^/#   /'
    fi
    rm -rf "$RINGS_DIR"
}

rings_skip() {
    RINGS_CASES=$((RINGS_CASES + 1))
    echo "ok $RINGS_CASES - $1 # SKIP $2"
}

rings_end() {
    local pid
    for pid in $RINGS_FORWARDER $RINGS_GENERATOR; do
        kill -KILL "$pid" 2>/dev/null || true
    done
}

# rings_circle l2fwd|testpmd FORWARDER-END GENERATOR-END: the ends are iface (vhost, which listens) and path
# (virtio-user, which connects). The generator fails unless each frame comes back once and in order.
rings_circle() {
    local status=0
    if [[ $2 == iface ]]; then
        "rings_$1" "$2"
        rings_await_sockets || return
        rings_pktgen "$1" "$3"
    else
        rings_pktgen "$1" "$3"
        rings_await_sockets || return
        "rings_$1" "$2"
    fi
    wait "$RINGS_GENERATOR" || status=$?
    cat "$RINGS_DIR/pktgen"
    ((status == 0)) || { echo "pktgen exited with $status" && return 1; }
    kill -INT "$RINGS_FORWARDER"
    wait "$RINGS_FORWARDER" || status=$?
    # testpmd writes to its peer's socket on the way out, and ends by SIGPIPE where that is gone.
    ((status == 0)) || [[ $1 == testpmd ]] || { echo "$1 exited with $status" && return 1; }
    [[ ! -e $RINGS_DIR/0 && ! -e $RINGS_DIR/1 ]] || { echo "a socket was left behind" && return 1; }
}

# rings_devices iface|path: two ports at the case's sockets; DPDK's words, which are Vireo's.
rings_devices() {
    local port driver=net_virtio_user
    [[ $1 == path ]] || driver=net_vhost
    DEVICES=(--no-pci --no-huge)
    for port in 0 1; do
        DEVICES+=(--vdev "$driver$port,$1=$RINGS_DIR/$port")
    done
}

# For a program that is stopped, time jumps as for one whose machine is suspended. Who caught up with it would print a
# table for each of the 50 periods that it missed. The pause is shorter than pktgen waits for a frame.
rings_paused() {
    local before
    rings_devices iface
    "$L2FWD" -l 1 --file-prefix "rings-fwd-$$" "${DEVICES[@]}" -- -p 3 -q 2 -T 0.02 >"$RINGS_DIR/forwarder" 2>&1 &
    RINGS_FORWARDER=$!
    rings_await_sockets || return
    rings_devices path
    "$PKTGEN" -l 0 --file-prefix "rings-gen-$$" "${DEVICES[@]}" -- --duration "$RINGS_PATIENCE" \
        --dst-mac 02:00:00:00:00:99 >"$RINGS_DIR/pktgen" 2>&1 &
    RINGS_GENERATOR=$!
    rings_await 'forwarded frames' grep -q 'received [0-9]\{5\}' "$RINGS_DIR/forwarder" || return
    kill -STOP "$RINGS_FORWARDER"
    sleep 1
    before=$(rings_tables)
    kill -CONT "$RINGS_FORWARDER"
    rings_await 'further statistics' rings_has_tables $((before + 3)) || return
    kill -INT "$RINGS_GENERATOR"
    wait "$RINGS_GENERATOR" || { cat "$RINGS_DIR/pktgen" && return 1; }
    kill -INT "$RINGS_FORWARDER"
    wait "$RINGS_FORWARDER" || { echo "l2fwd exited with $?" && return 1; }
    (($(rings_tables) < before + 40)) || { echo "$(($(rings_tables) - before)) tables after the pause" && return 1; }
}

rings_tables() { grep -c '^port 0: ' "$RINGS_DIR/forwarder"; }

rings_has_tables() { (($(rings_tables) >= $1)); }

# rings_pairs L2FWD-END TESTPMD-END: a port with two pairs of queues each. What testpmd sends first on each pair goes
# round until it is told to end; it then says what it received on each.
rings_pairs() {
    local start=(rings_pairs_l2fwd rings_pairs_testpmd) ends=("$1" "$2") queue
    mkfifo "$RINGS_DIR/keys"
    [[ $1 == iface ]] || start=(rings_pairs_testpmd rings_pairs_l2fwd) ends=("$2" "$1")
    "${start[0]}" "${ends[0]}"
    rings_await socket test -S "$RINGS_DIR/0" || return
    "${start[1]}" "${ends[1]}"
    rings_await 'forwarded frames' grep -q 'received [0-9]\{5\}' "$RINGS_DIR/forwarder" || return
    echo >"$RINGS_DIR/keys"
    wait "$RINGS_GENERATOR" || true
    kill -INT "$RINGS_FORWARDER"
    wait "$RINGS_FORWARDER" || { echo "l2fwd exited with $?" && return 1; }
    for queue in 0 1; do
        grep -A1 "RX Port= 0/Queue= $queue" "$RINGS_DIR/testpmd" | grep -q 'RX-packets: [1-9]' ||
            { echo "testpmd received nothing on queue $queue" && return 1; }
    done
}

rings_pairs_l2fwd() {
    local driver=net_virtio_user
    [[ $1 == path ]] || driver=net_vhost
    "$L2FWD" --lcores 0@0,1@0 --file-prefix "rings-fwd-$$" --no-pci --no-huge --vdev "${driver}0,$1=$RINGS_DIR/0,queues=2" \
        -- -p 1 --queues 2 -T 0.1 >"$RINGS_DIR/forwarder" 2>&1 &
    RINGS_FORWARDER=$!
}

rings_pairs_testpmd() {
    local driver=net_virtio_user
    [[ $1 == path ]] || driver=net_vhost
    stdbuf -oL dpdk-testpmd --lcores 0@1,1@1 -m 256 --no-telemetry --log-level=error --file-prefix "rings-gen-$$" \
        --no-pci --no-huge --vdev "${driver}0,$1=$RINGS_DIR/0,queues=2" -- --auto-start --tx-first --no-flush-rx \
        --forward-mode=io --nb-cores=1 --rxq=2 --txq=2 --total-num-mbufs=8192 --no-mlockall \
        <>"$RINGS_DIR/keys" >"$RINGS_DIR/testpmd" 2>&1 &
    RINGS_GENERATOR=$!
}

rings_l2fwd() {
    rings_devices "$1"
    "$L2FWD" -l 1 --file-prefix "rings-fwd-$$" "${DEVICES[@]}" -- -p 3 -q 2 -T 0 >"$RINGS_DIR/forwarder" 2>&1 &
    RINGS_FORWARDER=$!
}

# It runs until a key is pressed, or its input ends. Unless told not to, it throws away what came before it forwards.
rings_testpmd() {
    rings_devices "$1"
    mkfifo "$RINGS_DIR/keys"
    dpdk-testpmd --lcores 0@1,1@1 -m 256 --no-telemetry --log-level=error --file-prefix "rings-fwd-$$" \
        "${DEVICES[@]}" -- --auto-start --no-flush-rx --forward-mode=io --nb-cores=1 --total-num-mbufs=4096 \
        --no-mlockall <>"$RINGS_DIR/keys" >"$RINGS_DIR/forwarder" 2>&1 &
    RINGS_FORWARDER=$!
}

rings_pktgen() {
    local expect=(--expect-dst 02:00:00:00:00:01)
    # DPDK's virtio driver throws away what came before its start was complete.
    [[ $1 == l2fwd ]] || expect=(--expect-dst 02:00:00:00:00:99 --await-path $((RINGS_PATIENCE / 2)))
    rings_devices "$2"
    timeout "$RINGS_PATIENCE" "$PKTGEN" -l 0 --file-prefix "rings-gen-$$" "${DEVICES[@]}" -- --count "$RINGS_COUNT" \
        --dst-mac 02:00:00:00:00:99 "${expect[@]}" >"$RINGS_DIR/pktgen" 2>&1 &
    RINGS_GENERATOR=$!
}

rings_await_sockets() {
    rings_await 'socket' test -S "$RINGS_DIR/0" && rings_await 'socket' test -S "$RINGS_DIR/1"
}

# rings_await WHAT COMMAND...
rings_await() { await "$RINGS_PATIENCE" "${@:2}" || { echo "no $1 in $RINGS_PATIENCE s" && return 1; }; }
