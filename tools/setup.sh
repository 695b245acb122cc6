# Sourced by the other tools: makes .venv in the checkout, or brings it up to date, with the pinned versions.
# EXTRAS names the package's extras to install, as in EXTRAS='[dev]'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "gossipfl needs Python 3.11 or newer, $("$python" --version) was found; set PYTHON=/path/to/python3.11" >&2
    exit 2
}
wanted="$(cksum setup.cfg constraints.txt)${EXTRAS:-}"
if [[ ! -x .venv/bin/gossipfl || "$(cat .venv/installed 2>/dev/null)" != *"$wanted"* ]]; then
    echo "installing into .venv (once; a few minutes on a slow network)" >&2
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
    .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${EXTRAS:-}"
    [[ "$(cat .venv/installed 2>/dev/null)" == *"$(cksum setup.cfg constraints.txt)"* ]] || : > .venv/installed
    echo "$wanted" >> .venv/installed
fi
