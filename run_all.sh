#!/usr/bin/env bash
# Everything, from a fresh machine: the environment, the data, the scripts. Arguments go to every script:
#   bash run_all.sh --epochs 1 --out quick    # a quick look, beside the reference results
set -euo pipefail
cd "$(dirname "$0")"

# Whether a python has the packages of requirements.txt, in the versions asked for there.
has_packages() {
  "$1" - 2>/dev/null <<'CHECK'
import importlib.metadata, re
for line in open("requirements.txt"):
    name, _, least = line.strip().partition(">=")
    if least:
        have, need = ([int(n) for n in re.findall(r"\d+", text)[:2]] for text in (importlib.metadata.version(name), least))
        assert have >= need
CHECK
}

# The environment: the active one where it has the packages, else .venv.
for python in python python3 .venv/bin/python none; do
  if has_packages "$python"; then break; fi
done
if [ "$python" = none ]; then
  echo "installing requirements.txt into .venv (several GB, once)"
  python=.venv/bin/python
  python3 -m venv .venv 2>/dev/null || python3 -m venv --clear .venv  # --clear: the Python of an older .venv is gone
  "$python" -m pip install --quiet --upgrade -r requirements.txt
fi

# The data: what --data names, an installed Debian package, torchvision's download; else that package is installed.
data=data
for ((i = 1; i <= $#; i++)); do
  case "${!i}" in
    --data) j=$((i + 1)); data=${!j:-data} ;;
    --data=*) data=${!i#--data=} ;;
  esac
done
status=0
"$python" - "$data" <<'PROBE' || status=$?
import pathlib, sys, torch, common
data = pathlib.Path(sys.argv[1])
try:
    common.load_data(data, torch.device("cpu"))
except common.RunError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(3 if any(common.find_file(name, data) is None for name in common.FILES) else 1)
PROBE
if [ "$status" -eq 3 ]; then
  sudo=""
  [ "$(id -u)" -eq 0 ] || sudo="sudo -n"
  if command -v apt-get >/dev/null && $sudo true 2>/dev/null; then
    echo "the dataset was not found: installing the Debian package dataset-fashion-mnist"
    $sudo apt-get install -y -qq dataset-fashion-mnist >/dev/null 2>&1 || {
      $sudo apt-get update -qq
      $sudo apt-get install -y -qq dataset-fashion-mnist >/dev/null
    }
  else
    exit 1
  fi
elif [ "$status" -ne 0 ]; then
  exit "$status"
fi

# glibc would give the memory of each step back to the system and fault it in again: up to a tenth of the time.
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000

echo "=== vae.py"
"$python" vae.py "$@"

# The studies: one process per GPU, else one per core, at most four. A process with one thread is the most efficient:
# on two cores two of them get a third more done than one process with two threads.
read -r ranks threads < <("$python" -c 'import torch
threads = torch.get_num_threads()
ranks = torch.cuda.device_count() or (1 if torch.backends.mps.is_available() else min(threads, 4))
print(ranks, max(1, threads // ranks))')
for script in conv_ae.py classifier.py; do
  echo "=== $script"
  if [ "$ranks" -eq 1 ]; then
    "$python" "$script" "$@"
  else
    OMP_NUM_THREADS=$threads "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$script" "$@"
  fi
done
