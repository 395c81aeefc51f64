"""README.md: its commands run, in the order in which a reader meets them, and its example of a new activation works.
What needs a GPU, a download or hours is parsed and checked as far as the programs do before they start."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import prepare_data
import train
from activations import ACTIVATIONS
from tools import bench, compare, derive, follow, hf, plot, sample

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
FENCED = [line for kind, block in FENCES if kind == "sh" for line in block.replace("\\\n", " ").splitlines()]
LINES = FENCED + [
    " ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S))
]
# every command of the README, in its order within the fences, then within the text
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
COMMANDS = [command for command in COMMANDS if re.match(r"(python|python3|torchrun|pip) ", command)]
SMALL = "--max_steps=4 --warmup_steps=0 --decay_steps=0 --eval_every=2 --eval_tokens=500 --log_every=1 --compile=False"
SMALL = SMALL.split()


def words_of(program):
    """The arguments of each command that starts this program."""
    lines = [command.partition(program)[2].split() for command in COMMANDS if program in command]
    assert lines, program
    return [[word for word in words if word != "…"] for words in lines]


def processes(command):
    """How many processes a torchrun line starts."""
    count = 1
    for number in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", command):
        count *= int(number)
    return count


def test_every_command_is_known():
    """Nothing in the README is a command that the tests below do not look at."""
    known = ("train.py", "prepare_data.py", "-m tools.", "-m pytest", "-m venv", "pip install")
    for command in COMMANDS:
        assert any(name in command for name in known), command


def test_training_commands():
    lines = [command for command in COMMANDS if "train.py" in command and "--help" not in command]
    assert len(lines) >= 6
    for command in lines:
        if "derived/" in command:  # run below
            continue
        path, *keys = command.partition("train.py")[2].split()
        if path.startswith("out/"):  # which another command makes: below
            continue
        config, options = train.read_config([str(ROOT / path), *keys])
        train.check(train.replace(config, **options), processes(command))


def test_preparing_commands():
    for words in words_of("prepare_data.py"):
        prepare_data.parse(words)


def test_from_a_run_to_transformers(tmp_path, monkeypatch, capsys, corpus, config):
    """The lines of Python in the README, on the folder that its line exports."""
    pytest.importorskip("transformers")
    section = TEXT[TEXT.index("## Use what you trained") :]
    code = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)[0]
    monkeypatch.chdir(tmp_path)
    assert train.main([str(config), "--out=out/demo", "--activation=xielu", *SMALL]) == 0
    assert hf.main(["export", "out/demo", "out/demo-hf"]) == 0
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.startswith("def ")


def test_bench_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = words_of("-m tools.bench")
    assert {words[0] for words in lines} == {"kernel", "step", "plan"}
    for name, *words in lines:
        _, others, _ = bench.read_options(name, words)
        if name == "plan":
            assert bench.main([name, *words, f"--json={tmp_path}/plan.json"]) == 0
        elif others:
            train.read_config([str(ROOT / others[0]), *others[1:]])


def test_compare_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = words_of("-m tools.compare")
    assert len(lines) >= 3
    for words in lines:
        if "smooth_relu2" not in " ".join(words) and "derived/" not in " ".join(words):  # below
            words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
            assert compare.main([*words, "--dry_run"]) == 0, capsys.readouterr().err


def test_commands_that_need_no_hours_run(tmp_path, monkeypatch, capsys):
    """Those of the fences, one after another in one folder, with few steps and little data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    # a comparison's runs in this process: test_compare.py starts them as they are
    monkeypatch.setattr(compare, "execute", lambda run, *_: (train.main(run.arguments), ""))
    mains = {
        "prepare_data.py": (prepare_data.main, ["--tokens=20000", "--val_tokens=2000"]),
        "train.py": (train.main, SMALL),
        "-m tools.compare": (compare.main, SMALL),
        "-m tools.plot": (plot.main, []),
        "-m tools.derive": (derive.main, []),
        "-m tools.sample": (sample.main, ["--tokens=5"]),
        "-m tools.follow": (follow.main, []),
    }
    if importlib.util.find_spec("transformers"):
        mains["-m tools.hf"] = (hf.main, [])
    monkeypatch.setattr(derive, "check_compiled", lambda module: None)  # test_derive.py does
    ran = []
    for command in (part for line in FENCED for part in line.split("&&")):
        for program, (main, reductions) in mains.items():
            if program in command and "smooth_relu2" not in command:
                arguments = shlex.split(command.partition(program)[2])
                reductions = [*reductions, "--seed=1"] if "derived/" in command and "--seed=" in command else reductions
                assert main([*arguments, *reductions]) in (0, None), capsys.readouterr().err
                ran.append(program)
    assert set(ran) == set(mains) and len(ran) >= 6
    assert (tmp_path / "out/compare/demo/results.md").is_file()
    assert {path.name for path in (tmp_path / "out/plot").iterdir()} >= {"loss.png", "scalars.png"}


