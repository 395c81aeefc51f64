"""Programs around train.py, each started by  python -m tools.NAME; --help says what it does."""
