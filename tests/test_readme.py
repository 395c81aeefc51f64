"""README.md: what it says can be run, can be."""

import re
from pathlib import Path

from activations import ACTIVATIONS
from prepare_data import parse
from tools import bench
from train import check, read_config, replace

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"`([^`\n]*(?:train|prepare_data)\.py [^`\n]*)`|^(.*requirements.*)$", TEXT, re.M)
COMMANDS = [part.strip() for pair in COMMANDS for text in pair for part in text.split("&&") if part.strip()]


def test_every_command_is_one_that_the_programs_take():
    seen = 0
    for command in COMMANDS:
        words = command.split()
        if "prepare_data.py" in words:
            parse(words[words.index("prepare_data.py") + 1 :])
            seen += 1
        elif "train.py" in words and "--help" not in words:
            path, *keys = words[words.index("train.py") + 1 :]
            config, options = read_config([str(ROOT / path), *keys])
            world = 1
            for name in ("nnodes", "nproc_per_node"):
                world *= int((re.search(rf"--{name}=(\d+)", command) or [1, 1])[1])
            check(replace(config, **options), world)
            seen += 1
    assert seen >= 9


def test_every_bench_is_one_that_the_tool_takes(tmp_path):
    commands = re.findall(r"`python -m tools\.bench ([^`\n]*)`", TEXT)
    assert {command.split()[0] for command in commands} == {"kernel", "step", "plan"}
    for command in commands:
        name, *words = command.split()
        _, others, _ = bench.read_options(name, words)
        if name == "plan":
            assert bench.main([name, *words, f"--json={tmp_path}/plan.json"]) == 0
        elif others:
            read_config([str(ROOT / others[0]), *others[1:]])


def test_nothing_is_left_to_fill_in():
    assert "@@" not in TEXT and "TODO" not in TEXT


def test_files_and_names_exist():
    for path in re.findall(r"\]\(([\w./]+\.py)\)", TEXT) + re.findall(r"configs/\w+\.py", TEXT):
        assert (ROOT / path).is_file(), path
    assert {"xielu", "relu2", "swiglu"} <= set(ACTIVATIONS)


def test_every_config_says_how_to_prepare_its_data():
    for path in (ROOT / "configs").glob("*.py"):
        text = path.read_text("utf-8")
        lines = text.replace("\\\n", " ").splitlines()
        lines = [line.split()[2:] for line in lines if line.startswith("python prepare_data.py")]
        assert lines or "from configs." in text
        for words in lines:
            arguments = parse(words)
            assert str(arguments.out).endswith(read_config([str(path)])[0].data)
