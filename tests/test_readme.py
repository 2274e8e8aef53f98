"""README's commands parse, its examples run, its tables are those of results/, its links exist."""
import csv
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import align_attention
import align_features
import bench
import finetune
import model
from conftest import brief
from demo import shapes
from support.runs import InputError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"align_attention.py": align_attention, "align_features.py": align_features,
           "finetune.py": finetune, "bench.py": bench}
PAGES = {name: (ROOT / name).read_text()
         for name in ("README.md", "demo/README.md", "results/README.md")}
README = PAGES["README.md"]


def block(kind):
    return re.search(rf"```{kind}\n(.*?)```", README, re.S)[1]


def commands():
    """Every call of a script on the pages and in the scripts' own docstrings."""
    blocks = re.findall(r"```sh[^\n]*\n(.*?)```", "\n".join(PAGES.values()), re.S)
    texts = [*blocks, PAGES["demo/README.md"], *(script.__doc__ for script in SCRIPTS.values())]
    texts += re.findall(r"`(python \w+\.py[^`]*)`", "\n".join(PAGES.values()))
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if match := re.match(r" *python (\w+\.py.*)", part):
                words = re.sub(r"--(teacher|data) \.\.\.", r"--\1 X", match[1])
                words = words.replace("...", "--teacher T --data D")
                yield " ".join(shlex.split(words, comments=True))


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_parses(command):
    """argparse leaves with SystemExit, a missing flag raises InputError: both fail this test."""
    script, *words = command.split()
    if script == "model.py":
        assert not words                    # it only lists what it knows
    else:
        SCRIPTS[script].parse(words)
    for word in words:                      # the demo's files are here
        assert not word.startswith("demo") or (ROOT / word.partition(":")[0]).is_file()


def test_every_script_has_a_command_and_the_first_block_holds_the_demo_and_the_tests():
    assert {command.split()[0] for command in commands()} == {*SCRIPTS, "model.py"}
    demo, tests = block("sh first").strip().splitlines()
    stages = SCRIPTS.keys() - {"bench.py"}
    assert all(f"python {stage}" in demo for stage in stages) and "pytest" in tests
    assert all(line.startswith("pip install -r requirements.txt") for line in (demo, tests))


def test_the_operator_of_the_page_trains_in_stage_1(tmp_path, monkeypatch):
    """The block as it stands there, up to the line that runs the whole demo."""
    code, run = block("python operator").split('if __name__ == "__main__":')
    assert 'align_attention.main(["--attention", "conv", *sys.argv[1:]])' in run
    monkeypatch.setitem(model.ATTENTION, "conv", None)      # taken back after this test
    exec(code, {"__name__": "own"})
    monkeypatch.chdir(ROOT)
    for part in ("train", "val"):           # a small demo
        monkeypatch.setitem(shapes.IMAGES, part, 1000)
    teacher, images = model.load_vit("demo/teacher.safetensors"), torch.rand(2, 3, 64, 48)
    with torch.no_grad():                   # starts equal to "linear", on grids that are not square
        assert torch.equal(model.linearize(teacher, "conv")(images),
                           model.linearize(teacher, "linear")(images))
    align_attention.main(["--attention", "conv", "--steps", "3", "--batch-size", "8",
                          "--out", str(tmp_path / "one")])
    student = model.load_vit(tmp_path / "one/student.safetensors")
    assert student.blocks[0].attn.operator.conv.weight.any()


def test_the_lines_that_use_a_student_run(tmp_path, monkeypatch):
    (tmp_path / "runs/features").mkdir(parents=True)
    shutil.copy(ROOT / "demo/teacher.safetensors", tmp_path / "runs/features/student.safetensors")
    Image.new("RGB", (90, 70), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("python use"), names)
    assert names["tokens"].shape == (1, 1 + 28 ** 2, 96)


def test_tables_are_those_of_the_results():
    for text in runpy.run_path(ROOT / "results/tables.py")["tables"]():
        assert len(text.splitlines()) > 2 and any(text in page for page in PAGES.values()), text


def test_links_and_pictures_exist():
    for name, text in PAGES.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name} -> {target}"


def call_script(monkeypatch, name, *flags):
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    runpy.run_path(ROOT / "results" / name)["main"]()


def test_agreement_over_sizes_begins_with_what_stage_2_measured(files, chain, monkeypatch, capsys):
    call_script(monkeypatch, "sizes.py", "--teacher", files / "teacher.safetensors", "--data",
                files / "photos", "--size", 32, 48, "--dtype", "float32",
                f"two={chain / 'two/student.safetensors'}")
    first, larger = csv.DictReader(capsys.readouterr().out.splitlines()[-3:])
    after = json.loads((chain / "two/report.json").read_text())["after"]
    assert float(first["cls_cosine"]) == pytest.approx(after["cls_cosine"], abs=1e-4)
    assert first["size"] == "32" and larger["size"] == "48" and first != larger


def test_pairs_score_as_stage_3_and_a_pair_of_one_does_not_differ(files, tmp_path, capsys,
                                                                  monkeypatch):
    brief(finetune, files, tmp_path / "a", "--steps", 1)
    file = tmp_path / "a/0-classify.safetensors"
    call_script(monkeypatch, "pairs.py", "--data", files / "classify", "--dtype", "float32",
                "--one", file, file, "--two", file)
    score = json.loads((tmp_path / "a/metrics.json").read_text())[0]["score"]
    assert (f"one {score:.2f}, two {score:.2f}, difference +0.00, standard error 0.00"
            in capsys.readouterr().out)
    for part in ("train", "val"):
        shutil.copytree(files / "classify" / part / "blue", tmp_path / "data" / part / "cat")
        shutil.copytree(files / "classify" / part / "red", tmp_path / "data" / part / "dog")
    with pytest.raises(InputError, match="has the classes"):
        call_script(monkeypatch, "pairs.py", "--data", tmp_path / "data", "--one", file, "--two",
                    file)


def test_imports_go_one_way():
    allowed = {"model.py": {"support"}} | dict.fromkeys(SCRIPTS, {"model", "support", "demo"})
    own = {"model", "support", "demo"} | {name.removesuffix(".py") for name in SCRIPTS}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.M))
        assert own & imported <= allowed.get(path.name, {"support", "demo"}), path.name


def test_files_and_packages_are_those_of_the_plan_and_no_line_is_wide():
    assert {path.name for path in ROOT.glob("*.py")} == {*SCRIPTS, "model.py"}
    packages = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M)
    assert packages == ["torch", "torchvision", "safetensors", "tqdm", "pytest"]
    assert (ROOT / "demo/teacher.safetensors").stat().st_size <= 3_000_000
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("results/*.sh")]:
        wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
        assert not wide, f"{path.name}: lines {wide} are wider than 100 columns"
        if path.suffix == ".sh":
            assert subprocess.run(["bash", "-n", path]).returncode == 0, path.name
