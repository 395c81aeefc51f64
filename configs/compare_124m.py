"""The comparison at GPT-2's size, for GPUs with bf16: budgets of 5 to 40 tokens per parameter. Its data:

python prepare_data.py fineweb-edu --tokenizer=gpt2 --tokens=5.2e9 --val_tokens=1e7 --out=data/fineweb-edu-gpt2

python -m tools.compare configs/compare_124m.py --activation=xielu,relu2,swiglu --tokens_per_parameter=5,10,20,40 \
    --tune=lr=5e-4,1e-3,2e-3 --tune_up_to=10 --seed=1-3

--dry_run prints the hours that this takes. On a node of eight GPUs, eight runs go at once.
"""

from configs.xielu_124m import *  # noqa: F403

tokens_per_parameter = 20
warmup_steps = 0.05
decay_steps = 0.25

eval_every = 0.05
eval_tokens = 2_000_000
