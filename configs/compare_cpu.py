"""The comparison for a CPU: 0.2 million parameters with the proportions of the 1.1B model, on budgets of up to 111
tokens per parameter, the paper's ratio. Its data, one of two:

python prepare_data.py fineweb-edu --tokenizer=bytes --tokens=4e7 --out=data/english

or, if you have no network but Debian's packages (our results are from it):

apt-get download dict-gcide && dpkg -x dict-gcide_*.deb gcide && zcat gcide/usr/share/dictd/gcide.dict.dz > gcide.txt
python prepare_data.py gcide.txt --documents=paragraphs --tokenizer=bytes --out=data/english

docs/compare.md explains our comparison; results/ladder/results.md has its command.
"""

from configs.demo import *  # noqa: F403

data = "data/english"

dim = 64
n_layers = 3
n_heads = 2
n_kv_heads = 2
ffn_dim = 6 * dim
init_std = 0.025 * (1536 / dim) ** 0.5  # pre-activations start at the size that they have in the 1.1B model

tokens_per_step = 4096
micro_batch_size = 16
tokens_per_parameter = 14
warmup_steps = 0.05
decay_steps = 0.25

eval_every = 0.05  # 20 points on a curve
eval_tokens = 65_536
checkpoint_every = 500