def test_figures_of_the_readme_are_there():
    figures = re.findall(r"!\[.+?\]\((\S+\.png)\)", TEXT)
    assert len(figures) >= 3
    for figure in figures:
        assert (ROOT / figure).is_file(), figure


@pytest.mark.parametrize("name", ["compare_cpu", "derive"])
def test_the_tables_are_those_of_the_results(name):
    table = (ROOT / f"results/{name}/results.md").read_text("utf-8").partition("\n\n")[0]
    assert table.startswith("| activation") and table in TEXT


def test_an_activation_of_your_own(corpus, tmp_path):
    """Five lines in activations.py, nothing else: it trains and has its row. A copy of relu2 differs by exactly 0."""
    section = TEXT[TEXT.index("## An activation of your own") :]
    module, row = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)[:2]
    assert len(module.splitlines()) + len(row.splitlines()) == 5
    for name in ("train.py", "data.py", "model.py", "xielu.py", "activations.py", "tools", "configs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "activations.py").read_text("utf-8")
    table = "ACTIVATIONS = {\n"
    assert text.count(table) == 1
    row += '    "copy_of_relu2": Activation("max(x, 0)²", ReLUSquared),\n'
    text = text.replace(table, f"{module}\n\n{table}{row}")
    (tmp_path / "activations.py").write_text(text, "utf-8")
    line = next(command for command in COMMANDS if "smooth_relu2" in command).partition("-m")[2].split()
    sizes = ["--dim=32", "--n_layers=2", "--ffn_dim=48", "--seq_len=32", "--tokens_per_step=256", f"--data={corpus}"]
    shorter = ["--activation=relu2,smooth_relu2,copy_of_relu2", "--seed=1"]
    command = [sys.executable, "-m", *line, *SMALL, *sizes, *shorter]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out/compare/smooth/results.json").read_text())["rows"]
    differences = {row["activation"]: row["difference"] for row in rows}
    assert differences["copy_of_relu2"] == 0.0 and abs(differences["smooth_relu2"]) > 1e-6
    assert "| smooth_relu2 " in done.stdout


def test_nothing_is_left_to_fill_in():
    assert "@@" not in TEXT and "TODO" not in TEXT


def test_files_and_names_exist():
    for path in re.findall(r"\]\(([\w./]+\.(?:py|md))\)", TEXT) + re.findall(r"configs/\w+\.py", TEXT):
        assert (ROOT / path).is_file(), path
    assert {"xielu", "relu2", "swiglu"} <= set(ACTIVATIONS)


def test_tests_that_are_named_exist():
    defined = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M):
            defined[name] = path.name
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 20 and named <= set(defined), named - set(defined)


def test_links_within_the_page_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert link in anchors, link


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_says_how_to_prepare_its_data(path):
    text = path.read_text("utf-8")
    lines = text.replace("\\\n", " ").splitlines()
    lines = [line.split()[2:] for line in lines if line.startswith("python prepare_data.py")]
    assert lines or "from configs." in text
    for words in lines:
        arguments = prepare_data.parse(words)
        assert str(arguments.out).endswith(train.read_config([str(path)])[0].data)
