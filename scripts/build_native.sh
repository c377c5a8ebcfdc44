#!/usr/bin/env bash
# Build the native core with the given Python (default: the tree's .venv, else python3 on PATH) and put the module into
# ckpt/kernels/ of this tree, where `PYTHONPATH=<tree>` and editable installs find it. Needs a C++17 compiler, and cmake and
# nanobind, both of which pip can install.
set -eu -o pipefail
cd "$(dirname "$0")/.."

if [ -n "${1:-}" ]; then
  python=$1
elif [ -n "${VIRTUAL_ENV:-}" ]; then
  python=$VIRTUAL_ENV/bin/python
elif [ -x .venv/bin/python ]; then
  python=$PWD/.venv/bin/python
else
  python=$(command -v python3)
fi

scripts_dir=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PATH=$scripts_dir:$PATH
tag=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi

mkdir -p build
log=build/native.log
build=build/native-$tag
cmake -S . -B "$build" "${generator[@]}" -DCKPT_IN_PLACE=ON -DPython_EXECUTABLE="$python" -DCMAKE_BUILD_TYPE=Release \
  >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
cmake --build "$build" --parallel "${CKPT_BUILD_JOBS:-2}" >>"$log" 2>&1 || { cat "$log" >&2; exit 1; }
cmake --install "$build" >>"$log" 2>&1 || { cat "$log" >&2; exit 1; }

# The module alone: the rest of the tree may be in the middle of a change.
"$python" -c '
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print("native core: {compiler}, {build_type}".format(**native.build_info()))' ckpt/kernels/_native."$tag".so
