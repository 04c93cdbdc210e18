# shellcheck shell=bash
# DPDK's testpmd for the guest: the program and the files that it loads.

# Drivers that testpmd needs for the guest's NICs. It would load Debian's whole plug-in directory, which in
# the guest has only the libraries that testpmd is linked to.
TESTPMD_DRIVERS=(bus_pci bus_vdev mempool_ring net_virtio net_e1000)
TESTPMD_STDBUF=/usr/libexec/coreutils/libstdbuf.so

# Files for the guest, and the names of the plug-ins among them.
TESTPMD_FILES=()
TESTPMD_PLUGINS=()
# Version of the testpmd in the guest, for the guest's environment.
TESTPMD_VERSION=

testpmd_installed() { command -v dpdk-testpmd >/dev/null; }

# Prints nothing if no package provides testpmd.
testpmd_version() { dpkg-query -W -f='${Version}' dpdk-dev 2>/dev/null || true; }

# testpmd_find: sets TESTPMD_FILES and TESTPMD_PLUGINS.
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

# Prints the path at which the dynamic linker finds a library, also for other plug-ins: two copies of a bus
# would be two buses.
testpmd_library() {
    local path
    path=$(PATH=$PATH:/sbin ldconfig -p | awk -v name="$1" '$1 == name && !path {path = $NF} END {print path}')
    [[ -n $path ]] || fail "the dynamic linker does not find $1" "${SUDO[*]:+${SUDO[*]} }ldconfig"
    echo "$path"
}
