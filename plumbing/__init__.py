"""Helpers of train.py and prepare_data.py. Of the files in the root they import only xielu.py.

command.py    a mistake becomes one line and a status
files.py      files that are never half written, folders that have one writer
config.py     keys with limits, read from a Python file and the command line
machine.py    processes, device, dtype, and what stops them all together
run.py        the folder of a run: config.json, log.jsonl, ckpt.pt
data.py       token shards; the batch as a function of (seed, step)
unfinished.py    a folder of shards that is being written
sources.py, tokenizer.py    where documents come from, and how they become tokens
inverted.py   xIELU that keeps its output instead of its input
"""
