#!/bin/bash
# What to measure first where there is a GPU, in at most 12 minutes, the most important first:
#
#     bash bench/on_gpu.sh              # -> results/on-gpu/: summary.txt, a .txt of each part, .json
#     DRY=1 bash bench/on_gpu.sh        # rehearsal without a GPU: the commands, small, without numbers
#
# Each part has a time-out, writes its result at once, and does not stop the others.
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-results/on-gpu} data=${DATA:-data/on-gpu} python=${PYTHON:-.venv/bin/python} failed=0
mkdir -p "$out" && : > "$out/summary.txt" || exit 1
run="$python -m" preset=mosaic-base vocab=30528 docs=0
kernels="--lengths 128 512" step="--sizes base --seq_lens 128 --rounds 3" length="--max_steps 4"
if [ "$DRY" ]; then
    run="$python -m bench.dryrun rehearse" preset=mosaic-tiny vocab=800 docs=400
    kernels="--lengths 128 --tokens 1024 --repeats 1"
    step="--sizes tiny --seq_lens 32 --micro_tokens 1024 --rounds 1 --steps 1 --warmup 1"
    length="--max_steps 2"
fi

part() {  # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2 began=$SECONDS code; shift 2
    echo "== $name: $*"
    # a rehearsal is not hurried: a digit more, 1150 for 150
    timeout -k 5 "${DRY:+1}$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    echo "$name: exit $code after $((SECONDS - began)) s" | tee -a "$out/summary.txt"
    [ "$code" = 0 ] || failed=1
}

if [ ! -f "$data/meta.json" ]; then  # docstrings of the installed packages, beside the GPU's work
    timeout 400 $python prepare_c4.py docstrings --out "$data" --vocab_size $vocab --max_docs $docs \
        --val_fraction 0.02 > "$out/data.txt" 2>&1 &
fi
part tests 150 $python -m pytest tests/test_kernels_gpu.py -x -q -m "not slow"
part kernels 150 $run bench.kernels $kernels --out "$out/kernels.json"
part step 180 $run bench.step $step --out "$out/step.json"
wait
train="--data $data --out $out/runs --eval_tokens 65536 --pppl_tokens 0"
part eager 45 $run bench.profile $preset --name eager --compile off $train $length
part compiled 75 $run bench.profile $preset --name compiled --compile on $train $length
left=$((700 - SECONDS))
minutes=$(((left - 60) / 60))  # one for compiling
[ "$DRY" ] || length="--documents all --max_minutes $((minutes > 1 ? minutes : 1))"
part train $((left > 60 ? left : 60)) $run pretrain $preset --name train --compile on $train $length
cat "$out/summary.txt"
exit $failed
