#!/usr/bin/env bash
# What is worth measuring on one GPU, in one command of ten minutes, the most important first.
#
#   bash eval/gpu.sh OUT           # on the GPU; OUT gets a log and one JSON file per benchmark
#   bash eval/gpu.sh OUT --prove   # without one: every step at a small size, to see that all of it runs
#
# Needs torch with CUDA, triton, transformers, accelerate, peft and pytest, and the packages of pyproject.toml that
# soka_serve imports; nothing is fetched. To a machine that has the first four and no network this takes the rest (58 MB,
# of which pyarrow has 55; --python-version is that machine's). The comparison needs scipy besides (35 MB).
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels "peft>=0.21,<0.22" pytest pluggy iniconfig \
#     pygments pydantic pydantic-core annotated-types typing-inspection click jinja2 markupsafe pyarrow xxhash \
#     lycoris-lora einops toml                                      # here
#   pip install --no-deps wheels/*.whl                                # there
#
# Each step ends at its own limit, and all of them SOKA_GPU_SECONDS (default 560; with --prove 3600) after the start:
# what has ended by then is in OUT, of each benchmark the cases that have. MODEL and DATA, a base and the
# folder that eval.suites.prepare made for it, add the comparison on the real model; a later call goes on from its
# records (OUT's *.records.jsonl, or OUT/work where it was stopped). VLLM, a wheel of vLLM or what eval.vllm_lora has
# made of one, adds vLLM's LoRA kernels to the benchmark of ours; lycoris-lora, where it is installed, its fused training
# kernels to the benchmark of a step. The exit code is that of the first step, which says whether the kernel is right
# (124: it was not done in time); others may fail, and the log says so. The interpreter of Triton 3.6, which --prove
# uses, does not go with numpy 2.4 and later.
set -u
out=${1:?usage: bash eval/gpu.sh OUT [--prove]}
prove=${2:-}
case "$prove" in "" | --prove) ;; *) echo "expected --prove or nothing; got $prove" >&2; exit 2 ;; esac
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
log="$out/gpu.log"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/plugins${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ -n "$prove" ] && seconds=3600 || seconds=560
deadline=$((SECONDS + ${SOKA_GPU_SECONDS:-$seconds}))
first=""

step() { # NAME SECONDS COMMAND...: the command's end at the latest after so many seconds, and what came of it
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS code
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 10 ]; then
        echo "== $name: left out, no time is left" | tee -a "$log"
        return
    fi
    echo "== $name (at most $limit s): $*" | tee -a "$log"
    timeout -k 5 "$limit" "$@" >>"$log" 2>&1
    code=$?
    case $code in 0) found=done ;; 124 | 137) found="stopped at its limit" ;; *) found="failed with exit code $code" ;; esac
    echo "== $name: $found, $((SECONDS - start)) s" | tee -a "$log"
    [ -n "$first" ] || first=$code
}

bench() { # NAME SECONDS OPTIONS...: a benchmark of eval/bench with its result in OUT
    local name=$1 seconds=$2 module=$3
    shift 3
    step "$name" "$seconds" "$python" -m "eval.bench.$module" "$@" --out "$out/$name.json"
}

alone=(-p no:xdist -p no:cacheprovider) # in this process, whether pytest-xdist is there or not
vllm=()
[ -z "${VLLM:-}" ] || vllm=(--vllm "$VLLM")
"$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.is_available())' >"$log" 2>&1

if [ -n "$prove" ]; then
    export TRITON_INTERPRET=1
    # Triton 3.6's interpreter converts arrays to scalars.
    step oracle 900 "$python" -m pytest -q -x "${alone[@]}" -W ignore::DeprecationWarning \
        tests/parity/test_plugin_triton.py
    bench kernel 300 kernel --device interpreter --models embedded --dtypes float16 --ranks 1 --tokens 1 --adapters 1 \
        "${vllm[@]}"
    bench blocks 400 blocks --device interpreter --model embedded --ranks 1 --tokens 1 --adapters 1 \
        --settings num_warps
    unset TRITON_INTERPRET
    bench kpsvd 300 kpsvd --rank 1
    bench step 200 step --llama 512 1408 1 --ranks 1 --rows 4 --length 128 --repeats 2
    bench apply 300 apply --repeats 1 --dtypes float32
else
    export SOKA_REQUIRE_GPU=1
    step oracle 120 "$python" -m pytest -q "${alone[@]}" tests/gpu
    if command -v compute-sanitizer >/dev/null; then
        step sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m eval.bench.kernel \
            --device cuda --models embedded --ranks 1 --tokens 8 --adapters 8 --seconds 0.01
    else
        echo "== sanitizer: left out, compute-sanitizer is not here" | tee -a "$log"
    fi
    bench kernel 150 kernel --device cuda --seconds 0.2 "${vllm[@]}"
    bench blocks 80 blocks
    bench kpsvd 60 kpsvd --device cuda
    bench step 60 step --device cuda --llama 4096 11008 1 --dtype bfloat16 --ranks 1 4 --rows 4 --length 512
    bench apply 40 apply --device cuda
fi
if [ -n "${MODEL:-}" ] && [ -n "${DATA:-}" ]; then
    # Runs of the suite that begin, end: none is started in the last minute and a half.
    minutes=$(((deadline - SECONDS - 90) / 60))
    [ -n "$prove" ] && runs=(--limit-runs 0) || runs=(--minutes "$((minutes > 0 ? minutes : 0))" --jobs 4)
    ln -sfn "$(cd "$MODEL" && pwd)" "$DATA/smollm2" # prepare's link leads to where the base lies on its machine
    step suite 560 "$python" -m soka_serve compare eval/suites/smollm2_gsm8k.toml --root "$DATA" \
        --work "$out/work" --out "$out/smollm2_gsm8k.json" "${runs[@]}"
    [ ! -e "$out/smollm2_gsm8k.records.jsonl" ] || rm -rf "$out/work"
fi
echo "== what each step wrote: $log"
exit "${first:-1}"
