#!/usr/bin/env bash
# What one GPU can show, in eight minutes: bash tools/gpu.sh [--KEY=VALUE of train.py …]
#
# It needs torch and numpy alone. The parts are in the order of their value. Each is a process of its own with a time
# limit, and what it prints is in out/gpu/NAME.txt as it comes. The same command again skips the parts that have finished.
# train.py logs tokens per second, MFU and peak memory; compare the memory with: python -m tools.bench plan CONFIG

mkdir -p out/gpu

part() { # part NAME SECONDS ARGUMENTS-OF-PYTHON…
    local name=$1 limit=$2 left=$((480 - SECONDS)) status
    shift 2
    if [ -e "out/gpu/$name.done" ]; then return; fi
    if [ $left -lt 20 ]; then echo "no time for $name: run the script again"; return; fi
    printf '\n## %s: python %s\n\n' "$name" "$*"
    timeout $((left < limit ? left : limit)) python "$@" 2>&1 | tee "out/gpu/$name.txt"
    status=${PIPESTATUS[0]}
    if [ "$status" = 0 ]; then touch "out/gpu/$name.done"; else echo "$name: exit status $status"; fi
    rm -f "out/gpu/$name"/*.pt # 13 GB each at 1.1B
}

data=(--data=data/gpu --eval_tokens=100000 --log_every=4 --warmup_steps=6 --decay_steps=6)
part data 60 prepare_data.py stdlib --tokenizer=bytes --out=data/gpu

# (a) steps of the 1.1B model, 2 micro-batches each
for activation in xielu relu2 swiglu; do
    part "1b-$activation" 75 train.py configs/xielu_1b.py "${data[@]}" --tokens_per_step=40960 --max_steps=20 \
        --activation=$activation --out="out/gpu/1b-$activation" "$@"
done

# (b) the kernels, alone and in a layer, bf16 first
part kernel 120 -m tools.bench kernel --rounds=5 --json=out/gpu/kernel.json "$@"

# (c) steps of the 124M model, 4 micro-batches each; at last with deterministic algorithms
for activation in xielu relu2 swiglu; do
    part "124m-$activation" 45 train.py configs/xielu_124m.py "${data[@]}" --tokens_per_step=65536 --max_steps=40 \
        --activation=$activation --out="out/gpu/124m-$activation" "$@"
done
part 124m-deterministic 45 train.py configs/xielu_124m.py "${data[@]}" --tokens_per_step=65536 --max_steps=40 \
    --deterministic --out=out/gpu/124m-deterministic "$@"
