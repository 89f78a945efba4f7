#!/usr/bin/env bash
# make_venv.sh VENV STAMP [EXTRAS]: a virtual environment with this project in it, editable.
#
# A GPU machine keeps the PyTorch that it has (2.11 or newer, with CUDA); any other gets the pinned CPU build.
set -euo pipefail
venv=$1 stamp=$2 extras=${3:-}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  found=$("$python" --version 2>&1) || found="\`$python\`, which does not run,"
  echo "error: Python 3.11 or newer is needed, not $found (\`make PYTHON=python3.12 test\` names another)" >&2
  exit 1
fi

has_gpu_torch='
import sys, torch
ok = torch.cuda.is_available() and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
sys.exit(not ok)'
options=() constraints=()
if "$python" -c "$has_gpu_torch" 2>/dev/null; then
  options=(--system-site-packages)
else
  constraints=(-c constraints-cpu.txt)
fi

# An environment that was cut short, or is another interpreter's, is made again.
identity='import os, sys; print(sys.version_info[:2], os.path.realpath(sys.base_prefix))'
if [ "$("$venv/bin/python" -c "import pip; $identity" 2>/dev/null)" != "$("$python" -c "$identity")" ]; then
  "$python" -m venv --clear ${options[@]+"${options[@]}"} "$venv"
fi
if [ ${#options[@]} -gt 0 ]; then
  # `--system-site-packages` sees through an outer virtual environment, and past its PyTorch: name that one too.
  where='import sysconfig; print(sysconfig.get_path("purelib"))'
  outer=$("$python" -c "$where") inner=$("$venv/bin/python" -c "$where")
  [ "$outer" = "$inner" ] || printf '%s\n' "$outer" >"$inner/outer.pth"
fi
echo "installing into $venv: some minutes where PyTorch has to be downloaded" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  ${constraints[@]+"${constraints[@]}"} -e ".${extras:+[$extras]}"

touch "$stamp"
