#!/usr/bin/env bash
# What only a GPU can show, in stages that each end within 8 minutes and write each row as soon as it is known.
#
#   bash bench/gpu.sh                      # every stage, in this order:
#   bash bench/gpu.sh headline tests       # some: headline tests sweep logits linear curves compiled step profile
#   DRY=1 bash bench/gpu.sh                # tiny shapes on a CPU, kernels under Triton's interpreter
#
# No network. PYTHON is the Python that has torch (python3), WHEELS a folder of peers' wheels (wheels/, if it is
# there), OUT a folder for results and logs (bench/results; of a dry run runs/dry-run). Without a repository,
# AER_FAST_COMMIT names the commit. bench/peers.txt lists the peers; without any, ours and PyTorch's are measured.
set -uo pipefail
[ -z "${OUT:-}" ] || { mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd); }
[ -z "${WHEELS:-}" ] || WHEELS=$(realpath -m "$WHEELS")
cd "$(dirname "$0")/.."

STAGES=("$@")
[ ${#STAGES[@]} -gt 0 ] || STAGES=(headline tests sweep logits linear curves compiled step profile)
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
LIMIT=${LIMIT:-460}
if [ -n "${DRY:-}" ]; then OUT=${OUT:-$PWD/runs/dry-run}; else OUT=${OUT:-$PWD/bench/results}; fi
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

size=auto impl=auto
if [ -n "${DRY:-}" ]; then
    size=tiny impl=triton
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
fi

if compgen -G "$WHEELS/*.whl" >/dev/null; then
    AER_FAST_PEERS=$(mktemp -d)
    export AER_FAST_PEERS
    for wheel in "$WHEELS"/*.whl; do
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$AER_FAST_PEERS" "$wheel" ||
            echo "$wheel could not be installed: going on without it"
    done
fi

results=$("$PYTHON" - <<'END'
import torch
from bench import measure
print(measure.default_results("cuda" if torch.cuda.is_available() else "cpu").name)
END
) || exit 1
[ -z "${DRY:-}" ] || results=dry-run.jsonl

bench() {
    "$PYTHON" -m pytest -q -p no:cacheprovider --size "$size" --impl "$impl" --results "$OUT/$results" \
        --benchmark-storage "file://$OUT/pytest-benchmark" "$@"
}

stage() {
    case $1 in
        headline) bench bench/test_losses.py -m headline -k "not compile" ;;
        tests)
            local parallel=()
            "$PYTHON" -c "import xdist" 2>/dev/null && parallel=(-n 8)
            [ -z "${DRY:-}" ] || parallel+=(-k "zero or empty or masked")
            "$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" tests/test_token_stats.py \
                tests/test_ppo_loss.py tests/test_linear_ppo_loss.py tests/test_linear_token_stats.py \
                tests/test_linear_token_loss.py tests/test_linear.py
            ;;
        sweep) bench bench/sweep.py ;;
        logits) bench bench/test_losses.py -k "not linear and not compile" ;;
        linear) bench bench/test_losses.py -k "linear and everyone" ;;
        curves) bench bench/test_losses.py -k "linear and not everyone and not compile" ;;
        compiled) bench bench/test_losses.py -k "compile and everyone" ;;
        step) bench bench/test_step.py ;;
        profile) bench bench/breakdown.py -s ;;
        *) echo "no stage $1" && return 2 ;;
    esac
}

failed=()
for name in "${STAGES[@]}"; do
    echo "== $name"
    start=$SECONDS
    # a shell of its own, so that the limit ends all of it
    export -f bench stage
    export PYTHON OUT size impl results DRY
    timeout --kill-after=20 "$LIMIT" bash -c "stage $name" 2>&1 | tee "$OUT/$name.log" | tail -n 40
    status=${PIPESTATUS[0]}
    echo "== $name: $((SECONDS - start)) s, status $status"
    [ "$status" -eq 0 ] || failed+=("$name")
done
echo "rows in $OUT/$results; tables and pictures: python -m bench.report $OUT/$results"
[ ${#failed[@]} -eq 0 ] || { echo "failed or cut short: ${failed[*]}"; exit 1; }
