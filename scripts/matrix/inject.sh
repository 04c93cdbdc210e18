# shellcheck shell=dash disable=SC3045  # busybox's read has -t
# System calls of a start that fail, one after the other: each time a documented exit code, one line, and nothing left
# behind.

# The calls that make up a start, each with an error that the kernel has for it.
CALLS='ioctl:ENOMEM openat:EMFILE'
# Left out is what only the C library and Rust's std call, and answer themselves by ending the process: brk, mprotect,
# rt_sigaction, rt_sigprocmask, close.
MORE_CALLS='memfd_create:EMFILE ftruncate:ENOSPC mmap:ENOMEM munmap:EINVAL madvise:ENOMEM fcntl:EMFILE read:EIO
    pread64:EIO pwrite64:EIO write:ENOSPC statx:EACCES newfstatat:EACCES readlink:EACCES getdents64:EIO lseek:EINVAL
    flock:ENOLCK mkdir:EACCES unlink:EACCES rmdir:EACCES clone3:EAGAIN eventfd2:EMFILE sched_getaffinity:EINVAL
    sched_setaffinity:EINVAL sigaltstack:ENOMEM prctl:EINVAL prlimit64:EPERM getrandom:ENOSYS clock_nanosleep:EINTR
    futex:EINTR'

# failing_calls MODE NIC
failing_calls() {
    local call
    # shellcheck disable=SC2086  # a list
    for call in $CALLS ${LONG:+$MORE_CALLS}; do
        test_case "each ${call%:*} of a start fails once with ${call#*:}, $2, $1" fails_each_in_turn "$1" "$2" "${call%:*}" "${call#*:}"
    done
}

# fails_each_in_turn MODE NIC CALL ERROR: strace counts the calls of each thread by itself, so first those of the main
# thread alone and then, by -f, those of the thread that opens the NIC.
fails_each_in_turn() {
    local mode=$1 nic=$2 call=$3 error=$4 count number all=0 follow
    : >"$WORK/statuses"
    for follow in '' -f; do
        count_calls "$mode" "$nic" "$call" "$follow"
        number=1
        while [ "$number" -le "$count" ]; do
            UNDER="strace -D $follow -qq -e trace=$call -e inject=$call:error=$error:when=$number -o $WORK/trace"
            : >"$WORK/l2fwd.err"
            injected "$mode" "$nic"
            echo "$L2FWD_STATUS" >>"$WORK/statuses"
            judge_injected "$call" "$number$follow"
            number=$((number + 1))
        done
        all=$((all + count))
    done
    [ "$all" -gt 0 ] || skip "a start has no $call"
    UNDER=
    rm "$WORK/l2fwd.err"
    start_l2fwd -l 1 --vfio-mode "$mode" -a "$(bdf "$nic" fwd_rx)" -- -p 1 -T 0
    # What a name that could not be removed leaves is taken over.
    grep -v "ended uncleanly, recovered" "$WORK/l2fwd.err" >"$WORK/rest.err" || : >"$WORK/l2fwd.err"
    stop_l2fwd
    echo "$all calls; exit codes: $(sort -n "$WORK/statuses" | uniq -c | awk '{ printf "%s%s x %s", sep, $2, $1; sep = ", " }')" >"$WORK/note"
    [ -z "$LONG" ] || [ ! -e "$WORK/harmless" ] || sed 's/^/goes on without: /' "$WORK/harmless" >>"$WORK/note"
}

# count_calls MODE NIC CALL [-f]: sets count, of the main thread or of the busiest other one.
count_calls() {
    UNDER="strace -D $4 -qq -e trace=$3 -o $WORK/trace"
    injected "$1" "$2"
    [ "$L2FWD_STATUS" = 0 ] || die "l2fwd exited with $L2FWD_STATUS where nothing failed"
    # The pid in front of each line is there with -f only.
    count=$(awk -v call="$3(" -v main="$L2FWD" 'index($0, call) { thread = index($0, call) == 1 ? "" : $1 }
        index($0, call) && thread != main && ++calls[thread] > most { most = calls[thread] }
        END { print most + 0 }' "$WORK/trace")
}

# injected MODE NIC: starts l2fwd and, if it comes to forwarding, stops it. In the place of a call that is to fail strace
# makes one that does not exist, which the sandbox would deny.
injected() {
    local line
    spawn_l2fwd -l 1 --no-sandbox --vfio-mode "$1" -a "$(bdf "$2" fwd_rx)" -- -p 1 -T 0
    while IFS= read -r -t "$PATIENCE" line <&3; do
        [ "$line" != "entering main loop" ] || kill -INT "$L2FWD"
    done
    reap_l2fwd
}

# judge_injected CALL NUMBER: the runtime directory stays when its removal fails, or when nobody can know whose it is;
# the next start takes it over.
judge_injected() {
    local lines
    # std makes a stack for signals before main, and ends the process when it cannot.
    [ "$L2FWD_STATUS" != 134 ] || ! grep -q 'std/src/sys/pal/unix/stack_overflow.rs' "$WORK/l2fwd.err" || return 0
    lines=$(grep -c '^vireo-l2fwd: ' "$WORK/l2fwd.err") || :
    case $L2FWD_STATUS in
        0)
            [ "$lines" = 0 ] || die "$1 $2: exit code 0 and an error"
            sed -n 's/^[0-9 ]*\(.*\) = .*(INJECTED)$/\1/p' "$WORK/trace" >>"$WORK/harmless"
            ;;
        6[4-9] | 7[0-7]) [ "$lines" = 1 ] || die "$1 $2: exit code $L2FWD_STATUS with $lines lines" ;;
        *) die "$1 $2: exit code $L2FWD_STATUS" ;;
    esac
    ! grep -E 'panicked|stack backtrace' "$WORK/l2fwd.err" || die "$1 $2: it panicked"
    [ "$(cat "$HUGEPAGES/free_hugepages")" = "$(cat "$HUGEPAGES/nr_hugepages")" ] || die "$1 $2: hugepages were not given back"
    case $1 in
        unlink | rmdir | getdents64 | statx | flock) ;;
        *) [ ! -e /var/run/vireo/fwd ] || die "$1 $2: the runtime directory was left behind" ;;
    esac
}
