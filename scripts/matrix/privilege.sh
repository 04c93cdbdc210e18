# shellcheck shell=dash
# Without root: nodes that nobody but root may open, passed to an ordinary user; root given up after the start; and the
# sandbox, which names what it denies.

# The nodes of a machine where root has kept them to itself.
close_nodes() {
    local node
    for node in /dev/iommu /dev/vfio/vfio /dev/vfio/[0-9]* /dev/vfio/devices/*; do
        [ -c "$node" ] || continue
        at_end chmod "$(stat -c %a "$node")" "$node"
        chmod 600 "$node"
    done
}

# status_is FIELD VALUE: of the running l2fwd, in all its threads.
status_is() {
    local task found
    for task in /proc/"$L2FWD"/task/*/status; do
        found=$(sed -n "s/^$1:[[:space:]]*//p" "$task" | tr -s '\t ' ' ' | sed 's/ *$//')
        [ "$found" = "$2" ] || die "$task has $1 '$found', not '$2'"
    done
}

has_no_privilege() {
    local id=65534
    status_is Uid "$id $id $id $id"
    status_is Gid "$id $id $id $id"
    status_is Groups ''
    for set in CapInh CapPrm CapEff CapBnd CapAmb; do
        status_is $set 0000000000000000
    done
    status_is NoNewPrivs 1
    status_is Seccomp 2
}

# unprivileged MODE NIC [EAL-ARGUMENT]
unprivileged() {
    close_nodes
    UNDER="vireo-launch --user nobody"
    l2fwd_as_nobody ${3:+"$3"} --vfio-mode "$1" -a "$(bdf "$2" fwd_rx)" -a "$(bdf "$2" fwd_tx)"
    UNDER=
    carries "$2" "$2"
    stop_l2fwd
    said "in mode $1: as asked"
}

# unprivileged_auto: both ports take the one iommufd, whichever comes first.
unprivileged_auto() {
    close_nodes
    UNDER="vireo-launch --user nobody"
    l2fwd_as_nobody -a "$(bdf e1000e fwd_rx)" -a "$(bdf e1000e fwd_tx)"
    UNDER=
    carries e1000e e1000e
    stop_l2fwd
    [ "$(grep -cF 'in mode cdev: auto: ' "$WORK/l2fwd.out")" = 2 ] || die "not both ports are in mode cdev"
}

# l2fwd_as_nobody EAL-ARGUMENTS...: started with what launched it in UNDER.
l2fwd_as_nobody() {
    at_end rm -rf /tmp/vireo
    start_l2fwd -l 1 "$@" -- -p 3 -q 2 -T 0
    has_no_privilege
}

# unprivileged_mixed: one iommufd for both.
unprivileged_mixed() {
    close_nodes
    UNDER="vireo-launch --user nobody"
    l2fwd_as_nobody -a "$(bdf e1000e fwd_rx),vfio-mode=cdev" -a "$(bdf e1000e fwd_tx),vfio-mode=$1"
    UNDER=
    carries e1000e e1000e
    stop_l2fwd
}

# unprivileged_by_socket MODE: the program is started by the user, and connects to the launcher.
unprivileged_by_socket() {
    local socket=/tmp/nodes.socket
    close_nodes
    at_end rm -f $socket
    set -- --vfio-mode "$1" -a "$(bdf e1000e fwd_rx)" -a "$(bdf e1000e fwd_tx)"
    vireo-launch --user nobody --socket $socket l2fwd "$@" -- -p 3 &
    LAUNCHER=$!
    CHILDREN="$CHILDREN $LAUNCHER"
    await_socket $socket
    # Somebody else is turned away, and the nodes wait on.
    refused_as root 77 "they are for another user" --file-prefix other --vfio-fds $socket "$@" -- -p 3
    at_end rm -rf /tmp/vireo
    UNDER=as_nobody
    start_l2fwd -l 1 --vfio-fds $socket "$@" -- -p 3 -q 2 -T 0
    status_is Uid '65534 65534 65534 65534'
    status_is CapEff 0000000000000000
    UNDER=
    carries e1000e e1000e
    wait "$LAUNCHER" || die "the launcher exited with $?"
    [ ! -e $socket ] || die "the socket was left behind"
    stop_l2fwd
}

await_socket() {
    local left=$((PATIENCE * 10))
    until [ -S "$1" ]; do
        [ $((left -= 1)) -gt 0 ] || die "there is no socket $1"
        sleep 0.1
    done
}

as_nobody() {
    ulimit -l unlimited
    exec su nobody -s /bin/sh -c "exec $*"
}

# gives_up_root MODE NIC
gives_up_root() {
    [ "$1" != noiommu-cdev ] || need_noiommu_cdev
    at_end rm -rf /var/run/vireo/fwd
    start_l2fwd -l 0-1 --user nobody --vfio-mode "$1" -a "$(bdf "$2" fwd_rx)" -a "$(bdf "$2" fwd_tx)" -- -p 3 -q 1 -T 0
    has_no_privilege
    carries "$2" "$2"
    stop_l2fwd
    # What it could not remove is the next one's, without a word.
    start_l2fwd -l 1 --vfio-mode "$1" -a "$(bdf "$2" fwd_rx)" -- -p 1 -T 0
    stop_l2fwd
}

