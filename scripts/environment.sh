# Makes .venv with all that the scripts need, unless it is there; for `source`.
# Goes to the repository, and leaves $python: the environment's interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo 'Python 3.11 or later is needed, and none was found on the PATH.' >&2
  return 1
}

make_environment() {
  local stamp=.venv/installed wanted found
  wanted=$(cat setup.cfg constraints.txt | cksum)
  if [[ -e $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  # An environment without a stamp was left half made.
  if [[ ! -e $stamp ]]; then
    found=$(find_python)
    echo "Making .venv with $("$found" --version) ..."
    "$found" -m venv --clear .venv
  fi
  echo 'Installing into .venv, which takes a few minutes ...'
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable '.[prepare,demo,test]'
  echo "$wanted" >"$stamp"
}

make_environment
python=$PWD/.venv/bin/python
