# shellcheck shell=bash
# Builds the repository's programs as static executables, so that the guest needs no libraries for them.

TARGET=x86_64-unknown-linux-gnu
PROGRAMS=()

programs_build() {
    PROGRAMS=()
    [[ -n $OPT_BUILD ]] || return 0
    [[ -f $REPO/Cargo.toml ]] || fail "there is no Cargo.toml in $REPO, so there are no programs to build" "lab run --no-build"
    need_cargo
    programs_compile
    ((${#PROGRAMS[@]})) || fail "cargo built no vireo-* executable in $REPO" "lab run --no-build"
}

# Uses a separate target directory, because other RUSTFLAGS in the usual one would invalidate every plain
# build. An explicit --target keeps the flags away from proc macros, which cannot be linked statically. Only the
# examples that the guest runs are built: the others take a sixth of the time.
programs_compile() {
    local built="$WORK/programs.json" flags="${RUSTFLAGS:-} -C target-feature=+crt-static" directory="$REPO/target/guest"
    if [[ -n ${OPT_COVERAGE:-} ]]; then
        # Counters in a mapped file survive when the process is killed.
        flags+=" -C instrument-coverage -C llvm-args=-runtime-counter-relocation"
        directory+=-coverage
    fi
    RUSTFLAGS=$flags cargo build --manifest-path "$REPO/Cargo.toml" \
        --profile lab --locked --workspace --bins --example 'vireo-*' --target "$TARGET" --target-dir "$directory" \
        --message-format json-render-diagnostics >"$built" ||
        fail "cargo could not build the guest's programs (its message is above)"
    mapfile -t PROGRAMS < <(grep -o '"executable":"[^"]*/vireo-[^"/]*"' "$built" | cut -d'"' -f4 | sort -u)
}

# programs_find NAME: prints the path of a program. The host runs the same executable as the guest for
# reports.
programs_find() {
    local program
    for program in "${PROGRAMS[@]}"; do
        if [[ ${program##*/} == "$1" ]]; then
            echo "$program"
            return
        fi
    done
    fail "the workspace has no program $1" "cargo build --bin $1"
}

# Prints nothing if there is no cargo.
cargo_version() { { cargo --version 2>/dev/null || true; } | awk '{print $2}'; }

need_cargo() {
    local wanted version package
    need_packages gcc libc6-dev
    wanted=$(sed -n '/^rust-version *=/{s/.*"\(.*\)".*/\1/p;q}' "$REPO/Cargo.toml")
    version=$(cargo_version)
    if [[ -n $version ]] && version_at_least "$version" "$wanted"; then
        return 0
    fi

    if command -v rustup >/dev/null; then
        fail "cargo $wanted or newer is needed, but this machine has ${version:-none}" "rustup update stable && rustup default stable"
    fi
    package=$(cargo_package "$wanted")
    if [[ -z $package ]] && apt_available; then
        apt_consent "read apt's package lists to find cargo $wanted" "${SUDO[*]:+${SUDO[*]} }apt-get update"
        refresh_lists
        package=$(cargo_package "$wanted")
    fi
    [[ -n $package ]] || fail "cargo $wanted or newer is needed, but this machine has ${version:-none}, and apt has none that is new enough" \
        "install rustup (package rustup, or rustup.rs), then: rustup default stable"
    need_packages "${package/cargo/rustc}" "$package"
    hash -r
    [[ -n $(cargo_version) ]] || fail "the package $package is installed, but there is no cargo in PATH" "PATH=/usr/bin:\$PATH $0"
}

# cargo_package VERSION: prints apt's package of cargo VERSION or newer, if there is one. Debian keeps a
# current Rust for its browsers.
cargo_package() {
    local package version
    for package in cargo-web cargo; do
        version=$(package_candidate "$package")
        if [[ -n $version ]] && version_at_least "$version" "$1"; then
            echo "$package"
            return
        fi
    done
}

# Installs cargo fmt and cargo clippy for apt's cargo. rustup installs them for its own.
need_components() {
    ! package_installed cargo-web || need_packages rustfmt-web rust-web-clippy
    ! package_installed cargo || need_packages rustfmt rust-clippy
}
