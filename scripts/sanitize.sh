#!/usr/bin/env bash
# Run the core's own tests plain and under each sanitizer. Needs cmake and a C++17 compiler with its sanitizer libraries.
# CXX=clang++ runs them with another compiler.
set -eu -o pipefail
cd "$(dirname "$0")/.."

for sanitizer in "" ${*:-address undefined thread}; do
  build=build/core-${CXX:+$(basename "$CXX")-}${sanitizer:-plain}
  echo "core tests: ${sanitizer:-plain}"
  cmake -S . -B "$build" -DCKPT_PYTHON=OFF -DCKPT_TESTS=ON -DCKPT_SANITIZE="$sanitizer" -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null
  cmake --build "$build" --parallel "${CKPT_BUILD_JOBS:-2}" >/dev/null
  ctest --test-dir "$build" --output-on-failure --timeout 300 | tail -n 4
done
