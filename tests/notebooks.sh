# Re-execute the committed notebooks and compare their text outputs: all of
# them where this processor computes the same digits, elsewhere the verdicts
# of the cells that begin with # NBVAL_CHECK_OUTPUT, without their numbers.
# Figures go to a folder of their own, and what one notebook trains only the
# others read: nothing from before.
set -e
cd "$(dirname "$0")/.."
FIGURES=$(mktemp -d)
trap 'rm -rf "$FIGURES"' EXIT
RUNS=$FIGURES/runs
export FIGURES RUNS TQDM_DISABLE=1 OMP_NUM_THREADS=1
if .venv/bin/python tests/digits.py; then
    echo "this processor computes the committed digits: comparing them all"
    compare=--nbval
else
    echo "this processor rounds differently: comparing verdicts"
    compare="--nbval-lax --nbval-sanitize-with tests/sanitize.cfg"
fi
[ $# -gt 0 ] || set -- notebooks/0[1-9]_*[a-z].ipynb
.venv/bin/pytest $compare --nbval-cell-timeout 1800 -p no:cacheprovider \
    -n 2 --dist loadfile "$@"
