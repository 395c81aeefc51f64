"""Programs around train.py, each started by  python -m tools.NAME; --help says what it does."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py
