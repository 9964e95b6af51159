# Sourced by scripts/demo and scripts/test: a virtual environment in .venv, made once and brought up to date when
# pyproject.toml or the constraints change.  pip's own settings (index, find-links, cache, proxy) are obeyed.

# ready EXTRAS: install this repository, editable, with the comma-separated EXTRAS unless that was done before.
# Afterwards $PY is the environment's Python.
ready() {
    local extras=$1 base=${PYTHON:-python3} key
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "$base is $("$base" -V 2>&1); Python 3.10 or newer is needed (set PYTHON to choose another)" >&2
        return 1
    }
    PY=$PWD/.venv/bin/python
    key=$( { echo "$PWD"; "$base" -V; cat pyproject.toml scripts/constraints.txt; } | sha256sum)
    [ "$(cat ".venv/installed-$extras" 2>/dev/null)" = "$key" ] && return
    echo "installing sd-lean[$extras] into .venv (several minutes and gigabytes the first time: torch)"
    "$base" -m venv .venv
    "$PY" -m pip install $([ -t 1 ] || echo --quiet) --disable-pip-version-check \
        -c scripts/constraints.txt -e ".[$extras]"
    echo "$key" >".venv/installed-$extras"
}
