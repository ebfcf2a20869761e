#!/bin/bash
# make demo: from a checkout on a bare machine to a fine-tune that answers, in one command.
#
# Installs what is missing (saying what), then hands over to demo.py, which builds, fetches a small model,
# serves it, and fine-tunes it over the HTTP API.
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/deps/install.sh build
exec python3 tests/demo/demo.py "$@"
