#!/usr/bin/env bash
# All that a GPU can show, in nine minutes: bash tools/gpu.sh [--KEY=VALUE of train.py …]
# Each part has its own process and at most three minutes, so that one that fails leaves the others alone; what they
# print goes to the screen and to out/bench/gpu.md.
mkdir -p out/bench && exec > >(tee out/bench/gpu.md) 2>&1
part() { printf '\n## %s\n\n' "$*"; timeout 180 python "$@" || echo "exit status $?"; }
few=(--data=data/stdlib --vocab_size=50304 --warmup_steps=6 --decay_steps=12 --eval_tokens=100000)
three=--activation=xielu,relu2,swiglu
part prepare_data.py stdlib
part -m tools.compare configs/xielu_1b.py "${few[@]}" --max_steps=20 --tokens_per_step=40960 $three --out=out/gpu/1b "$@"
part -m tools.bench kernel --rounds=5 "$@"
part -m tools.compare configs/xielu_124m.py "${few[@]}" --max_steps=100 --tokens_per_step=65536 $three --out=out/gpu/124m "$@"
part train.py configs/xielu_124m.py "${few[@]}" --max_steps=20 --tokens_per_step=65536 --deterministic --out=out/gpu/det "$@"
