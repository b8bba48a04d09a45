#!/usr/bin/env bash
# The training step, embed and ingest with a GPU, in at most 8 minutes: bash training/benchmarks/gpu.sh [FOLDER [OPTION...]]
# Writes FOLDER/*.json (default runs/gpu) and prints the tables. The options are benchmark.py's; DEVICE and PYTHON are
# cuda and python unless the environment says otherwise.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu}
options=("${@:2}")
python=${PYTHON:-python}
until=$((SECONDS + 480))
mkdir -p "$out"

in_time() { # name, then a script and its options
    local name=$1 left=$((until - SECONDS))
    shift
    if ((left < 20)); then
        echo "$name: left out, the 8 minutes are over"
        return
    fi
    timeout "$left" "$python" "$@" || echo "$name: ended with status $?"
}

measure() { # name, then options of benchmark.py
    in_time "$1" training/benchmark.py --device "${DEVICE:-cuda}" --out "$out/$1.json" "${@:2}" "${options[@]}"
}

measure step_32 --only step memory meta --batch 32 --repeats 15 --limit 60
measure step_256 --only step --batch 256 --repeats 7 --limit 60
# torch's default lets convolutions use tf32; here nothing does
NVIDIA_TF32_OVERRIDE=0 measure step_32_float32 --only step --batch 32 --repeats 15 --limit 60
measure embed --only embed ingest --repeats 3 --limit 60
# lightly and lightly-train, where they are installed and DATA names a folder of clips, LABELS one of tasks
if [[ -n ${DATA:-} && -n ${LABELS:-} ]] && "$python" -c "import lightly, lightly_train" 2>/dev/null; then
    in_time others training/benchmarks/others.py --device "${DEVICE:-cuda}" --data "$DATA" --labels "$LABELS" \
        --steps 500 --out "$out/others"
fi
