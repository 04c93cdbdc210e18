# shellcheck shell=bash
# System calls of a start on shared-memory rings that fail, one after the other: each time a documented exit code, one
# line, and nothing left behind. scripts/matrix/inject.sh does the same to starts with NICs.

# Those that make and share things, each with an error that the kernel has for it.
INJECT_CALLS=(openat:EMFILE socket:EMFILE bind:EADDRINUSE listen:EADDRINUSE connect:ECONNREFUSED memfd_create:EMFILE
    ftruncate:ENOSPC clone3:EAGAIN eventfd2:EMFILE sendmsg:EPIPE)
# Not those that the loader makes before main, nor what scripts/matrix/inject.sh leaves out.
INJECT_MORE_CALLS=(fcntl:EMFILE ioctl:EINVAL write:ENOSPC statx:EACCES readlink:EACCES getdents64:EIO lseek:EINVAL
    flock:ENOLCK mkdir:EACCES unlink:EACCES rmdir:EACCES accept4:EMFILE recvmsg:ECONNRESET recvfrom:ECONNRESET
    poll:ENOMEM shutdown:ENOTCONN getsockopt:EINVAL sched_getaffinity:EINVAL sched_setaffinity:EINVAL
    sigaltstack:ENOMEM prctl:EINVAL getrandom:ENOSYS clock_nanosleep:EINTR futex:EINTR)
INJECT_LONG=

# inject_tests [long]: TAP.
inject_tests() {
    local call calls=("${INJECT_CALLS[@]}")
    if ! command -v strace >/dev/null; then
        rings_skip "each system call of a start fails once" "strace is not installed"
        echo "1..$RINGS_CASES"
        return
    fi
    rings_build || return
    INJECT_LONG=${1:-}
    [[ -z $INJECT_LONG ]] || calls+=("${INJECT_MORE_CALLS[@]}")
    for call in "${calls[@]}"; do
        rings_case "each ${call%:*} of a start on vhost fails once with ${call#*:}" inject_call iface "${call%:*}" "${call#*:}"
        rings_case "each ${call%:*} of a start on virtio-user fails once with ${call#*:}" inject_call path "${call%:*}" "${call#*:}"
    done
    echo "1..$RINGS_CASES"
    return $((RINGS_FAILED > 0))
}

# inject_call iface|path CALL ERROR: strace counts the calls of each thread by itself, so first those of the main thread
# alone and then, by -f, those of the other threads.
inject_call() {
    local end=$1 call=$2 error=$3 follow number count all=0 statuses=()
    mkdir "$RINGS_DIR/runtime"
    [[ $end == iface ]] || inject_peer
    for follow in '' -f; do
        inject_run "$end" -D ${follow:+"$follow"} -qq -e "trace=$call"
        ((STATUS == 0)) || { echo "l2fwd exited with $STATUS where nothing failed" && return 1; }
        count=$(inject_count "$call")
        for ((number = 1; number <= count; number++)); do
            inject_run "$end" -D ${follow:+"$follow"} -qq -e "trace=$call" -e "inject=$call:error=$error:when=$number"
            # Before main is none of our code.
            ((STATUS != 127)) || ! grep -q 'error while loading shared libraries' "$RINGS_DIR/err" || STATUS=loader
            inject_judge "$end" "$call" || { echo "$call $number$follow: exit code $STATUS" && cat "$RINGS_DIR/err" && return 1; }
            statuses+=("$STATUS")
        done
        all=$((all + count))
    done
    inject_run "$end" -D -qq -e trace=none
    ((STATUS == 0)) || { echo "the next start exited with $STATUS" && return 1; }
    ((all > 0)) || { echo "there is none" >"$RINGS_DIR/note" && return; }
    echo "$all calls; exit codes: $(printf '%s\n' "${statuses[@]}" | sort | uniq -c | awk '{ printf "%s%s x %s", sep, $2, $1; sep = ", " }')" >"$RINGS_DIR/note"
    [[ -z $INJECT_LONG || ! -e $RINGS_DIR/harmless ]] || sort -u "$RINGS_DIR/harmless" >>"$RINGS_DIR/note"
}

# The same peer for all starts: it outlives whatever they do.
inject_peer() {
    rings_devices iface
    "$L2FWD" -l 1 --file-prefix "inject-peer-$$" --in-memory "${DEVICES[@]}" -- -p 3 -q 2 -T 0 >"$RINGS_DIR/peer" 2>&1 &
    RINGS_FORWARDER=$!
    rings_await_sockets
}

# inject_run iface|path STRACE-ARGUMENTS...: starts l2fwd and, if both ports start, stops it. Sets STATUS and PID.
# In the place of a call that is to fail strace makes one that does not exist, which the sandbox would deny.
inject_run() {
    local line output
    rings_devices "$1"
    shift
    [[ -p $RINGS_DIR/out ]] || mkfifo "$RINGS_DIR/out"
    # The strace is a grandchild (-D), so that the exit code is l2fwd's.
    RUNTIME_DIRECTORY="$RINGS_DIR/runtime" strace "$@" -o "$RINGS_DIR/trace" "$L2FWD" -l 0 --no-sandbox "${DEVICES[@]}" \
        -- -p 3 -q 2 -T 0 >"$RINGS_DIR/out" 2>"$RINGS_DIR/err" &
    PID=$!
    RINGS_GENERATOR=$PID
    exec {output}<"$RINGS_DIR/out"
    while IFS= read -r -t "$RINGS_PATIENCE" line <&"$output"; do
        # The last line before the wait for links, which nobody ends on vhost.
        [[ $line != "Port 1, MAC address: "* ]] || kill -INT "$PID"
    done
    exec {output}<&-
    STATUS=0
    wait "$PID" || STATUS=$?
    RINGS_GENERATOR=
}

# inject_count CALL: of the main thread, or with -f, where each line has its thread, of the busiest other one.
inject_count() {
    awk -v call="$1(" -v main="$PID" 'index($0, call) { thread = index($0, call) == 1 ? "" : $1 }
        index($0, call) && thread != main && ++calls[thread] > most { most = calls[thread] }
        END { print most + 0 }' "$RINGS_DIR/trace"
}

# inject_judge iface|path CALL: only a name whose own removal failed may stay, for the next start to clear away.
inject_judge() {
    local lines
    lines=$(grep -c '^vireo-l2fwd: ' "$RINGS_DIR/err" || true)
    case $STATUS in
        0)
            ((lines == 0)) || return
            sed -n 's/^[0-9 ]*\(.*\) = .*(INJECTED)$/goes on without: \1/p' "$RINGS_DIR/trace" >>"$RINGS_DIR/harmless"
            ;;
        6[4-9] | 7[0-7]) ((lines == 1)) || return ;;
        loader) ;;
        *) return 1 ;;
    esac
    ! grep -qE 'panicked|stack backtrace' "$RINGS_DIR/err" || return
    case $2 in
        unlink | rmdir | getdents64 | statx | flock) return ;;
    esac
    [[ ! -e $RINGS_DIR/runtime/vireo/rte ]] || { echo "the runtime directory was left behind" && return 1; }
    [[ $1 == path || ! -e $RINGS_DIR/0 && ! -e $RINGS_DIR/1 ]] || { echo "a socket was left behind" && return 1; }
}