# No sandbox and no user: as before.
no_sandbox() {
    start_l2fwd -l 1 --no-sandbox --vfio-mode "$1" -a "$(bdf e1000e fwd_rx)" -- -p 1 -T 0
    status_is Seccomp 0
    status_is NoNewPrivs 0
    stop_l2fwd
}

# denies NAME WORD: the call that the word stands for ends the program, with a line that names it.
denies() {
    local status=0
    vireo-forbidden --in-memory -- "$2" >"$WORK/forbidden.out" 2>"$WORK/forbidden.err" || status=$?
    [ $status = 77 ] || die "exit code $status, not 77"
    grep -q "^EAL: the sandbox denies the system call $1 (" "$WORK/forbidden.err" || die "not named"
    vireo-forbidden --in-memory --no-sandbox -- "$2" >"$WORK/forbidden.out" || die "also denied without the sandbox"
}

# Landlock denies by errno: the file is there, and stays.
denies_files() {
    at_end rm -f /tmp/vireo-forbidden
    : >/tmp/vireo-forbidden
    vireo-forbidden --in-memory -- unlink >"$WORK/forbidden.out"
    grep -q "PermissionDenied" "$WORK/forbidden.out" || die "it removed a file"
    vireo-forbidden --in-memory --no-sandbox -- unlink
    [ ! -e /tmp/vireo-forbidden ] || die "also denied without the sandbox"
}

# bad_environment PID FDS EXIT-CODE TEXT [FILE]: LISTEN_PID (self is the program's own) and LISTEN_FDS, and what is
# open as descriptor 3.
bad_environment() {
    local status=0
    sh -c "LISTEN_PID=${1#self}; export LISTEN_PID=\${LISTEN_PID:-\$\$} LISTEN_FDS=$2; exec l2fwd --vfio-fds listen -a $(bdf e1000e fwd_rx) -- -p 1" \
        >"$WORK/refused.out" 2>"$WORK/refused.err" 3<"${5:-/dev/null}" || status=$?
    [ $status = "$3" ] || die "exit code $status, not $3"
    [ "$(wc -l <"$WORK/refused.err")" = 1 ] || die "not one line on stderr"
    grep -q -- "$4" "$WORK/refused.err" || die "not said: $4"
}

# launch_refuses EXIT-CODE TEXT ARGUMENTS...
launch_refuses() {
    local wanted=$1 text=$2 status=0
    shift 2
    vireo-launch "$@" >"$WORK/refused.out" 2>"$WORK/refused.err" || status=$?
    [ $status = "$wanted" ] || die "exit code $status, not $wanted"
    [ "$(wc -l <"$WORK/refused.err")" = 1 ] || die "not one line on stderr"
    grep -q -- "$text" "$WORK/refused.err" || die "not said: $text"
}

sandbox_cases() {
    test_case "--no-sandbox" no_sandbox "$1"
    test_case "the sandbox names a denied socket" denies socket socket
    test_case "the sandbox names a denied open" denies openat open
    test_case "the sandbox keeps files" denies_files
}

privilege_cases() {
    local mode nic
    for mode in container cdev compat; do
        for nic in $NICS; do
            test_case "$nic as nobody, nodes passed by LISTEN_FDS, $mode" unprivileged "$mode" "$nic"
        done
        test_case "e1000e as nobody with --isolate-ports, $mode" unprivileged "$mode" e1000e --isolate-ports
        test_case "as nobody, nodes passed by a socket, $mode" unprivileged_by_socket "$mode"
        test_case "--user nobody, $mode" gives_up_root "$mode" virtio-net
        test_case "--user nobody, e1000e, $mode" gives_up_root "$mode" e1000e
    done
    test_case "as nobody, both ports in auto" unprivileged_auto
    test_case "as nobody, ports in cdev and compat" unprivileged_mixed compat
    test_case "as nobody, ports in cdev and container" unprivileged_mixed container
    sandbox_cases cdev
    test_case "refused: LISTEN_FDS of another process" bad_environment 1 1 64 'they are for pid 1 '
    test_case "refused: LISTEN_FDS that is no number" bad_environment self two 64 'not 1 to 253'
    test_case "refused: fewer descriptors than LISTEN_FDS" bad_environment self 9 64 'is not open (EBADF)' /dev/iommu
    test_case "refused: a descriptor that is no node" bad_environment self 1 77 'no node of VFIO or iommufd'
    test_case "refused: the wrong node" bad_environment self 1 77 'not among the descriptors of --vfio-fds' /dev/iommu
    test_case "refused: no such --user" refuses 64 'there is no such user' --user no-such -a "$(bdf e1000e fwd_rx)" -- -p 1
    test_case "refused: --user root" refuses 64 'that is root' --user root -a "$(bdf e1000e fwd_rx)" -- -p 1
    test_case "refused: a launch without devices" launch_refuses 69 'choose no device' --user nobody l2fwd --no-pci -- -p 1
    test_case "refused: a launch of no program" launch_refuses 69 'cannot start' --user nobody no-such -a "$(bdf e1000e fwd_rx)"
}

noiommu_privilege_cases() {
    local mode
    for mode in noiommu noiommu-cdev; do
        test_case "--user nobody, $mode" gives_up_root "$mode" e1000e
    done
    sandbox_cases noiommu
    test_case "refused: a launch in mode noiommu" launch_refuses 77 'CAP_SYS_RAWIO' --user nobody l2fwd --vfio-mode noiommu -a "$(bdf e1000e fwd_rx)" -- -p 1
}
