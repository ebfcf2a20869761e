#!/bin/bash
# Runs the programs it is given on the GPU, then under compute-sanitizer's memcheck and racecheck where that is
# installed. Ends with `N passed, N failed, N skipped`; exit status 0 only when nothing failed.
#
# usage: tests/gpu/check_gpu.sh PROGRAM...
# CHECK_SECONDS   for everything together (460); what would begin later is skipped, visibly
# CHECK_TOOLS     of compute-sanitizer ("memcheck racecheck")
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

limit=${CHECK_SECONDS:-460}
passed=0
failed=0
skipped=0

left() { echo $((limit - SECONDS)); }

skip() {
    printf 'skipped %s: %s\n' "$1" "$2"
    skipped=$((skipped + 1))
}

# case NAME COMMAND...: one case, with its output when it fails.
case_of() {
    local name=$1 began=$SECONDS out
    shift
    if [ "$(left)" -le 5 ]; then
        skip "$name" "the $limit seconds are over"
        return
    fi
    if out=$(timeout "$(left)" "$@" 2>&1); then
        printf 'ok      %s (%d s)\n' "$name" $((SECONDS - began))
        grep -E '^  skipped' <<<"$out"
        passed=$((passed + 1))
    elif [ "$(left)" -le 0 ]; then
        skip "$name" "it did not end within the $limit seconds"
    else
        printf 'FAILED  %s (%d s)\n%s\n' "$name" $((SECONDS - began)) "$(tail -n 40 <<<"$out")"
        failed=$((failed + 1))
    fi
}

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
for program in "$@"; do
    case_of "${program##*/}" "$program"
done

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
for tool in ${CHECK_TOOLS-memcheck racecheck}; do
    for program in "$@"; do
        if [ -z "$sanitizer" ]; then
            skip "$tool ${program##*/}" "compute-sanitizer is not installed"
        elif [ "$tool" = memcheck ]; then
            case_of "$tool ${program##*/}" "$sanitizer" --tool memcheck --leak-check full --error-exitcode 9 "$program"
        else
            case_of "$tool ${program##*/}" "$sanitizer" --tool racecheck --racecheck-report all --error-exitcode 9 "$program"
        fi
    done
done
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
