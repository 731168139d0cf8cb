#!/usr/bin/env bash
# The fast part of the tests with other versions of torch, each in a virtual environment of its own:
#
#   tests/versions.sh [VERSION]...     the versions of the list below if none is named
#
# It runs on what `make build` has built, whose extension is linked to no torch. PYTHON is the Python
# that it was built for, PIP_EXTRA adds options to pip (the index of torch's CPU builds, say), and
# PYTEST_ARGS goes to pytest. The environments stay in build/versions.
#
# Left out are the tests of what is not in the package, or goes by the version of torch that
# development uses: ONNX, the GPUs' kernels, examples, documents, and the build.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
read -ra versions <<< "${*:-2.6.0 2.9.1 2.14.1}"
read -ra pip_extra <<< "${PIP_EXTRA:-}"
read -ra pytest_args <<< "${PYTEST_ARGS:-}"
left_out='build|cuda_build|cuda_emulated|distributed|docs|examples|gpu|gpu_layers|handoff|onnx'
left_out+='|triton|triton_compile'
mapfile -t files < <(printf '%s\n' tests/test_*.py | grep -Ev "/test_($left_out)\.py$")

status=0
for version in "${versions[@]}"; do
  folder=build/versions/$version
  if [[ ! -e $folder/complete ]]; then
    echo "== torch $version: its environment"
    "$python" -m venv --clear "$folder"
    "$folder/bin/python" -m pip install -q --disable-pip-version-check "${pip_extra[@]}" \
      "torch==$version" numpy pytest pytest-xdist hypothesis
    touch "$folder/complete"
  fi
  echo "== torch $version"
  PYTHONPATH=$PWD "$folder/bin/python" -m pytest -q -p no:cacheprovider -m "not long and not gpu" \
    "${pytest_args[@]}" "${files[@]}" || status=$?
done
exit "$status"
