#!/bin/bash
# Installs the packages that Graft needs from the distribution: Debian 12 and Ubuntu 24.04, by the same names.
#
# usage: tests/deps/install.sh build|all [--list]
#
#   build   what building, serving and the demo need
#   all     and what the tests need on top
#   --list  print the names and install nothing
#
# Says what it installs; does nothing, without asking for rights, when all is there. Needs root or sudo;
# without either it prints the command for somebody who has them, and ends with 1. No existing PostgreSQL
# cluster is touched and none is made: Graft starts its own, in its data directory.
set -euo pipefail

build_packages=(
    gcc libc6-dev make pkg-config
    libmicrohttpd-dev libjansson-dev libopenblas-dev libpq-dev libssl-dev libpcre2-dev zlib1g-dev
    postgresql
    curl ca-certificates python3 python3-pip # the demo: client, and pip to fetch the model
)
test_packages=(
    libcmocka-dev
    g++ # the CUDA kernels on the test shim
    clang clang-format llvm # second compiler, libFuzzer, and readable sanitizer reports
    shellcheck git
    python3-yaml # openapi.yaml and compose.yaml
    debootstrap # make test-docker, where no docker daemon is at hand
    python3-venv # the openai SDK lives in a virtual environment below .cache/
)

say() { printf '%s\n' "$*" >&2; }

installed() {
    dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed
}

# The sanitizer runtimes of clang are a package of clang's own version, whatever the distribution's is.
clang_runtime() {
    local version
    version=$(apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9][0-9]*\)$/\1/p' | head -n 1)
    [ -z "$version" ] || printf 'libclang-rt-%s-dev\n' "$version"
}

# Quiet unless it fails: then all its words.
apt_get() {
    local words
    if ! words=$("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -o DPkg::Lock::Timeout=300 -q -y "$@" 2>&1); then
        say "$words"
        return 1
    fi
}

# Debian's server package makes and starts a cluster when it is installed. Where PostgreSQL is new to this
# machine, a drop-in says not to, for as long as the installation lasts.
no_cluster=/etc/postgresql-common/createcluster.d/graft-no-cluster.conf
forbid_cluster() {
    "${as_root[@]}" mkdir -p "${no_cluster%/*}"
    printf 'create_main_cluster = false\n' | "${as_root[@]}" tee "$no_cluster" >/dev/null
}
allow_cluster() {
    "${as_root[@]}" rm -f "$no_cluster"
    "${as_root[@]}" rmdir --ignore-fail-on-non-empty "${no_cluster%/*}" 2>/dev/null || true
}

what=${1:-}
case "$what" in
build) wanted=("${build_packages[@]}") ;;
all) wanted=("${build_packages[@]}" "${test_packages[@]}") ;;
*)
    say "usage: tests/deps/install.sh build|all [--list]"
    exit 2
    ;;
esac
if [ "${2:-}" = --list ]; then
    printf '%s\n' "${wanted[@]}"
    exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    say "this is neither Debian nor Ubuntu: install the like of these by hand: ${wanted[*]}"
    exit 1
fi

missing=()
for package in "${wanted[@]}"; do
    installed "$package" || missing+=("$package")
done
if [ "$what" = all ]; then
    runtime=$(clang_runtime)
    # Unknown until the package lists are there; asked again below.
    if [ -n "$runtime" ] && ! installed "$runtime"; then
        missing+=("$runtime")
    fi
fi
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" = 0 ]; then
    as_root=()
elif command -v sudo >/dev/null; then
    as_root=(sudo)
else
    say "these packages are missing, and installing them takes root or sudo. Have this run:"
    say "    apt-get install --no-install-recommends ${missing[*]}"
    exit 1
fi

say "Installing from the distribution: ${missing[*]}"
apt_get update || exit 1
if [ "$what" = all ]; then
    runtime=$(clang_runtime)
    if [ -n "$runtime" ] && ! installed "$runtime" && [[ " ${missing[*]} " != *" $runtime "* ]]; then
        missing+=("$runtime")
    fi
fi
if [[ " ${missing[*]} " == *" postgresql "* ]] && [ ! -e /etc/postgresql ] && [ ! -e "$no_cluster" ]; then
    trap allow_cluster EXIT
    forbid_cluster
fi
if ! apt_get install --no-install-recommends "${missing[@]}"; then
    say "apt-get could not install them; its words are above"
    exit 1
fi
