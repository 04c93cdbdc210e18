# shellcheck shell=dash
# Which device nodes a mode opens, and which none: strace tells.

# opens MODE YES NO: all of the basic regular expressions in YES, none of those in NO.
opens() {
    local pattern mode=$1 yes=$2 no=$3
    UNDER="strace -D -f -e trace=open,openat,openat2 -o $WORK/trace"
    start_l2fwd -l 1 --vfio-mode "$mode" -a "$(bdf e1000e fwd_rx)" -a "$(bdf virtio-net fwd_tx)" -- -p 3 -q 2 -T 0
    stop_l2fwd
    UNDER=
    # The patterns are grep's, not the shell's.
    set -f
    grep -o '"/dev/[^"]*"' "$WORK/trace" | tr -d '"' | sort -u >"$WORK/opened.out"
    for pattern in $yes; do
        grep -q "^$pattern\$" "$WORK/opened.out" || die "it opened no $pattern"
    done
    for pattern in $no; do
        ! grep "^$pattern\$" "$WORK/opened.out" || die "it opened $pattern"
    done
}

# hands_over NIC MODE: the process that is given the descriptors opens no node, and drives the device.
hands_over() {
    timeout "$PATIENCE" strace -f -e trace=open,openat,openat2,execve -o "$WORK/trace" vireo-handover "$(bdf "$1" fwd_rx)" "$2" >"$WORK/handover.out"
    grep -q "mode $2: by descriptors from another process; first register" "$WORK/handover.out" || die "not taken over"
    sed '1,/execve.*"take"/d' "$WORK/trace" >"$WORK/taker"
    [ -s "$WORK/taker" ] || die "strace saw no second process"
    ! grep -E '"/dev/(vfio|iommu)' "$WORK/taker" || die "it opened a node"
}
