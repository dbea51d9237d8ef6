#!/usr/bin/env bash
# What only a GPU can show, in stages that each end within 8 minutes and write each row as soon as it is known.
#
#   bash bench/gpu.sh                      # every stage, in the order of STAGES below
#   bash bench/gpu.sh headline tests       # some of them
#   DRY=1 bash bench/gpu.sh                # tiny shapes on a CPU, kernels under Triton's interpreter
#
# No network. PYTHON is the Python that has torch (python3), WHEELS a folder of peers' wheels (wheels/, if it is
# there), OUT a folder for results and logs (bench/results; of a dry run runs/dry-run). Without a repository,
# AER_FAST_COMMIT names the commit. WHEELS/tests holds what the tests import and this Python lacks: a test file
# without its packages is left out, and pytest's first lines say so. bench/peers.txt lists the peers; without any, ours
# and PyTorch's are measured; bench/demo.txt lists what the demo needs. docs/benchmarks.md says what each stage is
# and how long it should take on an H100.
set -uo pipefail
[ -z "${OUT:-}" ] || { mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd); }
[ -z "${WHEELS:-}" ] || WHEELS=$(realpath -m "$WHEELS")
cd "$(dirname "$0")/.."

STAGES=("$@")
[ ${#STAGES[@]} -gt 0 ] || STAGES=(headline right tests sanitize sweep products logits linear curves compiled step
    packed capacity profile ncu demo ranks)
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

unpack() {  # the wheels of a folder, one over the other: some share a package, and together they contradict each other
    local wheel
    for wheel in "$1"/*.whl; do
        "$PYTHON" -m zipfile -e "$wheel" "$2" || echo "$wheel could not be unpacked: going on without it"
    done
}
if compgen -G "$WHEELS/*.whl" >/dev/null; then
    AER_FAST_PEERS=$(mktemp -d)
    export AER_FAST_PEERS
    unpack "$WHEELS" "$AER_FAST_PEERS"
fi
TEST_PACKAGES=
if compgen -G "$WHEELS/tests/*.whl" >/dev/null; then
    TEST_PACKAGES=$(mktemp -d)
    unpack "$WHEELS/tests" "$TEST_PACKAGES"
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
        --benchmark-storage "file://$PWD/runs/pytest-benchmark" "$@"
}

capacity() {
    # expandable segments, if the driver has them: the allocator's fragments should not decide what fits
    local segments=expandable_segments:True cap=77
    if PYTORCH_ALLOC_CONF=$segments PYTORCH_CUDA_ALLOC_CONF=$segments "$PYTHON" -c \
        "import torch; torch.empty(1 << 28, device='cuda' if torch.cuda.is_available() else 'cpu')"; then
        export PYTORCH_ALLOC_CONF=$segments PYTORCH_CUDA_ALLOC_CONF=$segments
    fi
    [ -z "${DRY:-}" ] || cap=0.008
    bench bench/test_step.py --memory-cap "$cap"
}

demo() {
    # `make demo` with two seeds; its curves, scores and settings come back as one small file
    local grid="$PWD/runs/gpu-demo" few=(--seeds 0 1 --processes 4)
    [ -z "${DRY:-}" ] || { grid="$OUT/gpu-demo" && few=(--seeds 0 --processes 1 --eval-prompts 1 --eval-samples 2
        --train.model "carry(digits=1, steps=2, batch=4)" --train.task "carry(digits=1)" --train.steps 2
        --train.prompts 2 --train.initial-tokens 8 --train.model-cache "$OUT/models"); }
    # ended before the stage is, so that what there is comes back
    PYTHONPATH="$PYTHONPATH${AER_FAST_PEERS:+:$AER_FAST_PEERS}" timeout --signal INT --kill-after=10 \
        $((LIMIT - 30)) "$PYTHON" -m training.experiments demo --train.output "$grid" "${few[@]}"
    local status=$?
    tar -czf "$OUT/demo.tar.gz" --exclude checkpoints --exclude tensorboard -C "$(dirname "$grid")" gpu-demo
    return $status
}

packed() {
    # sequences without padding, by attention; the wheels may have what the trainer imports
    PYTHONPATH="$PYTHONPATH${AER_FAST_PEERS:+:$AER_FAST_PEERS}" "$PYTHON" -m bench.packed "$size"
}

ranks() {
    # a vocabulary split between the GPUs of this machine; with one of them there is nothing to split
    local count
    count=$("$PYTHON" -c "import torch; print(torch.cuda.device_count() or 2)") || return 1
    [ "$count" != 1 ] || { echo "one GPU: nothing to split a vocabulary between"; return 0; }
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${count:-2}" -m bench.ranks
}

pytest_here() {
    PYTHONPATH="$PYTHONPATH${TEST_PACKAGES:+:$TEST_PACKAGES}" "$PYTHON" -m pytest -q -p no:cacheprovider \
        -p no:benchmark --durations=10 "$@"
}

sanitize() {
    # once without a tool: compiles everything, and a failure here is one of the program
    "$PYTHON" -m tests.helpers.sanitizer || return 1
    if [ -n "${DRY:-}" ]; then return 0; fi
    local tool sanitizer failed=0
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer) || return 1
    # torch's allocator would hide what is out of bounds inside its blocks
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck initcheck synccheck; do
        echo "-- $tool"
        "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 "$PYTHON" -m tests.helpers.sanitizer 2>&1 |
            tail -n 60
        [ "${PIPESTATUS[0]}" -eq 0 ] || { echo "-- $tool found something"; failed=1; }
    done
    return $failed
}

ncu() {
    if [ -n "${DRY:-}" ]; then
        "$PYTHON" -m bench.profiling launch
        return
    fi
    local profiler options
    profiler=$(type -P ncu || ls /usr/local/cuda/bin/ncu) || return 1
    options=$("$PYTHON" -m bench.profiling options) || return 1
    # shellcheck disable=SC2086
    "$profiler" $options --log-file "$OUT/l2.csv" "$PYTHON" -m bench.profiling launch
    "$PYTHON" -m bench.profiling read "$OUT/l2.csv" --results "$OUT/$results"
}

stage() {
    case $1 in
        headline) bench bench/test_losses.py -m headline -k "not compile" ;;
        right) pytest_here tests/kernels/test_gpu.py ;;
        tests)
            # eight processes on one GPU; the large allocations are in the stage "right"
            local options=(-m "not host" --ignore=tests/kernels/test_gpu.py)
            "$PYTHON" -c "import xdist" 2>/dev/null && options+=(-n 8 --dist worksteal)
            [ -z "${DRY:-}" ] || options+=(-k "zero or empty or masked")
            pytest_here tests "${options[@]}"
            ;;
        sanitize) sanitize ;;
        ncu) ncu ;;
        sweep) bench bench/tuning.py::test_tile ;;
        products) bench bench/tuning.py::test_loop bench/tuning.py::test_product ;;
        logits) bench bench/test_losses.py -k "not linear and not compile" ;;
        linear) bench bench/test_losses.py -k "linear and full" ;;
        curves) bench bench/test_losses.py -k "linear and not full and not compile" ;;
        compiled) bench bench/test_losses.py -k "compile and full" ;;
        step) bench bench/test_step.py ;;
        packed) packed ;;
        capacity) capacity ;;
        profile) bench bench/profiling.py -s ;;
        demo) demo ;;
        ranks) ranks ;;
        *) echo "no stage $1" && return 2 ;;
    esac
}

failed=()
for name in "${STAGES[@]}"; do
    echo "== $name"
    start=$SECONDS
    # a shell of its own, so that the limit ends all of it
    export -f bench capacity demo packed pytest_here ranks sanitize ncu stage
    export PYTHON OUT LIMIT size impl results DRY TEST_PACKAGES
    timeout --kill-after=20 "$LIMIT" bash -c "stage $name" 2>&1 | tee "$OUT/$name.log" | tail -n 40
    status=${PIPESTATUS[0]}
    echo "== $name: $((SECONDS - start)) s, status $status"
    [ "$status" -eq 0 ] || failed+=("$name")
done
echo "rows in $OUT/$results; tables and pictures: python -m bench.report $OUT/$results"
[ ${#failed[@]} -eq 0 ] || { echo "failed or cut short: ${failed[*]}"; exit 1; }
