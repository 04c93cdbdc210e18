# shellcheck shell=bash
# A distribution's kernel (--kernel PATH) has as modules what the lab's kernel has built in. They are searched
# where the kernel's package puts them: next to the image (also in an unpacked package), else in /lib/modules.

MODULES_WANTED=(virtio_pci virtio_console 9p 9pnet_virtio virtio_net e1000 e1000e bridge iommufd vfio vfio_iommu_type1
    vfio_pci)

# Puts the modules into /modules of the guest in load order, because insmod resolves no dependencies.
modules_add() {
    local image=$1 root=$2 release base file name number=100
    release=$(kernel_release "$image")
    for base in "$(dirname "$(dirname "$(readlink -f "$image")")")" / ''; do
        [[ -n $base ]] || return 0
        [[ ! -d $base/lib/modules/$release ]] || break
    done
    [[ -f $base/lib/modules/$release/modules.dep ]] ||
        fail "$base/lib/modules/$release has no modules.dep" "depmod -b '$base' $release"
    need_packages kmod
    mkdir "$root/modules"
    modules_in_order "$base" "$release" | while read -r file; do
        name=${file##*/}
        number=$((number + 1))
        case $name in
            *.xz) xz -dc "$file" >"$root/modules/$number-${name%.xz}" ;;
            *.zst) need_packages zstd && zstd -qdc "$file" >"$root/modules/$number-${name%.zst}" ;;
            *.gz) gzip -dc "$file" >"$root/modules/$number-${name%.gz}" ;;
            *) cp "$file" "$root/modules/$number-$name" ;;
        esac
    done
}

# Lists the modules in load order. A module that is built in, or that this kernel does not have, has no file
# and is left out.
modules_in_order() {
    local module
    for module in "${MODULES_WANTED[@]}"; do
        /sbin/modprobe --dirname "$1" --set-version "$2" --show-depends "$module" 2>/dev/null || true
    done | awk '$1 == "insmod" && !seen[$2]++ {print $2}'
}
