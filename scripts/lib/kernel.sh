# shellcheck shell=bash
# The guest kernel: built once per source version and configuration, then cached. No Debian kernel has
# IOMMUFD, so the lab builds Debian's source package with its own configuration.

KERNEL_CONFIG="$SCRIPTS/kernel.config"
KERNEL_PACKAGES=(make gcc libc6-dev flex bison bc libelf-dev xz-utils)

# Options that the final configuration must have. A kernel source that silently dropped one would make every
# test of it meaningless.
KERNEL_MUST_HAVE=(IOMMUFD VFIO_DEVICE_CDEV VFIO_GROUP VFIO_CONTAINER VFIO_NOIOMMU VFIO_PCI INTEL_IOMMU
    E1000 E1000E VIRTIO_NET VIRTIO_CONSOLE BRIDGE 9P_FS HUGETLBFS NUMA ACPI_NUMA)

# Number of lines that a build prints, counted once on 6.12 and 7.3: make does not know its total beforehand.
KERNEL_STEPS=1950

version_at_least() { [[ $(printf '%s\n' "$2" "$1" | sort -V | tail -n1) == "$1" ]]; }

kernel_config_id() { sha256sum <"$KERNEL_CONFIG" | cut -c1-12; }

# kernel_cached 6.12|7.: prints the newest cached kernel that was built with the current configuration.
kernel_cached() {
    local id
    id=$(kernel_config_id)
    mkdir -p "$CACHE/kernel"
    find "$CACHE/kernel" -mindepth 2 -maxdepth 2 -path "$CACHE/kernel/$1*-$id/bzImage" | sort -V | tail -n1
}

# kernel_path SELECTOR: prints the path of the image, and builds it if necessary. A cached kernel is used even
# if the archive has a newer one, so that runs need no network and do not wait for a build.
kernel_path() {
    local source image
    case $1 in
        default | edge) ;;
        *)
            [[ -f $1 ]] || fail "no kernel image at '$1'" "--kernel default, --kernel edge or the path of a bzImage"
            echo "$1"
            return
            ;;
    esac
    image=$(kernel_chosen "$1")
    if [[ -n $image ]]; then
        echo "$image"
        return
    fi
    source=$(kernel_source "$1")
    kernel_build "$1" "${source% *}" "${source#* }"
}

# kernel_chosen default|edge: prints the cached image, if there is one. For edge this is the pinned version,
# else the one that was built because the archive no longer had the pinned version.
kernel_chosen() {
    local image=
    case $1 in
        default) kernel_cached 6.12 ;;
        edge)
            image=$(kernel_cached "$(edge_pinned_version)")
            if [[ -n $image ]]; then echo "$image"; else kernel_cached 7.; fi
            ;;
    esac
}

# kernel_source default|edge [newest]: prints "PACKAGE VERSION".
kernel_source() {
    apt_available || fail "the guest's kernel is built from Debian's source package, but there is no apt ($(distribution))" \
        "--kernel PATH, with a bzImage built with the options of scripts/kernel.config"
    if [[ $1 == edge ]]; then
        if [[ ${2:-} == newest ]]; then edge_newest; else edge_source; fi
        return
    fi
    local version
    version=$(package_candidate linux-source-6.12)
    if [[ -z $version ]]; then
        apt_consent "read apt's package lists to find linux-source-6.12" "${SUDO[*]:+${SUDO[*]} }apt-get update"
        refresh_if_unknown linux-source-6.12
        version=$(package_candidate linux-source-6.12)
    fi
    [[ -n $version ]] || fail "apt offers no linux-source-6.12 (Debian 12 and 13 have it)" "--kernel PATH"
    echo "linux-source-6.12 $version"
}

kernel_build() {
    local kind=$1 package=$2 version=$3 final lock
    final="$CACHE/kernel/$version-$(kernel_config_id)"
    mkdir -p "$CACHE/kernel"
    exec {lock}>"$CACHE/kernel/lock"
    if ! flock -n "$lock"; then
        say "another lab is building a kernel; waiting for it"
        flock "$lock"
    fi
    if [[ ! -f $final/bzImage ]]; then
        need_packages "${KERNEL_PACKAGES[@]}"
        kernel_build_locked "$kind" "$package" "$version" "$final"
    fi
    exec {lock}>&-
    echo "$final/bzImage"
}

