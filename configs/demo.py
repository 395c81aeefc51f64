"""A small byte-level model of Python source, for a laptop's CPU:  python prepare_data.py stdlib"""

data = "data/stdlib"
vocab_size = 257

dim = 192
n_layers = 4
n_heads = 6
n_kv_heads = 6
ffn_dim = 768
seq_len = 256

tokens_per_step = 8192
micro_batch_size = 32
max_steps = 500
lr = 3e-3
warmup_steps = 50
decay_steps = 150

eval_every = 100
eval_tokens = 200_000
log_every = 10
checkpoint_every = 100
