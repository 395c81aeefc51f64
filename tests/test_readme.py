"""README.md and docs/: their commands run, in the order in which a reader meets them, and their example of a new
activation works. What needs a GPU, a download or hours is parsed and checked as far as the programs do before they
start."""

import importlib.util
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

import prepare_data
import train
import xielu
from plumbing import machine
from runs import ROOT
from test_compare import in_this_process, rows_of
from tools import bench, compare
from train import Config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, *_ = TEXTS = [path.read_text("utf-8") for path in PAGES]
TEXT = "\n".join(TEXTS)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def lines(kind):
    """The lines of all fences of this kind; sh: they run below, bash: they need GPUs or hours."""
    blocks = [block for found, block in FENCE.findall(TEXT) if found == kind]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


CELLS = [line.removeprefix("!") for line in lines("") if line.startswith("!")]  # of a notebook
INLINE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", TEXT))]
COMMANDS = [
    part.strip() for line in lines("sh") + lines("bash") + CELLS + INLINE for part in re.split(r"&&|\|\|", line)
]
COMMANDS = [command for command in COMMANDS if re.match(r"(srun [-=a-z]+ )?(python3?|torchrun|pip|uv) ", command)]
SMALL = "--max_steps=2 --warmup_steps=0 --decay_steps=0 --eval_every=1 --eval_tokens=500 --log_every=1 --compile=False"
SMALL = [*SMALL.split(), "--tokens_per_step=256", "--micro_batch_size=1"]


def words_of(program):
    """The arguments of each command that starts this program."""
    return [command.partition(program)[2].split() for command in COMMANDS if program in command]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The folder of the test, with the configs in it, is where its commands run."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "linear_speed", lambda dtype: 1e11)
    return tmp_path


def test_the_readme_is_short():
    assert len(README.split()) <= 1700


def test_every_command_is_known():
    """The pages have no command that the tests below do not look at."""
    known = ("train.py", "prepare_data.py", "-m tools.", "-m pytest", "-m venv", "pip install")
    for command in COMMANDS:
        assert any(name in command for name in known), command


