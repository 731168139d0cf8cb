#!/usr/bin/env bash
# Runs every kernel under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer: any report fails.
# The latter without OpenMP, whose runtime's synchronization it cannot see, so on launch.cpp's own threads.
# Usage: run.sh [address | thread]; PYTHON needs setuptools, pybind11 and ninja.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
common="-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
export ASAN_OPTIONS="abort_on_error=0:exitcode=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
export UBSAN_OPTIONS="print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}"
export TSAN_OPTIONS="halt_on_error=1:exitcode=1${TSAN_OPTIONS:+:$TSAN_OPTIONS}"

check() {
  local name=$1 amount=$2 flags=$3
  shift 3
  local folder=build/sanitize.$name start=$SECONDS
  echo "== $name: $flags"
  CXXFLAGS="$common $flags" PYTHONPATH=. "$python" tests/sanitize/build.py "$folder"
  echo "== $name: built in $((SECONDS - start)) s"
  start=$SECONDS
  "$@" "$folder/driver" "$amount"
  echo "== $name: no report, $((SECONDS - start)) s"
}

for name in ${1:-address thread}; do
  case $name in
    address) check address all "-fsanitize=address,undefined" ;;
    # Without address randomization: its shadow memory does not fit every layout.
    thread) check thread few "-fsanitize=thread -fno-openmp" setarch -R ;;
    *) echo "address or thread, not $name" >&2; exit 2 ;;
  esac
done
