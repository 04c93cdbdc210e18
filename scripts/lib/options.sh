# shellcheck shell=bash
# The options of every subcommand, parsed in one place.

usage() {
    cat <<'TEXT'
scripts/lab: VFIO and IOMMUFD in a QEMU guest, for machines without an IOMMU or spare NICs

  lab compare [--json FILE] [--html FILE] [-- ARGS]  run the same forwarder in every VFIO mode and compare them
  lab count [--json FILE] [-- ARGS]                  count the instructions that each mode takes to open, map and close
  lab run [options] -- COMMAND...                    run COMMAND in the guest; its exit code is passed on
  lab shell [options]                                a busybox shell in the guest
  lab test [options]                                 the guest's tests: scripts/test --no-host, with its other options
  lab kernel [--show | --update]                     build the guest's kernel; show what is built; build the newest one, and
                                                     for --kernel edge pin it (scripts/kernel.edge)

Programs of this repository have short names: lab run -- l2fwd --help

  --kernel default|edge|PATH  Debian's 6.12, the newer one that scripts/kernel.edge pins, or a bzImage of your own
  --yes                       let apt install what is missing, and remove what conflicts with it, without asking
  --no-iommu                  boot without an IOMMU, with VFIO's unsafe no-IOMMU mode enabled
  --nics KINDS|none|tap:A,B,… KINDS: virtio-net,e1000,e1000e,igb (default: the first three, four NICs of each);
                              igb needs QEMU 8.0; on Debian 12, the lab fetches the backport for its own use;
                              tap:A,B,…: an e1000e on host interface A, a virtio-net on B and on each one after it
  --no-bind                   leave the NICs to the guest kernel's own drivers
  --no-iommu-platform         virtio-net that bypasses the IOMMU (drivers must refuse it)
  --cpus N, --mem MIB         virtual CPUs (2) and memory (2048)
  --hugepages N               2 MiB pages reserved at boot (256)
  --monitor                   give the guest access to QEMU's monitor, through its port monitor.in
  --harness DIR               sockets in DIR for the tests: a port of the guest, QEMU's monitor and the console
  --add FILE                  add a program or library of the host at its own path, with the libraries that it needs; a
                              program is also linked into PATH (repeatable)
  --references LIST|none      reference forwarders that lab compare also measures: bridge (Linux's), testpmd (DPDK's);
                              default: both, testpmd only if dpdk-testpmd is installed
  --share DIR                 mount DIR of the host, writable, at /share
  --coverage DIR              build the programs with counters of the lines that they reach; each boot writes a directory
                              of .profraw files to DIR, from which sanitize coverage --guest makes a report
  --timeout SECONDS           limit for each boot (300; none for a shell; 3600 for compare and count; 0: none)
  --icount                    let the guest's clocks count instructions, one per nanosecond, and skip idle time: one CPU,
                              software emulation
  --accel auto|kvm|tcg        auto: KVM if a probe boot shows that it works
  --no-build                  do not build the repository's programs; the guest has busybox and strace
  --qemu-arg ARG              one more argument for QEMU (repeatable)
  --kernel-arg ARG            one more argument for the guest kernel (repeatable)
  --verbose                   show the guest kernel's log

Exit code: the command's own; 124 if the time limit ended it; 125 if the lab itself failed.
TEXT
}

OPT_KERNEL=default
OPT_YES=
OPT_SHOW=
OPT_UPDATE=
OPT_IOMMU=1
OPT_NICS=virtio-net,e1000,e1000e
OPT_NICS_GIVEN=
OPT_BIND=1
OPT_IOMMU_PLATFORM=on
OPT_CPUS=2
OPT_MEM=2048
OPT_HUGEPAGES=256
OPT_SHARE=
OPT_COVERAGE=
OPT_MONITOR=
OPT_HARNESS=
OPT_TIMEOUT=
OPT_ACCEL=auto
OPT_BUILD=1
OPT_ICOUNT=
OPT_VERBOSE=
OPT_JSON=
OPT_HTML=
OPT_REFERENCES=
ADDED=()
QEMU_EXTRA=()
KERNEL_EXTRA=()
COMMAND=()

