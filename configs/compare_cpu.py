"""The comparison for a laptop's CPU, about two minutes per run on two cores. Its data, one of two:

python prepare_data.py fineweb-edu --tokenizer=bytes --tokens=4e7 --out=data/english

or, if you have no network but Debian's packages (ours is measured on this one):

apt-get download dict-gcide && dpkg -x dict-gcide_*.deb gcide
python prepare_data.py gcide/usr/share/dictd/gcide.dict.dz --documents=paragraphs --tokenizer=bytes --out=data/english

Then

python -m tools.compare configs/compare_cpu.py --activation=xielu,relu2,swiglu,gelu,leaky_relu2 --tune=lr=1e-3,2e-3,4e-3,8e-3 --seed=1,2,3,4,5
"""  # noqa: E501

data = "data/english"
vocab_size = 257  # 256 bytes and the delimiter between documents

# chosen among three shapes on two seeds each, which were too few: see docs/compare.md
dim = 128
n_layers = 4
n_heads = 2
n_kv_heads = 2
ffn_dim = 768  # 6 · dim, as in the 1.1B model
init_std = 0.025 * (1536 / dim) ** 0.5  # pre-activations start at the size that they have in the 1.1B model
seq_len = 256

tokens_per_step = 2048
micro_batch_size = 8
max_steps = 1500
lr = 3e-3
warmup_steps = 100
decay_steps = 500

eval_every = 250
eval_tokens = 200_000
log_every = 50
checkpoint_every = 500

device = "cpu"  # so that losses are the same, bit for bit, every time
