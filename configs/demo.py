"""A small model of Python source code, byte by byte, for a laptop's CPU. Its data:

python prepare_data.py stdlib
"""

data = "data/stdlib"
vocab_size = 257  # 256 bytes and the delimiter between documents

dim = 128
n_layers = 4
n_heads = 2
n_kv_heads = 2
ffn_dim = 576  # a multiple of 3, so that a gated activation fits too
init_std = 0.025 * (1536 / dim) ** 0.5  # pre-activations start at the size that they have in the 1.1B model
seq_len = 256

tokens_per_step = 2048
micro_batch_size = 8
max_steps = 1500
lr = 3e-3
warmup_steps = 1 / 15  # shares of max_steps, so that --max_steps=300 alone makes a shorter run
decay_steps = 1 / 3

eval_every = 0.05  # 20 points on a curve; costs a tenth of the run
eval_tokens = 40_960
log_every = 50
checkpoint_every = 250

device = "cpu"  # so that losses are the same, bit for bit, every time
