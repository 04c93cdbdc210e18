# shellcheck shell=bash
# A guest whose two virtio-net are served by l2fwd's net_vhost on this machine: QEMU is the frontend.

VHOST_L2FWD=
# Seconds for which a program may be silent before it counts as hung.
VHOST_PATIENCE=60

lab_vhost() {
    local status=0
    options_take_no_command vhost
    # QEMU passes vhost-user's memory and no IOTLB, so the guest's IOMMU cannot be in between.
    OPT_IOMMU='' OPT_NICS=none
    guest_prepare
    trap 'vhost_end; guest_end; rm -rf "$WORK"' EXIT
    echo "TAP version 13"
    vhost_circle >"$WORK/vhost.log" 2>&1 || status=$?
    if ((status == 0)); then
        echo "ok 1 - pktgen on a guest's virtio-net, through l2fwd on vhost"
    else
        echo "not ok 1 - pktgen on a guest's virtio-net, through l2fwd on vhost"
        sed 's/^/#   /' "$WORK/vhost.log"
    fi
    echo "1..1"
    return "$status"
}

# The generator fails unless each frame comes back once and in order.
vhost_circle() {
    local port
    # Without MSI-X: QEMU 7.2 under TCG crashes in it, whoever serves the rings.
    local nic=virtio-net-pci,disable-legacy=on,vectors=0,romfile=
    QEMU_EXTRA+=(-object "memory-backend-memfd,id=ram,size=${OPT_MEM}M,share=on" -machine memory-backend=ram)
    for port in 0 1; do
        QEMU_EXTRA+=(-chardev "socket,id=v$port,path=$WORK/vhost$port" -netdev "vhost-user,id=n$port,chardev=v$port"
            -device "$nic,netdev=n$port,addr=0x$((port + 4)),mac=52:54:00:00:00:0$((port + 4))")
    done
    "$REPO/target/guest/$TARGET/lab/vireo-l2fwd" -l 1 --no-pci --no-huge --file-prefix "vhost-$$" \
        --vdev "net_vhost0,iface=$WORK/vhost0" --vdev "net_vhost1,iface=$WORK/vhost1" -- -p 3 -q 2 -T 0 &
    VHOST_L2FWD=$!
    for port in 0 1; do
        await "$VHOST_PATIENCE" test -S "$WORK/vhost$port" || { echo "no socket in $VHOST_PATIENCE s" && return 1; }
    done
    guest_boot "$GUEST_IMAGE" pipe pktgen -l 1 --vfio-mode noiommu -a 00:04.0 -a 00:05.0 -- --count 20000 \
        --size 60-1514 --dst-mac 02:00:00:00:00:99 --expect-dst 02:00:00:00:00:01
    ((GUEST_STATUS == 0)) || { echo "$GUEST_ERROR (guest kernel's log: $GUEST_LOG)" && return 1; }
    kill -INT "$VHOST_L2FWD"
    wait "$VHOST_L2FWD" || { echo "l2fwd exited with $?" && return 1; }
    VHOST_L2FWD=
}

vhost_end() { [[ -z $VHOST_L2FWD ]] || kill -KILL "$VHOST_L2FWD" 2>/dev/null || true; }
