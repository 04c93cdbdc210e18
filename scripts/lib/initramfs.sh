# shellcheck shell=bash
# The guest's root: busybox, strace, the files of --add, scripts/guest and Vireo's programs in one
# uncompressed archive. QEMU loads it at once; unpacking a compressed one under software emulation takes
# seconds.

initramfs_build() {
    local run=$1 image=$2 root="$1/root" file
    shift 2
    mkdir -p "$root"/{bin,dev,etc,proc,root,run,share,sys,tmp,var}
    ln -s /run "$root/var/run"
    cp "$(command -v busybox)" "$root/bin/busybox"
    for file in "$SCRIPTS"/guest/*; do
        install -m 755 "$file" "$root/bin/${file##*/}"
    done
    mv "$root/bin/init" "$root/init"
    for file in "$(command -v strace)" "${ADDED[@]}"; do
        initramfs_add_file "$root" "$file"
    done
    initramfs_add_programs "$root"
    modules_add "$image" "$root"
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
    {
        initramfs_environment "$image"
        echo "exec $(shell_quote "$@")"
    } >"$root/etc/command"
    (cd "$root" && find . -print0 | cpio --null --quiet --create --format=newc --owner=+0:+0) >"$run/initrd"
    rm -rf "$root"
}

# initramfs_add_file ROOT FILE: copies FILE to its own path, with the libraries that it needs. A program is
# also linked into PATH.
initramfs_add_file() {
    local root=$1 file=$2 library
    { echo "$file"; ldd "$file" 2>/dev/null | grep -o "/[^ ]*" || true; } | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
    if [[ -x $file && ! $file =~ \.so(\.|$) && $file != /bin/* ]]; then
        ln -sf "$file" "$root/bin/${file##*/}"
    fi
}

initramfs_add_programs() {
    local program name
    for program in "${PROGRAMS[@]}"; do
        name=${program##*/}
        cp "$program" "$1/bin/$name"
        [[ $name != vireo-* || -e $1/bin/${name#vireo-} ]] || ln -s "$name" "$1/bin/${name#vireo-}"
    done
}

# Describes the environment for recordings, because the guest cannot know it.
initramfs_environment() {
    local config="${1%/*}/config"
    echo "export VIREO_LAB_ACCEL=$(shell_quote "$ACCEL")"
    echo "export VIREO_LAB_COMMAND=$(shell_quote "$LAB_COMMAND")"
    echo "export VIREO_LAB_QEMU=$(shell_quote "$(qemu_version)")"
    echo "export VIREO_LAB_HOST_CPU=$(shell_quote "$(sed -n '/^model name/{s/.*: //p;q}' /proc/cpuinfo)")"
    echo "export VIREO_LAB_HOST_CPUS=$(nproc)"
    [[ -z $TESTPMD_VERSION ]] || echo "export VIREO_LAB_DPDK=$(shell_quote "$TESTPMD_VERSION")"
    [[ -z $OPT_ICOUNT ]] || echo 'export VIREO_LAB_ICOUNT=1'
    [[ ! -f $config ]] || echo "export VIREO_LAB_KERNEL_CONFIG=$(sha256sum <"$config" | cut -c1-12)"
    echo "export VIREO_LAB_DATE=$(date -u +%FT%TZ)"
    echo "export VIREO_LAB_COMMIT=$(shell_quote "$(git -C "$REPO" describe --always --dirty 2>/dev/null || echo unknown)")"
}

# Quotes words for the guest's shell, which has no arrays and no printf %q.
shell_quote() {
    local word quoted=()
    for word; do
        quoted+=("'${word//\'/\'\\\'\'}'")
    done
    echo "${quoted[*]}"
}
