"""What the tests share: path, one thread, the folder of real weights and photos, and helpers."""
import contextlib
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                     # before torch: forks with a pool hang
if "ADALA_GPU" not in os.environ:       # all but test_cuda.py test what a CPU repeats bit for bit,
    os.environ["CUDA_VISIBLE_DEVICES"] = ""             # and forks of what sees a GPU cannot train
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import align_attention
import align_features
import finetune
from model import Architecture, ViT, load_vit, save_vit
from support.runs import InputError

torch.set_num_threads(1)                                # small tensors: more threads only wait


def pytest_collection_modifyitems(items):
    """Runs first: they fork, and a fork hangs once other tests have left threads behind."""
    items.sort(key=lambda item: "test_runs.py" not in item.nodeid)


@pytest.fixture(scope="session")
def shared():
    """A folder, no part of the project: a real ViT, the official modules' outputs on it, photos."""
    if "ADALA_SHARED" not in os.environ:
        pytest.skip("needs real weights: set ADALA_SHARED to a folder of weights/, golden/, data/")
    return Path(os.environ["ADALA_SHARED"])


TINY = Architecture(width=64, depth=2, heads=1, hidden=96, patch=4, grid=(3, 3))


def seeded(*shape, seed=0, dtype=torch.float32):
    """Normal noise that depends on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(found, truth):
    """Relative RMS error."""
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def randomise(module, seed=0):
    """Every parameter random, biases and norms too: none is forgotten or exchanged unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            whole = p.ndim == 1 or p.shape[0] == 1      # bias, norm, token or table; else a product
            p.normal_(std=1 if whole else p[0].numel() ** -0.5, generator=generator)
    return module.eval()


def same(a, b):
    """Two models hold the same tensors, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(call, *args, **more):
    """The message of the InputError that this call ends with, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **more)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- The three stages on tiny random ViTs and photos

ARCH = Architecture(64, 2, 2, 128, patch=8, grid=(4, 4), registers=1, layerscale=True)
STAGES = align_attention, align_features, finetune
SIZE = 32                                               # pixels: the grid of ARCH
BRIEF = ["--size", SIZE, "--steps", 3, "--batch-size", 4, "--dtype", "float32"]


def random_vit(seed=0, attention="softmax", **change):
    """All tensors random, of such size that attention is uneven and no gradient is zero."""
    torch.manual_seed(seed)
    vit = ViT(replace(ARCH, **change), attention)
    with torch.no_grad():
        for name, tensor in vit.named_parameters():
            if ".operator." in name:
                continue                                # starts as its own class says
            spread = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.25
            scale = name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma"))
            tensor.copy_(scale + spread * torch.randn_like(tensor))
    return vit


def random_images(n=3):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def call(stage, *argv):
    """main() of a stage in this process -> what it printed. Numbers and paths may be flags."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        stage.main([str(word) for word in argv])
    return out.getvalue()


def brief(stage, files, out, *flags):
    """main() on the fixture's files, three steps if the flags say nothing else."""
    name, data = ("weights", "classify") if stage is finetune else ("teacher", "photos")
    return call(stage, f"--{name}", files / "teacher.safetensors", "--data", files / data, *BRIEF,
                *flags, "--out", out)


def moved(before, after):
    """Names of the tensors of two state dicts that are not bit for bit the same."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def report_of(out):
    return json.loads((out / "report.json").read_text())


def student_of(out):
    return load_vit(out / "student.safetensors")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """teacher.safetensors, photos/, classify/ and segment/ (ids 0, 7 and 255). Only to be read."""
    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    save_vit(random_vit(), folder / "teacher.safetensors")

    def write(path, pixels):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(pixels)).save(path)

    def noise(*shape):
        return random.integers(0, 160, shape)

    for i in range(12):                 # of both orientations and formats, in folders of folders
        path = folder / f"photos/album{i % 3}/{i}.{('jpg', 'png')[i % 2]}"
        write(path, noise(40, 48, 3) if i % 4 else noise(48, 40, 3))
    write(folder / "photos/grey.png", noise(40, 48))
    several = [(SIZE, SIZE), (SIZE, 48), (56, 40)]
    for part, n, shapes in (("train", 8, [(40, 48)]), ("val", 5, several)):
        for i in range(n):
            shape = shapes[i % len(shapes)]
            write(folder / f"classify/{part}/blue/{i}.jpg", noise(40, 48, 3) * (0.2, 0.4, 1))
            write(folder / f"classify/{part}/red/{i}.jpg", noise(40, 48, 3) * (1, 0.4, 0.2))
            pixels, mask = noise(*shape, 3), np.zeros(shape)
            left = random.integers(0, shape[1] // 2)
            area = slice(8, 8 + shape[0] // 2), slice(left, left + shape[1] // 2)
            pixels[area] += 95
            mask[area], mask[:2] = 7, 255
            write(folder / f"segment/{part}/images/{i}.jpg", pixels)
            write(folder / f"segment/{part}/masks/{i}.png", mask)
    return folder


@pytest.fixture(scope="session")
def chain(files, tmp_path_factory):
    """teacher.safetensors, one/ (stage 1) and two/ (stage 2 on its student). Only to be read."""
    out = tmp_path_factory.mktemp("chain")
    shutil.copy(files / "teacher.safetensors", out)
    brief(align_attention, files, out / "one")
    brief(align_features, files, out / "two", "--student", out / "one/student.safetensors")
    return out
