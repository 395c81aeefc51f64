#!/usr/bin/env bash
# What one GPU can show, in eight minutes: bash tools/gpu.sh [--KEY=VALUE of train.py …]
#
# It needs only torch and numpy. The most valuable parts come first. Each is a process of its own with a time
# limit, and what it prints is in out/gpu/NAME.txt as it comes. The same command again skips the parts that have finished.
# To try all of it without a GPU:
#     LARGE=configs/demo.py SMALL=configs/demo.py EACH=0.01 LIMIT=4800 bash tools/gpu.sh --tokens_per_step=2048

cd "$(dirname "$0")/.." || exit
LARGE=${LARGE:-configs/xielu_1b.py} SMALL=${SMALL:-configs/xielu_124m.py}
EACH=${EACH:-0.3}   # seconds of the warm-up and of each of the five turns of a measurement
LIMIT=${LIMIT:-480} # seconds in all; a longer one lengthens the limit of each part
OUT=${OUT:-out/gpu}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
unfinished=0

left() { echo $((LIMIT - SECONDS)); }

part() { # part NAME SECONDS ARGUMENTS-OF-PYTHON…
    local name=$1 limit=$(($2 * LIMIT / 480)) status
    shift 2
    if [ -e "$OUT/$name.done" ]; then return; fi
    if [ "$(left)" -lt 20 ]; then
        echo "no time left for $name"
        unfinished=1
        return
    fi
    printf '\n## %s: python %s\n\n' "$name" "$*"
    timeout $(($(left) < limit ? $(left) : limit)) python "$@" 2>&1 | tee "$OUT/$name.txt"
    status=${PIPESTATUS[0]}
    if [ "$status" = 0 ]; then touch "$OUT/$name.done"; else
        echo "$name: exit status $status" | tee -a "$OUT/$name.txt"
        unfinished=1
    fi
}

# (a) the 1.1B model: micro-batch, update, MFU, peak memory beside the plan, and a profile
for activation in xielu relu2 swiglu; do
    part "large-$activation" 100 -m tools.bench step "$LARGE" --seconds="$EACH" --activation=$activation "$@"
done
memory=$(nvidia-smi --id=0 --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null) # MiB
if [ "${memory:-0}" -gt 100000 ]; then
    part large-11-sequences 100 -m tools.bench step "$LARGE" --seconds="$EACH" --micro_batch_size=11 "$@"
fi

# (b) the activations alone, then in a layer of the 1.1B model
part kernel 100 -m tools.bench kernel "$LARGE" --seconds="$EACH" "$@"
for activation in xielu relu2 swiglu; do
    part "layer-$activation" 40 -m tools.bench step "$LARGE" --seconds="$EACH" --activation=$activation "$@" \
        --n_layers=1 --vocab_size=64
done

# (c) the 124M model, also with deterministic algorithms
for activation in xielu relu2 swiglu; do
    part "small-$activation" 45 -m tools.bench step "$SMALL" --seconds="$EACH" --activation=$activation "$@"
done
part small-deterministic 45 -m tools.bench step "$SMALL" --seconds="$EACH" --deterministic "$@"

# (d) short trainings on the bytes of Python's library, to see that it trains, not how well
python - "$OUT" <<'END'
import sys
import sysconfig
from pathlib import Path
import numpy as np
from plumbing.data import shard_header

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
tokens = np.frombuffer(b"".join(map(Path.read_bytes, files)), np.uint8).astype("<u2")
for split, part in (("val", tokens[:100_000]), ("train", tokens[100_000:])):
    Path(sys.argv[1], f"bytes_{split}.bin").write_bytes(shard_header(part.dtype, len(part)) + part.tobytes())
END
for activation in xielu relu2 swiglu; do
    part "train-$activation" 60 train.py "$SMALL" --data="$OUT" --out="$OUT/train-$activation" --resume \
        --tokens_per_step=65536 --max_steps=100 --warmup_steps=0.1 --decay_steps=0.4 --eval_tokens=100000 \
        --activation=$activation "$@"
done
if [ $unfinished = 0 ]; then echo "all parts have finished: $OUT"; else echo "the same command runs the rest"; fi
exit $unfinished
