"""Programs around train.py, started by  python -m tools.NAME; --help says what each does. archive and intervals are
parts of the others."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py