kernel_build_locked() {
    local kind=$1 package=$2 version=$3 final=$4 work="$CACHE/kernel/building" log="$CACHE/kernel/build-$1.log" began=$SECONDS
    rm -rf "$work"
    mkdir -p "$work/download" "$work/source"
    : >"$log"

    progress "kernel $version: download"
    kernel_download "$kind" "$package=$version" "$work/download" >>"$log" 2>&1 ||
        fail "could not download $package $version (log: $log)" "${SUDO[*]:+${SUDO[*]} }apt-get update"
    progress "kernel $version: unpack"
    {
        dpkg-deb -x "$work"/download/*.deb "$work/download" &&
            tar -xf "$work/download/usr/src/$package.tar.xz" -C "$work/source" --strip-components=1
    } >>"$log" 2>&1 || fail "could not unpack $package into $work (log: $log)" "df -h $CACHE"

    progress "kernel $version: configure"
    kernel_configure "$work/source" >>"$log" 2>&1 || fail "kernel $version could not be configured (log: $log)"
    kernel_check_config "$work/source" "$version"
    kernel_compile "$work/source" "$version" "$log" ||
        fail "kernel $version did not build: $(grep -m1 -E 'error|Error' "$log" || tail -n1 "$log") (log: $log)"

    mkdir "$work/done"
    mv "$work/source/arch/x86/boot/bzImage" "$work/done/bzImage"
    mv "$work/source/.config" "$work/done/config"
    mv "$log" "$work/done/build.log"
    # One rename, so that no lab finds a half-built kernel.
    mv -T "$work/done" "$final"
    rm -rf "$work"
    progress_end
    say "kernel $version built in $(elapsed $((SECONDS - began)))"
}

kernel_download() {
    cd "$3" || return
    if [[ $1 == edge ]]; then
        edge_apt apt-get download "$2"
    else
        apt-get -o APT::Sandbox::User=root download "$2"
    fi
}

# Later lines win, so kernel.config overrides tinyconfig.
kernel_configure() {
    make -C "$1" ARCH=x86_64 tinyconfig &&
        cat "$KERNEL_CONFIG" >>"$1/.config" &&
        make -C "$1" ARCH=x86_64 olddefconfig
}

kernel_check_config() {
    local option
    for option in "${KERNEL_MUST_HAVE[@]}"; do
        grep -q "^CONFIG_$option=y" "$1/.config" ||
            fail "kernel $2 dropped CONFIG_$option from scripts/kernel.config (result: $1/.config)"
    done
}

kernel_compile() {
    local dir=$1 version=$2 log=$3 began=$SECONDS make_pid steps percent
    make -C "$dir" ARCH=x86_64 -j"$(nproc)" bzImage >>"$log" 2>&1 &
    make_pid=$!
    # An interrupted lab must not leave two cores compiling.
    trap 'kill "$make_pid" 2>/dev/null' EXIT
    while kill -0 "$make_pid" 2>/dev/null; do
        steps=$(grep -cE '^  [A-Z]' "$log" || true)
        percent=$((steps * 100 / KERNEL_STEPS))
        progress "kernel $version: $((percent < 99 ? percent : 99))%, $(elapsed $((SECONDS - began)))"
        sleep 1
    done
    trap - EXIT
    wait "$make_pid"
}

kernel_describe() { echo "$(kernel_release "$1") $1"; }

kernel_show() {
    local image
    case $1 in
        default | edge) image=$(kernel_chosen "$1") ;;
        *) image=$(kernel_path "$1") ;;
    esac
    [[ -n $image ]] || fail "the $1 kernel is not built for the current scripts/kernel.config" "lab kernel --kernel $1"
    kernel_describe "$image"
}

# Reads the release string from the image's own header, which works for a kernel of any origin.
kernel_release() {
    local offset
    offset=$(($(od -An -tu2 -j526 -N2 "$1") + 512))
    dd if="$1" bs=1 skip="$offset" count=128 status=none | tr '\0' '\n' | awk 'NR == 1 {print $1}'
}
