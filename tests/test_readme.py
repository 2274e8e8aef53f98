"""README's commands parse, its example runs, its tables are those of results/, its links exist."""
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import align_attention
import align_features
import bench
import finetune
import model
from demo import shapes

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"align_attention.py": align_attention, "align_features.py": align_features,
          "finetune.py": finetune}
SCRIPTS = STAGES | {"bench.py": bench}
PAGES = {name: (ROOT / name).read_text()
         for name in ("README.md", "demo/README.md", "results/README.md")}
README = PAGES["README.md"]


def commands():
    """Every call of a script on the pages, in results/*.sh and in the scripts' own docstrings. A
    shell's variable becomes its value here, any other 1."""
    blocks = re.findall(r"```sh[^\n]*\n(.*?)```", README, re.S)
    shell = [path.read_text() for path in (ROOT / "results").glob("*.sh")]
    texts = [*blocks, *shell, PAGES["demo/README.md"], *(m.__doc__ for m in SCRIPTS.values())]
    texts += re.findall(r"`(python \w+\.py[^`]*)`", "\n".join(PAGES.values()))
    values = {"@": "--data D", "data": "--teacher T --data D", "dtype": "float32", "flags": "",
              "rows": "T S", "same": "", "task": "segment --data D", "FLAGS": ""}
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\(\(.*?\)\)|\w+|@)", lambda name: values.get(name[1], "1"), line)
        for part in line.split("&&"):
            if match := re.match(r"(?: *unless \S+)? *python (\w+\.py.*)", part):
                yield " ".join(shlex.split(match[1], comments=True))


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_parses(command):
    """argparse leaves with SystemExit, a missing flag raises InputError: both fail this test."""
    script, *words = command.split()
    if script == "model.py":
        assert not words                    # it only lists what it knows
    else:
        SCRIPTS[script].parse(words)


def test_every_script_has_a_command():
    assert {command.split()[0] for command in commands()} == {*SCRIPTS, "model.py"}


def test_the_first_block_holds_the_demo_and_the_tests():
    demo, tests = re.search(r"```sh first\n(.*?)```", README, re.S)[1].strip().splitlines()
    assert all(f"python {script}" in demo for script in STAGES) and "pytest" in tests
    assert all(line.startswith("pip install -r requirements.txt") for line in (demo, tests))


def test_the_operator_of_the_page_goes_through_all_stages(tmp_path, monkeypatch):
    """README's example as it stands there, but for its last line, which runs the whole demo."""
    code = re.search(r"```python operator\n(.*?)```", README, re.S)[1].strip().splitlines()
    assert code[-1].startswith('align_attention.main(["--attention", "conv"])')
    monkeypatch.setattr(model, "ATTENTION", model.ATTENTION)
    monkeypatch.setitem(model.ATTENTION, "conv", None)
    exec("\n".join(code[:-1]), {})
    monkeypatch.chdir(ROOT)
    for part in ("train", "val"):           # a small demo
        monkeypatch.setitem(shapes.IMAGES, part, 1000)
    brief = ["--steps", "3", "--batch-size", "8"]
    teacher = model.load_vit("demo/teacher.safetensors")
    images = torch.rand(2, 3, 64, 48)
    with torch.no_grad():                   # starts equal to "linear", on grids that are not square
        assert torch.equal(model.linearize(teacher, "conv")(images),
                           model.linearize(teacher, "linear")(images))
    align_attention.main(["--attention", "conv", *brief, "--out", str(tmp_path / "one")])
    student = str(tmp_path / "one/student.safetensors")
    assert model.load_vit(student).blocks[0].attn.operator.conv.weight.any()    # it was trained
    align_features.main(["--student", student, *brief, "--out", str(tmp_path / "two")])
    student = str(tmp_path / "two/student.safetensors")
    finetune.main(["--weights", student, "--freeze", *brief, "--out", str(tmp_path / "three")])
    checkpoint = model.load_vit(tmp_path / "three/0-classify.safetensors")
    assert checkpoint.attention == "conv"
    bench.main(["attention", "--quick", "--points", "64", "--heads", "1", "--out", str(tmp_path)])
    table = next(tmp_path.glob("bench-*.csv")).read_text()
    assert ",conv," in table


def test_efficiency_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "results/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for make in tables.TABLES:
        short = make in (tables.demo, tables.short, tables.study_short)
        page = README if short else PAGES["results/README.md"]
        text = make("cpu")
        assert len(text.splitlines()) > 2 and text in page, f"{make.__name__}: results/tables.py"


def test_links_and_pictures_exist():
    for name, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name} -> {target}"


def test_layout():
    """Nothing at the top level but the files of the plan, no package but the five, no wide line."""
    top = {*STAGES, "model.py", "bench.py", "tests", "demo", "results", "README.md", "LICENSE",
           "requirements.txt", ".gitignore", ".ci"}
    packages = {re.split(r"[<>=]", line)[0]
                for line in (ROOT / "requirements.txt").read_text().split()}
    assert packages == {"torch", "torchvision", "safetensors", "tqdm", "pytest"}
    assert (ROOT / "demo/teacher.safetensors").stat().st_size <= 3_000_000
    assert len(README.split()) <= 1_400
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
        assert not wide, f"{path.name}: lines {wide} are wider than 100 columns"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {path.split("/")[0] for path in listed.stdout.split("\n") if path} <= top
