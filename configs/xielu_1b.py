"""The paper's 1.1B run: 70,000 steps of 1,802,240 tokens, 126 billion in all, with its sizes and schedule.
Its data (uint32 shards, 508 GB on disk):

pip install mistral-common
python prepare_data.py fineweb-edu --subset=sample-350BT --tokenizer=tekken --tokens=127e9 --val_tokens=1e7 \
    --out=data/fineweb-edu-tekken

torchrun --nproc_per_node=8 train.py configs/xielu_1b.py

docs/running.md has a script for a SLURM cluster.
"""

data = "data/fineweb-edu-tekken"
vocab_size = 147456  # as the authors padded it; the tokenizer has 131072 ids

activation = "xielu"
dim = 1536
n_layers = 24
n_heads = 16
n_kv_heads = 16
ffn_dim = 9216
seq_len = 4096
rope_theta = 500_000
norm_eps = 1e-6
tie_embeddings = True
init_std = 0.025

tokens_per_step = 440 * 4096
micro_batch_size = 5  # 440 sequences are 5 × 88 on one GPU, 5 × 11 on each of eight, 5 × 1 on each of 88
max_steps = 70_000
lr = 8e-4
warmup_steps = 2000
decay_steps = 14_500
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
seed = 42
dtype = "bfloat16"

eval_every = 1000
eval_tokens = 10_000_000
log_every = 10
checkpoint_every = 500
