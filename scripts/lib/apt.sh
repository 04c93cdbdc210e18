# shellcheck shell=bash
# Packages of the machine itself: installed only with the user's consent, and only by apt. On a machine
# without apt, the user installs them.

SUDO=()
((EUID == 0)) || SUDO=(sudo)

# For machines without apt: the program or library file that shows that a package is installed. A package that
# is not listed has a program of the same name.
declare -A PACKAGE_HAS=(
    [busybox-static]=busybox
    [qemu-system-x86]=qemu-system-x86_64
    [libc6-dev]=/usr/include/stdio.h
    [libelf-dev]=/usr/include/libelf.h
    [xz-utils]=xz
    [kmod]=modprobe
    [dpdk-dev]=dpdk-testpmd
    [libdpdk-dev]=/usr/include/dpdk/rte_eal.h
    [libbsd-dev]=/usr/include/bsd/bsd.h
    [libnuma-dev]=/usr/include/numa.h
)

apt_available() { command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; }

# Prints the name of this machine's distribution.
distribution() {
    # shellcheck disable=SC1091
    (. /etc/os-release 2>/dev/null && echo "${PRETTY_NAME:-$NAME}") || echo "a system without /etc/os-release"
}

# packages_elsewhere PACKAGE...: fails if the program or file of one of the packages is missing.
packages_elsewhere() {
    local package has missing=() packages=()
    for package; do
        has=${PACKAGE_HAS[$package]:-$package}
        [[ $has == /* && -e $has ]] || command -v "$has" >/dev/null || {
            missing+=("$has")
            packages+=("$package")
        }
    done
    ((${#missing[@]} == 0)) ||
        fail "this machine has no ${missing[*]}, and no apt to install it with ($(distribution))" \
            "install the packages that Debian calls ${packages[*]}"
}

package_installed() {
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

package_candidate() {
    LC_ALL=C apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" {print $2}'
}

# apt_consent QUESTION COMMAND: asks the user, unless --yes is given. Without a terminal it fails and names
# COMMAND.
apt_consent() {
    [[ -z $OPT_YES ]] || return 0
    if [[ -t 0 && -t 2 ]]; then
        local answer
        read -rp "$ME: $1? [Y/n] " answer
        [[ $answer != [nN]* ]] || fail "cannot $1: declined" "$2"
    else
        fail "cannot $1: there is no terminal to ask on, and --yes is not given" "$2"
    fi
}

# The caller must first rule out programs that were installed without apt (rustup's cargo, a hand-built QEMU).
need_packages() {
    local package missing=()
    if ! apt_available; then
        packages_elsewhere "$@"
        return
    fi
    for package; do
        package_installed "$package" || missing+=("$package")
    done
    ((${#missing[@]})) || return 0

    local command="${SUDO[*]:+${SUDO[*]} }apt-get install -y --no-install-recommends ${missing[*]}"
    apt_consent "install ${missing[*]} with apt" "$command"
    refresh_if_unknown "${missing[@]}"

    # Ask before apt removes a package that the user chose: a QEMU of Debian's backports conflicts with the
    # release's.
    local log="$CACHE/apt.log" removed
    removed=$(LC_ALL=C apt-get install --simulate --no-install-recommends "${missing[@]}" 2>/dev/null |
        awk '$1 == "Remv" {printf "%s ", $2}') || : # the installation says why
    if [[ -n $removed ]]; then
        apt_consent "remove ${removed% }, which conflicts with ${missing[*]}" "$command"
        say "apt removes ${removed% }, which conflicts with ${missing[*]}"
    fi
    progress "installing ${missing[*]}"
    "${SUDO[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        "${missing[@]}" >"$log" 2>&1 || fail "apt could not install ${missing[*]} (log: $log)" "$command"
    progress_end
}

# A fresh machine or container often has no package lists at all.
refresh_if_unknown() {
    local package
    for package; do
        [[ -z $(package_candidate "$package") ]] || continue
        refresh_lists
        return
    done
}

refresh_lists() {
    progress "reading apt's package lists"
    "${SUDO[@]}" apt-get update >"$CACHE/apt.log" 2>&1 ||
        fail "apt-get update failed (log: $CACHE/apt.log)" "${SUDO[*]:+${SUDO[*]} }apt-get update"
    progress_end
}

release_codename() {
    # shellcheck disable=SC1091
    (. /etc/os-release && echo "${VERSION_CODENAME:-}")
}

# Packages newer than the machine's release come through a private apt. It neither reads nor writes the
# machine's sources, lists and pins; it uses only the machine's keyring and mirror.
DEBIAN_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# Prints the mirror that the machine's own sources name for its release (the security archive has no other
# suites).
debian_mirror() {
    local codename mirror
    codename=$(release_codename)
    [[ -n $codename ]] || fail "/etc/os-release names no Debian release, so the mirror is unknown" "--kernel PATH"
    # shellcheck disable=SC2016  # the parentheses are apt's
    mirror=$(LC_ALL=C apt-get indextargets --format '$(SITE) $(RELEASE) $(CODENAME)' 'Created-By: Packages' |
        awk -v suite="$codename" '$2 == suite || $3 == suite {mirror = $1} END {print mirror}')
    [[ -n $mirror ]] || fail "no Debian mirror in this machine's apt sources" "apt-get update, or --kernel PATH"
    echo "$mirror"
}

# apt_private DIR TOOL ARGUMENT...: runs TOOL on the private apt in DIR.
apt_private() {
    local dir=$1 tool=$2
    shift 2
    "$tool" -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o Dir::State="$dir/state" -o Dir::State::status=/dev/null -o Dir::Cache="$dir/cache" \
        -o APT::Architecture=amd64 -o APT::Sandbox::User=root -o Debug::NoLocking=1 "$@"
}

# apt_private_lists DIR MIRROR SUITE LOG: empties DIR and reads the lists of SUITE into it.
apt_private_lists() {
    local dir=$1 mirror=$2 suite=$3 log=$4
    [[ -r $DEBIAN_KEYRING ]] || need_packages debian-archive-keyring
    rm -rf "$dir"
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    echo "deb [signed-by=$DEBIAN_KEYRING] $mirror $suite main" >"$dir/sources.list"
    apt_private "$dir" apt-get update >"$log" 2>&1
}
