# shellcheck shell=dash
# What is short on a machine: memory of every kind, cores, room for output.

no_hugepages() {
    local before
    before=$(cat "$HUGEPAGES/nr_hugepages")
    at_end set_hugepages "$before"
    set_hugepages 0
    unusable_as root "$1" "$(bdf e1000e fwd_rx)" 71 "are needed and 0 of 0 are free; run: sysctl vm.nr_hugepages="
    set_hugepages 4
    unusable_as root "$1" "$(bdf e1000e fwd_rx)" 71 "are needed and 4 of 4 are free; run: sysctl vm.nr_hugepages="
    set_hugepages "$before"
    starts_again
}

# mounted OPTIONS: a hugetlbfs at $WORK/huge for the rest of the case.
mounted() {
    mkdir "$WORK/huge"
    at_end umount "$WORK/huge"
    mount -t hugetlbfs -o "$1" none "$WORK/huge"
}

# huge_dir EXIT-CODE TEXT [OPTIONS]: without options nothing is mounted there.
huge_dir() {
    [ -z "${3:-}" ] || mounted "$3"
    refused_as root "$1" "$2" --huge-dir "$WORK/huge" --vfio-mode "$GENERATOR_MODE" -a "$(bdf e1000e fwd_rx)" -- -p 1
    starts_again
}

huge_dir_without_mount() {
    mkdir "$WORK/huge"
    huge_dir 74 "it is not a hugetlbfs mount; run: mount -t hugetlbfs none"
}

full_huge_dir() {
    huge_dir 74 "the mount has 2 of 2 free; run: umount $WORK/huge && mount -t hugetlbfs -o " size=4M
    eval "$(sed 's/.*; run: //; s/; or .*//' "$WORK/refused.err")"
    start_l2fwd -l 1 --huge-dir "$WORK/huge" --vfio-mode "$GENERATOR_MODE" -a "$(bdf e1000e fwd_rx)" -- -p 1 -T 0
    said "hugetlbfs file"
    stop_l2fwd
}

huge_dirs() {
    test_case "refused: --huge-dir that does not exist" huge_dir 74 "; run: mkdir -p $WORK/huge && mount -t hugetlbfs"
    test_case "refused: --huge-dir that is no mount" huge_dir_without_mount
    test_case "refused: --huge-dir that is read-only" huge_dir 74 "EROFS (Read-only file system)" ro
    test_case "refused: --huge-dir that is full, until the command that it names" full_huge_dir
    test_case "refused: --huge-dir of 1 GiB pages that are not there" no_giant_pages
}

no_giant_pages() {
    local giant=/sys/kernel/mm/hugepages/hugepages-1048576kB
    [ -e $giant ] || skip "this guest's CPU has no 1 GiB pages"
    huge_dir 71 "1 pages of 1048576 KiB are needed and 0 of 0 are free; run: echo 1 > $giant" pagesize=1G
}

# little_memlock MODE ACCOUNTING NODES...: root may lock any amount, so nobody gets the nodes.
little_memlock() {
    local mode=$1 accounting=$2
    shift 2
    at_end chown root "$@"
    chown nobody "$@"
    LIMIT='ulimit -l 64;' unusable_as nobody "$mode" "$(bdf e1000e fwd_rx)" 71 \
        "KiB must be locked and RLIMIT_MEMLOCK is 64 KiB for $accounting"
    grep -q 'run: ulimit -l [0-9]*, or as root: prlimit' "$WORK/refused.err" || die "no command"
    starts_again
}

entry_limit() {
    local limit=/sys/module/vfio_iommu_type1/parameters/dma_entry_limit
    at_end "echo 65535 >$limit"
    echo 0 >$limit
    unusable_as root container "$(bdf e1000e fwd_rx)" 71 "allows, 0; run: echo 65535 > $limit"
    echo 65535 >$limit
    starts_again
}

outside_the_affinity() {
    local status=0
    timeout "$PATIENCE" taskset 2 l2fwd -l 0 -a "$(bdf e1000e fwd_rx)" -- -p 1 2>"$WORK/refused.err" || status=$?
    [ $status = 64 ] || die "exit code $status"
    grep -q 'core 0 is outside the affinity or cpuset of the process; use cores 1$' "$WORK/refused.err" || die "not said"
}

offline_core() {
    local online=/sys/devices/system/cpu/cpu1/online
    at_end "echo 1 >$online"
    echo 0 >$online
    refused_as root 64 "core 1 is offline; use cores 0" -l 1 -a "$(bdf e1000e fwd_rx)" -- -p 1
    start_l2fwd --vfio-mode "$GENERATOR_MODE" -a "$(bdf e1000e fwd_rx)" -a "$(bdf e1000e fwd_tx)" -- -p 3 -q 2 -T 0
    said "Lcore 0: RX port 1"
    stop_l2fwd
}

# output_fails: /dev/full, then a reader that goes. The next start finds the NICs stopped.
output_fails() {
    local status=0
    doctor --modes container "$(bdf e1000e fwd_rx)" >/dev/full 2>"$WORK/full.err" || status=$?
    [ $status = 74 ] || die "exit code $status of the doctor"
    status=0
    timeout "$PATIENCE" l2fwd -l 1 --vfio-mode "$GENERATOR_MODE" -a "$(bdf e1000e fwd_rx)" -- -p 1 >/dev/full 2>"$WORK/full.err" || status=$?
    [ $status = 74 ] || die "exit code $status"
    [ "$(cat "$WORK/full.err")" = "vireo-l2fwd: cannot write to standard output: ENOSPC (No space left on device)" ] || die "not said"
    start_l2fwd -l 1 --vfio-mode "$GENERATOR_MODE" -a "$(bdf e1000e fwd_rx)" -- -p 1 -T 0.01
    exec 3<&-
    status=0
    wait "$L2FWD" || status=$?
    [ $status = 74 ] || die "exit code $status after the reader had gone"
    [ "$(cat "$WORK/l2fwd.err")" = "vireo-l2fwd: cannot write to standard output: EPIPE (Broken pipe)" ] || die "not said"
    : >"$WORK/l2fwd.err"
    starts_again
}
