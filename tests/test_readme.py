"""The pages say nothing that the code does not take, and the layout is the one that README shows."""
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import align_attention
import align_features
import bench
import finetune

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"align_attention.py": align_attention, "align_features.py": align_features, "finetune.py": finetune}
SCRIPTS = STAGES | {"bench.py": bench}
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "demo/README.md")}
README = PAGES["README.md"]


def commands():
    """Every call of a script in README's shell blocks, the demo's page, results/*.sh and the scripts' own docstrings, as words."""
    texts = ["\n".join(re.findall(r"```sh[^\n]*\n(.*?)```", README, re.S)), PAGES["demo/README.md"], *(m.__doc__ for m in SCRIPTS.values()),
             (ROOT / "results/bench.sh").read_text()]
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if match := re.match(r" *python (\w+\.py.*)", part):
                yield " ".join(shlex.split(match[1], comments=True))


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_parses(command):
    """argparse leaves with SystemExit, and a missing flag raises InputError: both fail this test."""
    script, *words = command.split()
    if script == "model.py":
        assert not words                      # it only lists what it knows
    else:
        SCRIPTS[script].parse(words)


def test_every_script_has_a_command():
    assert {command.split()[0] for command in commands()} == {*SCRIPTS, "model.py"}


def test_the_first_block_holds_the_demo_and_the_tests():
    demo, tests = re.search(r"```sh first\n(.*?)```", README, re.S)[1].strip().splitlines()
    assert all(f"python {script}" in demo for script in STAGES) and demo.startswith("pip install -r requirements.txt")
    assert "pytest" in tests and tests.startswith("pip install -r requirements.txt")


def test_efficiency_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "results/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for make in tables.TABLES:
        assert len(make("cpu").splitlines()) > 2 and make("cpu") in README, f"{make.__name__}: python results/tables.py"


def test_links_and_pictures_exist():
    for name, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name} -> {target}"


def test_layout():
    """Nothing at the top level but the files of the project's plan; no package but the five."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.split("\n") if path}
    assert top <= {*STAGES, "model.py", "bench.py", "tests", "demo", "results", "README.md", "LICENSE", "requirements.txt",
                   ".gitignore", ".ci"}
    packages = {re.split(r"[<>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert packages == {"torch", "torchvision", "safetensors", "tqdm", "pytest"}
    assert (ROOT / "demo/teacher.safetensors").stat().st_size <= 3_000_000
