"""GPT-2's size on 2.5 billion tokens of FineWeb-Edu, for one GPU with bf16. Its data (5 GB of shards):

python prepare_data.py fineweb-edu --tokenizer=gpt2 --tokens=2.6e9 --val_tokens=1e7 --out=data/fineweb-edu-gpt2
"""

data = "data/fineweb-edu-gpt2"
vocab_size = 50304  # 50257 padded to a multiple of 64

activation = "xielu"
dim = 768
n_layers = 12
n_heads = 12
n_kv_heads = 12
ffn_dim = 3072
init_std = 0.025 * (1536 / dim) ** 0.5  # pre-activations start at the size that they have in the 1.1B model
seq_len = 1024

tokens_per_step = 524_288  # 512 sequences: 16 × 32 on one GPU, 16 × 4 × 8 on eight
micro_batch_size = 16  # lower it if memory is short; the losses stay the same up to rounding
max_steps = 4768
lr = 1e-3
warmup_steps = 300
decay_steps = 1000

eval_every = 250
eval_tokens = 10_000_000
log_every = 10
checkpoint_every = 250
