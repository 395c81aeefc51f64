"""The comparison for a laptop's CPU, about two minutes per run on two cores. Its data, one of two:

python prepare_data.py fineweb-edu --tokenizer=bytes --tokens=4e7 --out=data/english

or, if you have no network but Debian's packages (ours is measured on this one):

apt-get download dict-gcide && dpkg -x dict-gcide_*.deb gcide
python prepare_data.py gcide/usr/share/dictd/gcide.dict.dz --documents=paragraphs --tokenizer=bytes --out=data/english

Then

python -m tools.compare configs/compare_cpu.py --activation=xielu,relu2,swiglu,gelu,leaky_relu2 --tune=lr=1e-3,2e-3,4e-3,8e-3 --seed=1,2,3,4,5
"""  # noqa: E501

from configs.demo import *  # noqa: F403

data = "data/english"

# The demo's model with the proportions of the 1.1B one: ffn_dim = 6 · dim. It was chosen among three shapes on two
# seeds each, which were too few: see docs/compare.md.
ffn_dim = 768

eval_every = 250
checkpoint_every = 500
