"""The comparison for a laptop's CPU, less than a minute per run on two cores. Its data, one of two:

python prepare_data.py fineweb-edu --tokenizer=bytes --tokens=4e7 --out=data/english

or, if you have no network but Debian's packages (ours is measured on this one):

apt-get download dict-gcide && dpkg -x dict-gcide_*.deb gcide
python prepare_data.py gcide/usr/share/dictd/gcide.dict.dz --documents=paragraphs --tokenizer=bytes --out=data/english

Then

python -m tools.compare configs/compare_cpu.py --activation=xielu,relu2,swiglu,gelu,leaky_relu2 --tune=lr=1e-3,2e-3,4e-3,8e-3 --tune_seeds=101,102 --seed=1,2,3,4,5,6,7,8,9,10,11,12
"""  # noqa: E501

from configs.demo import *  # noqa: F403

data = "data/english"

# The demo's model with the proportions of the 1.1B one, ffn_dim = 6 · dim, on a third of its tokens: docs/compare.md
# says why.
ffn_dim = 768

max_steps = 500
warmup_steps = 50
decay_steps = 167

eval_every = 250
