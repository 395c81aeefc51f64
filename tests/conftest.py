import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

# Beyond this many variants of one function torch.compile runs it uncompiled, and a test of compiled code tests nothing.
torch._dynamo.config.recompile_limit = 100
