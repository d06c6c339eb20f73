# Sourced by the other scripts: makes .venv, or the folder that is named, once, brings it up to a
# requirements file, activates it. With the environment in place and the file unchanged, nothing is
# asked of the network.
#   source scripts/venv.sh requirements.txt [FOLDER]

# Waiting threads sleep in place of spinning, so that a busy machine is not slowed by its own idling.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1 venv=${2:-.venv}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is older than Python 3.11; name a newer one by PYTHON=..." >&2
  exit 2
}
[ -d "$venv" ] || "$python" -m venv "$venv"
if [ -f "$venv/Scripts/activate" ]; then source "$venv/Scripts/activate"; else source "$venv/bin/activate"; fi
stamp=$venv/$requirements.done
needed=$(cat requirements.txt "$requirements" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$needed" ]; then
  torch=$(grep '^torch==' requirements.txt)
  echo "Installing $torch into $venv: 0.2 GB to download, 2.7 GB where it comes with CUDA" \
    "(docs/installation.md says how to choose)"
  # torch first and alone: a looser requirement met before it would fetch another build.
  pip install "$torch"
  echo "Installing the rest of $requirements into $venv: 0.2 GB to download"
  pip install --quiet -r "$requirements"
  echo "$needed" > "$stamp"
fi

# The cores that this process may use; macOS has no nproc.
cores() {
  python -c 'import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)'
}
