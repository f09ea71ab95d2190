# Creates a virtual environment with everything that the scripts need, unless it
# exists. For `source`: changes to the repository root and sets $venv, the
# environment's folder, and $python, its interpreter.
#
#   PYTHON=/path/to/python   use this interpreter, not the newest one found
#   VENV=.venv-3.11          use this folder, not .venv

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$PWD/${VENV:-.venv}
python=$venv/bin/python
# Without bytecode, each process compiles what it imports: 14 seconds for
# TensorFlow, 3 for JAX.
unset PYTHONDONTWRITEBYTECODE

# Whether a command runs, is Python 3.11 to 3.13 (or exactly $2), and has venv.
# A shim of pyenv for a version that is not active exists, and fails to run.
is_usable() {
  "$1" - "${2-}" >/dev/null 2>&1 <<'EOF'
import ensurepip, sys, venv
version = '.'.join(map(str, sys.version_info[:2]))
sys.exit(version not in ([sys.argv[1]] if sys.argv[1] else ['3.11', '3.12', '3.13']))
EOF
}

# Prints the newest usable interpreter, or the one of version $1.
find_python() {
  local version candidate
  for version in ${1:-3.13 3.12 3.11}; do
    for candidate in "python$version" python3 \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      if is_usable "$candidate" "$version"; then
        echo "$candidate"
        return
      fi
    done
  done
  echo "error: no Python ${1:-3.11 to 3.13} with venv on the PATH or in pyenv;" \
    'install one, or set PYTHON=/path/to/python' >&2
  return 1
}

make_environment() {
  local stamp=$venv/installed wanted found=${PYTHON-}
  if [[ -n $found ]] && ! is_usable "$found"; then
    echo "error: PYTHON=$found is not a Python 3.11 to 3.13 with venv" >&2
    return 1
  fi
  if [[ -z $found && ! -e $stamp ]]; then
    found=$(find_python)
  fi
  # A changed PYTHON or an interrupted installation starts from scratch.
  if [[ ! -e $stamp ]] ||
    [[ -n $found && $("$found" --version) != $("$python" --version) ]]; then
    echo "Creating ${venv##*/} with $("$found" --version) ..."
    "$found" -m venv --clear "$venv"
  fi
  wanted=$(cat setup.cfg constraints.txt | cksum)
  if [[ -e $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  echo "Installing into ${venv##*/}, which takes a minute or a few ..."
  local -a what=(--constraint constraints.txt --editable '.[prepare,demo,test]')
  local -a pip=("$python" -m pip install --quiet --disable-pip-version-check)
  # uv is much faster; pip takes over where only pip.conf has what is needed.
  "${pip[@]}" --constraint constraints.txt uv
  "$python" -m uv pip install --quiet --python "$python" "${what[@]}" ||
    "${pip[@]}" "${what[@]}"
  echo "$wanted" >"$stamp"
}

make_environment
