# shellcheck shell=bash
# Two Linux hosts talk through the guest: network namespaces of this machine, joined by l2fwd between an e1000e and a
# virtio-net. The addresses exist in these namespaces only.

WIRE_NAMES=()
WIRE_GUEST=

lab_wire() {
    local reason
    options_take_no_command wire
    need_packages iproute2 iputils-ping socat
    guest_prepare
    echo "TAP version 13"
    if reason=$(wire_impossible); then
        echo "ok 1 - two hosts talk through l2fwd # SKIP $reason"
        echo "1..1"
        return
    fi
    trap 'wire_end; guest_end; rm -rf "$WORK"' EXIT
    wire_begin
    local failed=0
    wire_case 1 "ping passes through l2fwd, e1000e to virtio-net" wire_ping || failed=1
    wire_case 2 "a TCP stream passes through l2fwd, e1000e to virtio-net" wire_tcp || failed=1
    echo "1..2"
    return "$failed"
}

wire_impossible() {
    if ((EUID != 0)); then
        echo "network namespaces need root"
    elif [[ ! -c /dev/net/tun ]]; then
        echo "there is no /dev/net/tun"
    elif ! ip netns add "vireo-probe-$$" 2>/dev/null; then
        echo "this machine makes no network namespaces"
    else
        ip netns del "vireo-probe-$$"
        return 1
    fi
}

# The TAPs go to their namespaces when QEMU has them open, because QEMU itself stays outside.
wire_begin() {
    local side line
    WIRE_NAMES=("vireo-a-$$" "vireo-b-$$")
    OPT_NICS="tap:vireoA,vireoB"
    for side in 0 1; do
        ip netns add "${WIRE_NAMES[side]}"
    done
    ip tuntap add vireoA mode tap
    ip tuntap add vireoB mode tap
    ip link set vireoA up
    ip link set vireoB up
    mkfifo "$WORK/l2fwd"
    guest_boot "$GUEST_IMAGE" pipe l2fwd -l 1 -- -p 3 -q 2 -P -T 0 --no-mac-updating >"$WORK/l2fwd" 2>"$WORK/wire.err" &
    WIRE_GUEST=$!
    exec {WIRE_OUTPUT}<"$WORK/l2fwd"
    while IFS= read -r line <&"$WIRE_OUTPUT"; do
        [[ $line != "entering main loop" ]] || break
    done
    [[ $line == "entering main loop" ]] || fail "l2fwd did not start in the guest: $(tail -n 1 "$WORK/wire.err")"
    wire_join vireoA "${WIRE_NAMES[0]}" 192.168.77.1/24
    wire_join vireoB "${WIRE_NAMES[1]}" 192.168.77.2/24
}

wire_join() {
    ip link set "$1" netns "$2"
    ip -n "$2" address add "$3" dev "$1"
    ip -n "$2" link set lo up
    ip -n "$2" link set "$1" up
}

# wire_case NUMBER DESCRIPTION COMMAND...
wire_case() {
    local number=$1 name=$2
    shift 2
    if "$@" >"$WORK/wire.log" 2>&1; then
        echo "ok $number - $name"
        return
    fi
    echo "not ok $number - $name"
    sed 's/^/#   /' "$WORK/wire.log"
    return 1
}

wire_ping() { ip netns exec "${WIRE_NAMES[0]}" ping -c 20 -i 0.2 -w 30 192.168.77.2; }

wire_tcp() {
    head -c 4M /dev/urandom >"$WORK/sent"
    timeout 60 ip netns exec "${WIRE_NAMES[1]}" socat -u TCP-LISTEN:7777,reuseaddr "CREATE:$WORK/received" &
    local receiver=$!
    timeout 60 ip netns exec "${WIRE_NAMES[0]}" \
        socat -u "FILE:$WORK/sent" TCP:192.168.77.2:7777,retry=100,interval=0.1 && wait "$receiver" &&
        cmp "$WORK/sent" "$WORK/received"
}

wire_end() {
    local name
    [[ -z $WIRE_GUEST ]] || pkill -P "$WIRE_GUEST" 2>/dev/null || true
    for name in "${WIRE_NAMES[@]}"; do
        ip netns del "$name" 2>/dev/null || true
    done
    for name in vireoA vireoB; do
        ip link del "$name" 2>/dev/null || true
    done
}
