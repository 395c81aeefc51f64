"""The comparison at GPT-2's size, for one GPU with bf16: 629 million tokens per run. Its data:

python prepare_data.py fineweb-edu --tokenizer=gpt2 --tokens=2.6e9 --val_tokens=1e7 --out=data/fineweb-edu-gpt2

python -m tools.compare configs/compare_124m.py --activation=xielu,relu2,swiglu --tune=lr=5e-4,1e-3,2e-3,4e-3 --seed=1,2,3

A run costs what  python -m tools.bench plan configs/compare_124m.py --gpus=1  says; these are 21 runs or a few more.
"""  # noqa: E501

from configs.xielu_124m import *  # noqa: F403

max_steps = 1200
warmup_steps = 100
decay_steps = 400
