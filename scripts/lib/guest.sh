# shellcheck shell=bash
# Boots the guest once and runs one command in it.

GUEST_IMAGE=
GUEST_STATUS=
GUEST_ERROR=
GUEST_LOG=
GUEST_QEMU=
GUEST_TAIL=

# guest_estimate [compare|count]: prints the expected duration if it is minutes. The figures were measured on
# two CPUs, both quiet and busy.
guest_estimate() {
    local least=0 most=0 parts=()
    if [[ -n $OPT_BUILD && ! -d $REPO/target/guest ]]; then
        ((least += 1, most += 4))
        parts+=("programs 1 to 4")
    fi
    if [[ $OPT_KERNEL == @(default|edge) && -z $(kernel_chosen "$OPT_KERNEL") ]]; then
        ((least += 5, most += 16))
        parts+=("kernel 5 to 16")
    fi
    if [[ ${1:-} == @(count|compare) ]]; then
        ((least += 2, most += 5))
        parts+=("counts 2 to 5")
    fi
    if [[ ${1:-} == compare ]]; then
        ((least += 8, most += 19))
        parts+=("times 8 to 19")
    fi
    ((${#parts[@]})) || return 0
    printf -v parts '%s, ' "${parts[@]}"
    say "about $least to $most minutes on two CPUs (${parts%, }), plus downloads"
}

# guest_prepare [compare|count]: does everything before the first boot that can fail or take long. Mistakes in
# the user's options are reported first.
guest_prepare() {
    local packages=(busybox-static cpio strace)
    command -v qemu-system-x86_64 >/dev/null || packages+=(qemu-system-x86)
    topology_build
    guest_estimate "${1:-}"
    need_packages "${packages[@]}"
    emulator_choose
    programs_build
    guest_use_kernel "$OPT_KERNEL"
}

guest_use_kernel() {
    GUEST_IMAGE=$(kernel_path "$1")
    accel_choose "$GUEST_IMAGE"
}

# guest_run pipe|terminal COMMAND...: exits with the command's exit code.
guest_run() {
    guest_boot "$GUEST_IMAGE" "$@"
    ((GUEST_STATUS == 0)) || say "$GUEST_ERROR (guest kernel's log: $GUEST_LOG)"
    exit "$GUEST_STATUS"
}

# guest_boot IMAGE pipe|terminal COMMAND...: sets GUEST_STATUS and, if it is not 0, GUEST_ERROR and GUEST_LOG.
guest_boot() {
    local image=$1 output=$2 run status=0 timeout=${OPT_TIMEOUT:-300}
    shift 2
    run=$(mktemp -d "$WORK/boot.XXXXXX")
    initramfs_build "$run" "$image" "$@"
    topology_build
    qemu_arguments "$image" "$run" "$output"
    if [[ -n $OPT_HARNESS ]]; then
        ln -s "$OPT_HARNESS/console.log" "$run/console"
    fi
    : >"$run/console"
    guest_follow_console "$run"
    "guest_attach_$output" "$run" "$timeout" || status=$?
    guest_judge "$run" "$status" "$timeout"
    guest_end
    rm -rf "$run"
}

guest_attach_pipe() {
    local run=$1 readers status=0
    mkfifo "$run/stdout" "$run/stderr"
    cat "$run/stdout" &
    readers=("$!")
    cat "$run/stderr" >&2 &
    readers+=("$!")
    timeout --kill-after=5 "$2" "${QEMU[@]}" "${QEMU_ARGS[@]}" </dev/null >"$run/qemu" 2>&1 &
    GUEST_QEMU=$!
    wait "$GUEST_QEMU" 2>/dev/null || status=$?
    GUEST_QEMU=
    # If QEMU failed early, it never opened the pipes, and their readers still wait for a writer.
    : 3<>"$run/stdout" 4<>"$run/stderr"
    wait "${readers[@]}"
    return "$status"
}

guest_attach_terminal() {
    local modes status=0
    modes=$(stty -g)
    timeout --foreground --kill-after=5 "$2" "${QEMU[@]}" "${QEMU_ARGS[@]}" 2>"$1/qemu" || status=$?
    # A killed QEMU leaves the terminal raw.
    stty "$modes"
    return "$status"
}

guest_follow_console() {
    [[ -n $OPT_VERBOSE ]] || return 0
    tail -q -n +1 --follow --pid=$$ "$1/console" >&2 &
    GUEST_TAIL=$!
}

guest_judge() {
    local run=$1 qemu_status=$2 timeout=$3 said
    GUEST_STATUS=$(tr -dc '0-9' 2>/dev/null <"$run/status" || true)
    if [[ -n $GUEST_STATUS ]]; then
        GUEST_ERROR="the command exited with $GUEST_STATUS"
    elif ((qemu_status == 124 || qemu_status == 137)); then
        GUEST_STATUS=124
        GUEST_ERROR="the guest did not finish within $timeout s (--timeout)"
    else
        GUEST_STATUS=125
        said=$(grep -m1 -E '^(Oops|BUG): |Kernel panic' "$run/console" || sed /warning:/d "$run/qemu" | tail -n1)
        GUEST_ERROR="the guest ended before its command did${said:+: $said}"
    fi
    ((GUEST_STATUS == 0)) || guest_keep_log "$run"
}

guest_keep_log() {
    mkdir -p "$CACHE/log"
    find "$CACHE/log" -type f -mtime +7 -delete
    GUEST_LOG="$CACHE/log/$(date +%Y%m%d-%H%M%S)-$$.log"
    cat "$1/console" "$1/qemu" >"$GUEST_LOG"
}

# Also runs when the lab is interrupted.
guest_end() {
    local pid
    for pid in $GUEST_QEMU $GUEST_TAIL; do
        kill "$pid" 2>/dev/null || true
    done
    GUEST_QEMU=
    GUEST_TAIL=
}
