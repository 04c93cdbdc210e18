# shellcheck shell=bash
# Chooses between KVM and software emulation. The existence of /dev/kvm proves nothing (nested and partial KVM
# are common), so a short probe boot decides. Its result is kept until the machine reboots or the guest kernel
# or QEMU changes.

ACCEL=
KVM_PROBE_SECONDS=15

accel_choose() {
    local image=$1
    case $OPT_ACCEL in
        kvm | tcg) ACCEL=$OPT_ACCEL; say "$ACCEL, as requested" ;;
        auto) accel_probe "$image" ;;
        *) fail "unknown --accel '$OPT_ACCEL'" "--accel auto, kvm or tcg" ;;
    esac
}

accel_probe() {
    local image=$1 answer
    if [[ ! -r /dev/kvm || ! -w /dev/kvm ]]; then
        ACCEL=tcg
        say "software emulation (tcg): no usable /dev/kvm"
        return
    fi
    answer="$CACHE/kvm/$(cat "$image" /proc/sys/kernel/random/boot_id <(qemu_version) | sha256sum | cut -c1-16)"
    if [[ ! -f $answer ]]; then
        mkdir -p "$CACHE/kvm"
        progress "trying KVM"
        if accel_boots_with_kvm "$image"; then echo kvm; else echo tcg; fi >"$answer.$$"
        mv "$answer.$$" "$answer"
        progress_end
    fi
    ACCEL=$(cat "$answer")
    case $ACCEL in
        kvm) say "KVM" ;;
        *) say "software emulation (tcg): /dev/kvm exists, but a probe boot with it failed" ;;
    esac
}

# In a subshell, so that the settings for the probe do not outlive it.
accel_boots_with_kvm() (
    ACCEL=kvm
    PROGRAMS=()
    ADDED=()
    OPT_NICS=none
    OPT_SHARE=
    OPT_HARNESS=
    OPT_MONITOR=
    OPT_VERBOSE=
    OPT_HUGEPAGES=0
    OPT_TIMEOUT=$KVM_PROBE_SECONDS
    KERNEL_EXTRA=()
    QEMU_EXTRA=()
    guest_boot "$1" pipe true >/dev/null 2>&1
    [[ $GUEST_STATUS == 0 ]]
)