def test_training_commands(elsewhere):
    found = [command for command in COMMANDS if "train.py configs/" in command and "derived/" not in command]
    found += re.findall(r"torchrun .* configs/\S+", train.__doc__)
    assert len(found) >= 8
    for command in found:
        values, options = Config.read_command(command.partition("train.py")[2].split())
        processes = math.prod(map(int, re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", command)))
        Config(**(values | options)).check_batch(processes)


def test_preparing_commands():
    assert (found := words_of("prepare_data.py"))
    for words in found:
        prepare_data.parse(words)


def test_bench_commands(elsewhere):
    found = words_of("-m tools.bench")
    assert {words[0] for words in found} == {"kernel", "step", "plan"}
    for words in found:
        assert bench.read_options(words)


def test_compare_commands(elsewhere, capsys):
    found = words_of("-m tools.compare")
    assert len(found) >= 4
    for words in found:
        if "smooth_relu2" not in " ".join(words) and "derived/" not in " ".join(words):  # below
            assert compare.main([*words, "--dry_run"]) == 0, capsys.readouterr().err


def test_commands_that_need_no_hours_run(elsewhere, monkeypatch, capsys):
    """Those of the sh fences, one after another in one folder, with few steps and little data."""
    # a comparison's runs in this process: test_compare.py starts them as they are
    monkeypatch.setattr(compare, "launch", in_this_process)
    monkeypatch.setattr(xielu, "can_compile", lambda kind: False)  # test_derive.py compiles what derive writes
    fewer = dict.fromkeys(["tools.plot", "tools.derive", "tools.follow", "tools.hf", "tools.check"], [])
    fewer |= {"train": SMALL, "tools.compare": SMALL, "tools.sample": ["--tokens=5"]}
    fewer["prepare_data"] = ["--tokens=20000", "--val_tokens=2000"]
    if not importlib.util.find_spec("transformers"):
        del fewer["tools.hf"], fewer["tools.check"]
    ran = set()
    for command in (part for line in lines("sh") for part in line.split("&&")):
        _, *arguments = shlex.split(command.replace(" -m ", " "))
        program = arguments.pop(0).removesuffix(".py") if arguments else ""
        if program in fewer and "smooth_relu2" not in command:
            arguments += fewer[program] + (["--seed=1"] if "derived/" in command and "--seed=" in command else [])
            assert importlib.import_module(program).main(arguments) in (0, None), capsys.readouterr().err
            ran.add(program)
    assert ran == set(fewer)
    assert (elsewhere / "out/compare/demo/results.md").is_file()
    assert {path.name for path in (elsewhere / "out/plot").iterdir()} >= {"loss.png", "scalars.png"}
    if "tools.hf" in ran:  # the lines of Python, on the folder that the line before them exported
        capsys.readouterr()
        code = next(block for kind, block in FENCE.findall(TEXT) if kind == "python" and "transformers" in block)
        exec(code, {})
        assert capsys.readouterr().out.startswith("def ")


@pytest.mark.parametrize("name", ["bench", "check", "compare", "derive", "follow", "hf", "plot", "sample", "vectors"])
def test_a_tool_that_is_started_as_a_file(name, capsys):
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"))
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: start it as  python -m tools.{name}\n"


def test_an_activation_of_your_own(corpus, tmp_path):
    """Five lines in activations.py, nothing else: it trains and has its row. A copy of relu2 differs by exactly 0."""
    module, row = [block for kind, block in FENCE.findall(README) if kind == "python"]
    assert len(module.splitlines()) + len(row.splitlines()) == 5
    for path in [*ROOT.glob("*.py"), ROOT / "tools", ROOT / "plumbing", ROOT / "configs"]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    text = (tmp_path / "activations.py").read_text("utf-8")
    table = "ACTIVATIONS = {\n"
    assert text.count(table) == 1
    row += '    "copy_of_relu2": Activation("max(x, 0)²", ReLUSquared),\n'
    (tmp_path / "activations.py").write_text(text.replace(table, f"{module}\n\n{table}{row}"), "utf-8")
    line = next(command for command in COMMANDS if "smooth_relu2" in command).partition("-m")[2].split()
    sizes = ["--dim=32", "--n_layers=2", "--ffn_dim=48", "--seq_len=32", "--tokens_per_step=256", f"--data={corpus}"]
    shorter = ["--activation=relu2,smooth_relu2,copy_of_relu2", "--seed=1"]
    command = [sys.executable, "-m", *line, *SMALL, *sizes, *shorter]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    differences = {name: row["difference"] for name, row in rows_of(tmp_path / "out/compare/smooth").items()}
    assert differences["copy_of_relu2"] == "0.0" and abs(float(differences["smooth_relu2"])) > 1e-6
    assert "| smooth_relu2 " in done.stdout


def test_the_table_is_that_of_the_results():
    table = re.search(r"(^\|.*\n)+", (ROOT / "results/compare_english/results.md").read_text("utf-8"), re.M)[0]
    assert table.startswith("| activation") and table in TEXT


def test_the_differences_are_those_of_the_results():
    results = "\n".join(path.read_text("utf-8") for path in (ROOT / "results").glob("*/results.md"))
    cited = set(re.findall(r"[+-]0\.\d{4} \[[^]]*\]", " ".join(TEXT.split())))
    assert len(cited) > 10
    for difference in cited:
        assert difference in results, difference


def test_the_diagram_of_imports():
    """Each file imports what stands to the left of its arrow in the README, its own room, and nothing else of ours."""
    diagram = next(block for _, block in FENCE.findall(README) if "→" in block)
    rooms = {}
    for line in diagram.splitlines():
        steps = [part.strip() for part in line.split("→")]
        for place, room in enumerate(steps):
            rooms[room] = {*steps[: place + 1], *rooms.get(room, ())}
    assert set(rooms) == {path.stem for path in ROOT.glob("*.py")} | {"plumbing", "tools"}
    for room, allowed in rooms.items():
        for path in sorted((ROOT / room).glob("*.py")) or [ROOT / f"{room}.py"]:
            imported = set(re.findall(r"^(?:from|import) (\w+)", path.read_text("utf-8"), re.M)) & rooms.keys()
            assert imported <= allowed, path


def test_tests_that_are_named_exist():
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named, defined = set(re.findall(r"`(test_\w+)`", TEXT)), set(re.findall(r"^def (test_\w+)", tests, re.M))
    assert len(named) > 20 and named <= defined, named - defined


@pytest.mark.parametrize("page", [*PAGES, ROOT / "results/README.md"], ids=lambda path: path.parent.name + path.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text("utf-8")))
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert name.startswith("https:") or target.exists(), link
        if anchor and not name.startswith("https:"):
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", target.read_text("utf-8")), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}, link


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_config_says_how_to_prepare_its_data(path):
    text = path.read_text("utf-8").replace("\\\n", " ")
    found = [line.split()[2:] for line in text.splitlines() if line.startswith("python prepare_data.py")]
    assert found or "from configs." in text
    for words in found:
        assert str(prepare_data.parse(words).out).endswith(Config.read_command([str(path)])[0]["data"])
