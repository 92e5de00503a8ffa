#!/usr/bin/env bash
# The environment, the data, then the three scripts. See: bash run_all.sh --help
set -euo pipefail
here=$(dirname "$0") # no cd: relative --data and --out mean the caller's folder

for argument in "$@"; do
  if [ "$argument" = --help ] || [ "$argument" = -h ]; then
    cat <<'HELP'
usage: bash run_all.sh [ARGUMENT ...]

Trains everything: vae.py with one seed, conv_ae.py and classifier.py with three. Takes about half
an hour on two cores that are fast in bfloat16, else an hour and a half, and 2 GB of memory a
process. Where the active Python lacks torch 2.9, torchvision or matplotlib, requirements.txt is
installed into .venv beside this file. Where the dataset is missing, it is downloaded or, failing
that, installed as a Debian package. The arguments go to all three scripts, so they must be flags
that all three have:

  bash run_all.sh                           into the folder results, in the place of what is there
  bash run_all.sh --eval                    only checks the saved weights
  bash run_all.sh --epochs 1 --out quick    a quick look, into the folder quick
  bash run_all.sh --seeds 5 --out mine      the studies with n=5, into the folder mine
  bash run_all.sh --seeds 5 --out mine --resume    goes on where that stopped
HELP
    exit
  fi
done

has_packages() { # those of requirements.txt; torchvision's release belongs to torch's
  "$1" -c 'import matplotlib, torch, torchvision
assert torch.__version__ >= "2.9" and matplotlib.__version_info__ >= (3, 8)' 2>/dev/null
}

venv=$here/.venv
for python in python python3 "$venv/bin/python" none; do
  if has_packages "$python"; then break; fi
done
if [ "$python" = none ]; then
  python=$venv/bin/python
  echo "installing requirements.txt into $venv (several GB, once)"
  if [ ! -e "$python" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
      echo "there is no python3 of version 3.10 or newer: put one first in PATH" >&2
      exit 1
    }
    python3 -m venv "$venv" || {
      echo "$venv can't be used: move it away" >&2
      exit 1
    }
  fi
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip
  "$python" -m pip install --quiet -r "$here/requirements.txt"
fi

# The flags are checked and the data is fetched now, not by three scripts and their processes.
check() { # prints how many processes to run, and the threads of each
  "$python" - "$here" "$@" <<'CHECK'
import contextlib
import sys

sys.path[0] = sys.argv.pop(1)
import torch

import common


def check():
    parser = common.make_parser("", common.Config)
    parser.prog = "run_all.sh"
    args = common.parse_args(parser, common.Config)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            common.load_data(args.data, args.device)
    except SystemExit as error:
        print(error, file=sys.stderr)
        sys.exit(3 if "no download" in str(error) else 1)
    # One process per GPU, else one per core, at most four. A process with one thread is the most
    # efficient: on two cores two of them get a third more done than one with two threads.
    threads = torch.get_num_threads()
    processes = {"cpu": min(threads, 4), "mps": 1, "cuda": torch.cuda.device_count()}
    count = processes[args.device.type]
    print(count, max(1, threads // count))


common.cli(check)
CHECK
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}
status=0
shares=$(check "$@") || status=$?
if [ "$status" -eq 3 ]; then # there was no download
  as_root apt-get --version >/dev/null 2>&1 || exit 1
  echo "installing the Debian package dataset-fashion-mnist"
  as_root apt-get update -qq || true # one broken source of several does not matter
  as_root apt-get install -y -qq dataset-fashion-mnist >/dev/null || exit 1
  shares=$(check "$@") || exit 1
elif [ "$status" -ne 0 ]; then
  exit "$status"
fi
read -r processes threads <<<"$shares"

# glibc would give the memory of each step back to the system and fault it in again: up to a tenth
# of the time.
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000

study() { # SCRIPT [ARGUMENT ...]
  if [ "$processes" -eq 1 ]; then
    "$python" "$@"
  else
    OMP_NUM_THREADS=$threads "$python" -m torch.distributed.run \
      --standalone --nproc-per-node "$processes" "$@" || {
      echo "$1 failed: the reason stands above torchrun's own messages" >&2
      exit 1
    }
  fi
}

echo "=== vae.py"
study "$here/vae.py" "$@"
echo "=== conv_ae.py"
study "$here/conv_ae.py" "$@"
echo "=== classifier.py" # starts at the encoders that conv_ae.py made of the same seeds
study "$here/classifier.py" "$@"
