"""The paper's 3B run: 48,000 steps of 2,621,440 tokens, 126 billion in all; data as for xielu_1b.py."""

from configs.xielu_1b import *  # noqa: F403

dim = 2048
n_layers = 36
ffn_dim = 12288
tie_embeddings = False

tokens_per_step = 640 * 4096
# float32 weights, gradients and AdamW's two moments alone take 45 GiB of each GPU; keeping 0.9 of what the layers would
# keep makes room for a second sequence
micro_batch_size = 2
memory_budget = 0.9
max_steps = 48_000
lr = 7e-4
decay_steps = 10_000
