# shellcheck shell=bash
# DPDK's testpmd in the guest: the program and what it loads.

# What testpmd needs for the guest's NICs. It would load Debian's whole plug-in directory; in the guest that has only
# what testpmd is linked to.
TESTPMD_DRIVERS=(bus_pci bus_vdev mempool_ring net_virtio net_e1000)
TESTPMD_STDBUF=/usr/libexec/coreutils/libstdbuf.so

# Files for the guest, and the names of the plug-ins among them.
TESTPMD_FILES=()
TESTPMD_PLUGINS=()
# Of the testpmd in the guest, for the environment.
TESTPMD_VERSION=

testpmd_installed() { command -v dpdk-testpmd >/dev/null; }

# Empty where no package says it.
testpmd_version() { dpkg-query -W -f='${Version}' dpdk-dev 2>/dev/null || true; }

# testpmd_find: sets the two.
testpmd_find() {
    local abi driver library
    abi=$(ldd "$(command -v dpdk-testpmd)" | sed -n 's/^\s*librte_eal\.so\.\([^ ]*\) .*/\1/p')
    TESTPMD_PLUGINS=()
    for driver in "${TESTPMD_DRIVERS[@]}"; do
        TESTPMD_PLUGINS+=("librte_$driver.so.$abi")
    done
    TESTPMD_FILES=("$(command -v dpdk-testpmd)" "$TESTPMD_STDBUF")
    # glibc loads libgcc_s when testpmd cancels a thread.
    for library in "${TESTPMD_PLUGINS[@]}" libgcc_s.so.1; do
        TESTPMD_FILES+=("$(testpmd_library "$library")")
    done
}

# Where the dynamic linker finds it, also for other plug-ins: two copies of a bus would be two buses.
testpmd_library() {
    local path
    path=$(PATH=$PATH:/sbin ldconfig -p | awk -v name="$1" '$1 == name && !path {path = $NF} END {print path}')
    [[ -n $path ]] || fail "the dynamic linker knows no $1" "${SUDO[*]:+${SUDO[*]} }ldconfig"
    echo "$path"
}
