# shellcheck shell=dash
# Which device nodes a mode opens: strace tells.

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
