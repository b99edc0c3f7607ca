# Re-execute the committed notebooks and compare the cells that begin with
# NBVAL_CHECK_OUTPUT; figures go to a folder of their own.
set -e
cd "$(dirname "$0")/.."
FIGURES=$(mktemp -d)
export FIGURES
trap 'rm -rf "$FIGURES"' EXIT
.venv/bin/pytest --nbval-lax --nbval-cell-timeout 1800 \
    -p no:cacheprovider notebooks
