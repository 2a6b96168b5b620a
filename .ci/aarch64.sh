#!/usr/bin/env bash
# The kernels' own tests on 64-bit ARM under qemu, on every tier that it has: i8mm, dotprod, neon, portable.
#
# usage: .ci/aarch64.sh
#
# Needs Debian on x86-64, and root or sudo the first time: a cross linker and qemu are installed. Rust's compiler for the
# target is only unpacked, into AARCH64_CACHE (~/.cache/genie-aarch64 if not set), where the next run finds it together
# with what it built. A toolchain of rustup's that has the target already is used instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=aarch64-unknown-linux-gnu
cache=${AARCH64_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/genie-aarch64}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

main() {
    command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64-static >/dev/null \
        && [ -e /usr/aarch64-linux-gnu/include/stdlib.h ] || install_linker
    if [ ! -d "$(rustc --print target-libdir --target $target)" ]; then
        [ -e "$cache/compiler/ready" ] || unpack_compiler
        compiler_wrapper
        export RUSTC=$cache/rustc
    fi
    export CARGO_TARGET_DIR=$cache/target
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    # Every extension that qemu knows. The tests go through all tiers; naming the best one makes sure that it is there.
    run_tests max i8mm --lib --test no_allocation
    # A CPU with NEON alone.
    run_tests cortex-a72 neon --lib -- kernels:: attention::
}

run_tests() { # CPU TIER ARGUMENTS...
    local runner="qemu-aarch64-static -cpu $1 -L /usr/aarch64-linux-gnu" tier=$2
    shift 2
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=$runner HTP_SIM_ISA=$tier \
        cargo test --locked --package htp-sim --target $target "$@"
}

install_linker() {
    echo "installing gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static"
    as_root apt-get update -q >/dev/null
    as_root apt-get install -y -q gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static >/dev/null
}

# Debian's own compiler and its library for the target, beside whatever is installed.
unpack_compiler() {
    command -v apt-get >/dev/null || fail "no apt-get here, and no Rust toolchain with $target"
    echo "unpacking Rust for $target into $cache"
    rm -rf "$cache/compiler"
    mkdir -p "$cache/lists/partial" "$cache/compiler/packages"
    local options=(-oAPT::Architecture=amd64 -oAPT::Architectures::=amd64 -oAPT::Architectures::=arm64
        "-oDir::State::Lists=$cache/lists")
    as_root apt-get "${options[@]}" -q update >/dev/null
    local libraries
    libraries=$(apt-cache "${options[@]}" depends --recurse --important rustc-web 2>/dev/null \
        | grep -xE 'libstd-rust-web-[0-9.]+|libllvm[0-9.]+' | sort -u) || fail "the package sources have no rustc-web"
    (
        cd "$cache/compiler/packages"
        # shellcheck disable=SC2086 # one word for each library
        apt-get "${options[@]}" -q download rustc-web libstd-rust-web-dev libstd-rust-web-dev:arm64 $libraries
        for package in *.deb; do dpkg -x "$package" ../root; done
        rm -- *.deb
    )
    touch "$cache/compiler/ready"
}

compiler_wrapper() {
    local root=$cache/compiler/root/usr
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%q exec %q "$@"\n' "$root/lib/x86_64-linux-gnu" "$root/bin/rustc" >"$cache/rustc"
    chmod +x "$cache/rustc"
}

as_root() {
    command -v "$1" >/dev/null || fail "no $1 here; a cross compiler for $target and qemu-aarch64-static are needed"
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi || fail "could not run as root: $*"
}

fail() {
    printf '.ci/aarch64.sh: %s\n' "$1" >&2
    exit 1
}

main
