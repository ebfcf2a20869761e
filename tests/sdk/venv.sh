#!/bin/bash
# Makes a virtual environment with the official openai SDK below .cache/, once for each version of
# requirements.txt, and prints its python. Its last line of output says why when it can not.
set -euo pipefail
cd "$(dirname "$0")/../.."

requirements=tests/sdk/requirements.txt
python=${PYTHON:-python3}
name=$( (cat "$requirements" && "$python" --version) | sha256sum | cut -c1-12)
venv=${GRAFT_CACHE:-.cache}/sdk-$name

if [ ! -e "$venv/complete" ]; then
    rm -rf "$venv"
    if ! words=$("$python" -m venv "$venv" 2>&1); then
        printf '%s\n%s\n' "$words" "python3 can not make a virtual environment: is python3-venv installed? (make deps)"
        exit 1
    fi
    if ! words=$("$venv/bin/python" -m pip --disable-pip-version-check --quiet install -r "$requirements" 2>&1); then
        printf '%s\n%s\n' "$words" "pip can not install $requirements: no package index in reach?"
        rm -rf "$venv"
        exit 1
    fi
    touch "$venv/complete"
fi
[[ $venv = /* ]] || venv=$PWD/$venv
printf '%s\n' "$venv/bin/python"
