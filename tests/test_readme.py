"""The pages say nothing that the code does not take, and the layout is the one that README shows."""
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import align_attention
import align_features
import finetune

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"align_attention.py": align_attention, "align_features.py": align_features, "finetune.py": finetune}
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "demo/README.md")}
README = PAGES["README.md"]


def commands():
    """Every call of a stage in README's shell blocks, the demo's page and the stages' own docstrings, as words."""
    texts = ["\n".join(re.findall(r"```sh[^\n]*\n(.*?)```", README, re.S)), PAGES["demo/README.md"], *(m.__doc__ for m in STAGES.values())]
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if match := re.match(r" *python (\w+\.py.*)", part):
                yield " ".join(shlex.split(match[1], comments=True))


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_parses(command):
    """argparse leaves with SystemExit, and a missing flag raises InputError: both fail this test."""
    script, *words = command.split()
    STAGES[script].parse(words)


def test_every_stage_has_a_command():
    assert {command.split()[0] for command in commands()} == set(STAGES)


def test_the_first_block_holds_the_demo_and_the_tests():
    demo, tests = re.search(r"```sh first\n(.*?)```", README, re.S)[1].strip().splitlines()
    assert all(f"python {script}" in demo for script in STAGES) and demo.startswith("pip install -r requirements.txt")
    assert "pytest" in tests and tests.startswith("pip install -r requirements.txt")


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
