#!/usr/bin/env bash
# A fresh machine: environment, data, the three scripts.
set -euo pipefail
unset MPLBACKEND PYTHONUNBUFFERED # a notebook's backend; unbuffered lines of two processes would mix
here=$(cd "$(dirname "$0")" && pwd)

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  echo "usage: bash run_all.sh [FLAG ...]    installs what is missing, then runs the three scripts"
  echo "Flags go to all three: --epochs 1 --out quick for a quick look, --seeds 5, --resume, --eval"
  exit
fi

python=python3
if ! $python -c "import torch, torchvision, matplotlib.style as s; s.library['petroff10']" 2>/dev/null; then
  python=$here/.venv/bin/python
  python3 -m venv "$here/.venv"
  "$python" -m pip install --quiet -r "$here/requirements.txt"
fi

# One process refuses bad flags and fetches the data, before several would.
prepare() {
  "$python" - "$here" "$@" <<'PYTHON'
import sys

sys.path[0] = sys.argv.pop(1)
import classifier, common, conv_ae, vae

for script in (vae, conv_ae, classifier):
    parser = common.make_parser("", script.Config)
    parser.prog = "run_all.sh"
    args = common.parse_args(parser, script.Config)
common.load_data(args.data)
PYTHON
}
code=0
prepare "$@" || code=$?
if [ $code -eq 1 ] && [ "$(id -u)" -eq 0 ] && [ -x /usr/bin/apt-get ]; then
  apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist
  prepare "$@"
elif [ $code -ne 0 ]; then
  exit $code
fi

# Processes of one thread share out the runs: two of them get more done than one with two threads.
cores=$(getconf _NPROCESSORS_ONLN)
export python here OMP_NUM_THREADS=1 WORLD_SIZE=$((cores < 4 ? cores : 4))

# vae.py may have fewer runs than there are processes: one without goes on to conv_ae.py, where the
# ranks are turned round, so that it has more to do there.
train() { # RANK SCRIPTS FLAG ...
  rank=$1
  for script in $2; do
    RANK=$rank "$python" "$here/$script.py" "${@:3}" || exit 1
    rank=$((WORLD_SIZE - 1 - rank))
  done
}
export -f train
for scripts in "vae conv_ae" classifier; do
  seq 0 $((WORLD_SIZE - 1)) |
    xargs -P $WORLD_SIZE -I _RANK_ bash -c 'train "$@"' bash _RANK_ "$scripts" "$@" || exit 1
done