options_parse() {
    while (($#)); do
        case $1 in
            --) shift; COMMAND=("$@"); return ;;
            --kernel) OPT_KERNEL=$(option_value "$@"); shift ;;
            --nics) OPT_NICS=$(option_value "$@"); OPT_NICS_GIVEN=1; shift ;;
            --cpus) OPT_CPUS=$(option_number "$@"); shift ;;
            --mem) OPT_MEM=$(option_number "$@"); shift ;;
            --hugepages) OPT_HUGEPAGES=$(option_number "$@"); shift ;;
            --timeout) OPT_TIMEOUT=$(option_number "$@"); shift ;;
            --share) OPT_SHARE=$(option_directory "$@"); shift ;;
            --coverage) OPT_COVERAGE=$(option_directory "$@"); OPT_SHARE=$OPT_COVERAGE; shift ;;
            --harness) OPT_HARNESS=$(option_directory "$@"); shift ;;
            --add) ADDED+=("$(option_file "$@")"); shift ;;
            --accel) OPT_ACCEL=$(option_value "$@"); shift ;;
            --json) OPT_JSON=$(option_value "$@"); shift ;;
            --html) OPT_HTML=$(option_value "$@"); shift ;;
            --references) OPT_REFERENCES=$(option_references "$@"); shift ;;
            --qemu-arg) QEMU_EXTRA+=("$(option_value "$@")"); shift ;;
            --kernel-arg) KERNEL_EXTRA+=("$(option_value "$@")"); shift ;;
            --icount) options_icount ;;
            --monitor) OPT_MONITOR=1 ;;
            --yes) OPT_YES=1 ;;
            --show) OPT_SHOW=1 ;;
            --update) OPT_UPDATE=1 ;;
            --no-iommu) OPT_IOMMU= ;;
            --no-bind) OPT_BIND= ;;
            --bind) OPT_BIND=1 ;;
            --no-iommu-platform) OPT_IOMMU_PLATFORM=off ;;
            --no-build) OPT_BUILD= ;;
            --verbose) OPT_VERBOSE=1 ;;
            -h | --help) usage; exit 0 ;;
            -*) fail "unknown option '$1'" "lab --help" ;;
            *) COMMAND=("$@"); return ;;
        esac
        shift
    done
}

# QEMU's -icount, which only software emulation has. Two virtual CPUs would take turns, and each would count the
# other's instructions.
options_icount() {
    OPT_ICOUNT=1
    OPT_CPUS=1
    OPT_ACCEL=tcg
    QEMU_EXTRA+=(-icount 'shift=0,sleep=off')
}

option_value() {
    (($# > 1)) || fail "$1 needs a value" "lab --help"
    printf '%s' "$2"
}

option_number() {
    [[ ${2:-} =~ ^[0-9]+$ ]] || fail "$1 needs a number, not '${2:-}'" "lab --help"
    printf '%s' "$2"
}

option_references() {
    [[ ${2:-} =~ ^(none|(bridge|testpmd)(,(bridge|testpmd))*)$ ]] ||
        fail "$1 needs a list of bridge and testpmd, or none, not '${2:-}'" "lab --help"
    printf '%s' "$2"
}

option_directory() {
    [[ -d ${2:-} ]] || fail "$1 needs a directory, but '${2:-}' is not one" "mkdir -p '${2:-DIR}'"
    printf '%s' "$2"
}

# Symbolic links in the path are kept, because a library is found by the name of the link.
option_file() {
    [[ -f ${2:-} && -r $2 ]] || fail "$1 needs a readable file, but '${2:-}' is not one" "ls -l '${2:-FILE}'"
    realpath --no-symlinks "$2"
}

options_take_no_command() {
    ((${#COMMAND[@]} == 0)) || fail "lab $1 takes no command ('${COMMAND[0]}')" "lab --help"
}
