"""The comparison for a laptop's CPU, about four minutes per run on two cores:

python -m tools.compare configs/compare_cpu.py --activation=xielu,relu2,swiglu,gelu,xsilu,xatlu --seed=1,2,3
"""

from configs.demo import *  # noqa: F403

n_layers = 6  # deep enough to see the trained scalars change with depth
max_steps = 1600
eval_every = 200
