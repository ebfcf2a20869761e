#!/bin/bash
# Speed on the GPU, a JSON line for each measurement: what the device can do, the delta kernel alone, decoding with
# 1 to 64 tenants, training; then torch's training at the same shapes, where torch with CUDA is installed. A part
# that fails is said on stderr, the others go on; the exit status is 1 then.
#
# usage: tests/bench/bench_gpu.sh PROGRAM
# BENCH_SHAPES    ("0.5b 1b 8b"); "tiny" is for the test shim
# BENCH_SECONDS   for everything together (470); what would begin later is left out, visibly
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

program=$1
shapes=${BENCH_SHAPES:-0.5b 1b 8b}
largest=${shapes##* }
limit=${BENCH_SECONDS:-470}
status=0

part() {
    local left=$((limit - SECONDS))
    if [ "$left" -le 5 ]; then
        printf 'bench: %s: left out, the %s seconds are over\n' "$*" "$limit" >&2
    elif ! timeout "$left" "$@"; then
        printf 'bench: %s: no result\n' "$*" >&2
        status=1
    fi
}

part "$program" ceilings "$largest"
part "$program" delta "$largest"
part "$program" decode "$largest"
for shape in $shapes; do
    part "$program" train "$shape"
done
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    for shape in $shapes; do
        part python3 tests/bench/bench_torch.py "$shape"
    done
else
    echo "bench: torch with CUDA is not installed: no comparison" >&2
fi
exit "$status"
