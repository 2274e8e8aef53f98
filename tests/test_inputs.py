"""What the user may get wrong: each stage refuses it before it starts, in one line, and leaves nothing behind.

In this process an InputError is the answer; the last tests start the real scripts and look at stderr and exit code.
"""
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import align_attention
import align_features
import finetune
import model
from model import Architecture, InputError, ViT, linearize, save_vit, sha256

ROOT = Path(__file__).resolve().parent.parent
ARCH = Architecture(width=64, depth=2, heads=2, hidden=128, patch=8, grid=(4, 4))
MODULES = {"attention": align_attention, "features": align_features, "classify": finetune, "segment": finetune}
FOLDER = {"attention": "photos", "features": "photos", "classify": "classify", "segment": "segment"}
every_stage = pytest.mark.parametrize("stage", MODULES)
unlabelled = pytest.mark.parametrize("stage", ("attention", "features"))


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """ARCH is a known architecture, so that files without our header are recognised by their shapes."""
    monkeypatch.setitem(model.KNOWN, "tiny", model.Known(ARCH, "tiny", "mit"))


@pytest.fixture
def files(tmp_path):
    """A good softmax file, a student of it, and photos for each stage, which the tests then damage."""
    random = np.random.default_rng(0)

    def image(path, channels=(3,)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 2 if channels == () else 256, (40, 48, *channels), dtype=np.uint8)).save(path)

    torch.manual_seed(0)
    teacher = ViT(ARCH)
    save_vit(teacher, tmp_path / "teacher.safetensors")
    save_vit(linearize(teacher), tmp_path / "student.safetensors", stage="attention",
             teacher={"file": tmp_path / "teacher.safetensors", "sha256": sha256(tmp_path / "teacher.safetensors")})
    for i in range(3):
        image(tmp_path / "photos" / f"{i}.{('jpg', 'png')[i % 2]}")
        for part in ("train", "val"):
            image(tmp_path / "classify" / part / "ab"[i % 2] / f"{i}.jpg")
            image(tmp_path / "segment" / part / "images" / f"{i}.jpg")
            image(tmp_path / "segment" / part / "masks" / f"{i}.png", ())
    return tmp_path


def argv_of(stage, files, **flags):
    """The words of a good, short run; a flag may be changed, added, dropped (None) or given without a value (True)."""
    argv = dict(weights=files / "teacher.safetensors", data=files / FOLDER[stage], size=32, steps=2, batch=2, out=files / "out")
    if MODULES[stage] is finetune:
        argv["task"] = stage
    words = []
    for flag, value in (argv | flags).items():
        if value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += ["--" + flag.replace("_", "-"), *(str(v) for v in values)]
    return words


def call(stage, words):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        MODULES[stage].main(words)


def refused(stage, files, *says, **flags):
    """The run ends in an InputError of one line that says each of `says`, and --out was not created."""
    with pytest.raises(InputError) as caught:
        call(stage, argv_of(stage, files, **flags))
    message = str(caught.value)
    assert message.strip() and "\n" not in message
    for word in says:
        assert str(word) in message
    assert not (files / "out").exists()


@every_stage
def test_the_run_without_damage_is_good(files, stage):
    """Or the tests below would prove nothing."""
    call(stage, argv_of(stage, files))
    assert list((files / "out").glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Weight files

def tensors():
    return ViT(ARCH).state_dict()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def written(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def bytes_of(path, content):
    path.write_bytes(content)
    return path


RESNET = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3), "fc.weight": torch.zeros(10, 64)}
SWAP = {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}
WEIGHTS = {                                   # what is wrong: (a function that writes the file, what the message says)
    "missing safetensors": (lambda folder: folder / "none.safetensors", ()),
    "missing pth": (lambda folder: folder / "none.pth", ()),
    "a folder": (lambda folder: folder, ()),
    "an unknown name": (lambda folder: Path("vit_tiny_of_nobody"), ("known name",)),
    "empty safetensors": (lambda folder: bytes_of(folder / "bad.safetensors", b""), ()),
    "empty pth": (lambda folder: bytes_of(folder / "bad.pth", b""), ()),
    "junk safetensors": (lambda folder: bytes_of(folder / "bad.safetensors", b"junk" * 99), ()),
    "junk pth": (lambda folder: bytes_of(folder / "bad.pth", b"<html>404 Not Found</html>\n"), ()),
    "short junk pth": (lambda folder: bytes_of(folder / "bad.pth", b"junk"), ()),
    "other junk pth": (lambda folder: bytes_of(folder / "bad.pth", b"r" * 99), ()),
    "text pth": (lambda folder: bytes_of(folder / "bad.pth", b"version https://git-lfs.github.com/spec/v1\n"), ()),
    "cut safetensors": (lambda folder: cut(written(folder / "bad.safetensors", tensors())), ()),
    "cut pth": (lambda folder: cut(written(folder / "bad.pth", tensors())), ()),
    "a photo": (lambda folder: Path(shutil.copy(folder / "photos/0.jpg", folder / "bad.pth")), ()),
    "ResNet safetensors": (lambda folder: written(folder / "bad.safetensors", RESNET), ("patch_embed.proj.weight",)),
    "ResNet pth": (lambda folder: written(folder / "bad.pth", RESNET), ("patch_embed.proj.weight",)),
    "no dictionary": (lambda folder: written(folder / "bad.pth", [1, 2, 3]), ("dictionary",)),
    "keys that are numbers": (lambda folder: written(folder / "bad.pth", {1: torch.zeros(2)}), ()),
    "more than tensors": (lambda folder: written(folder / "bad.pth", tensors() | {"epoch": 3}), ("dictionary",)),
    "lacks a tensor": (lambda folder: written(folder / "bad.pth", {k: t for k, t in tensors().items() if k != "norm.bias"}), ("norm.bias",)),
    "has one more": (lambda folder: written(folder / "bad.pth", tensors() | {"blocks.0.more": torch.zeros(2)}), ("blocks.0.more",)),
    "has a wrong shape": (lambda folder: written(folder / "bad.pth", tensors() | SWAP), ("qkv.weight", "(3, 3)")),
    "patches of one axis": (lambda folder: written(folder / "bad.pth", tensors() | {"patch_embed.proj.weight": torch.zeros(64, 192)}), ()),
}


@pytest.mark.parametrize("wrong", WEIGHTS)
@every_stage
def test_weights(files, stage, wrong):
    make, says = WEIGHTS[wrong]
    path = make(files)
    refused(stage, files, path, *says, weights=path)


@pytest.mark.parametrize("wrong", ("missing pth", "junk safetensors", "ResNet pth"))
def test_weights_of_a_later_row_are_seen_at_once(files, wrong):
    """Also behind :linear, and also where only the architecture is taken."""
    make, says = WEIGHTS[wrong]
    path = make(files)
    refused("classify", files, path, *says, weights=[files / "teacher.safetensors", f"{path}:linear"])
    refused("classify", files, path, *says, weights=[files / "teacher.safetensors", path], from_scratch=True)


@every_stage
def test_weights_must_be_named(files, stage):
    refused(stage, files, "--weights", weights=None)


@pytest.mark.parametrize("facts", ("[]", "null", '"text"', "{", '{"architecture": 3}', '{"architecture": {"width": 64}}',
                                   json.dumps({"architecture": dict(width=64, depth=2, heads=2, hidden=128, patch=8, grid=[4, 4], newer=1)})))
def test_header_of_another_program_or_version(files, facts):
    save_file(tensors(), files / "bad.safetensors", metadata={"adala": facts})
    refused("attention", files, files / "bad.safetensors", weights=files / "bad.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Teacher and student

def test_teacher_file_that_changed(files):
    save_vit(ViT(ARCH), files / "teacher.safetensors")
    for stage in ("attention", "features"):
        refused(stage, files, files / "teacher.safetensors", "changed", weights=files / "student.safetensors")


def test_teacher_file_that_is_gone(files):
    (files / "teacher.safetensors").unlink()
    refused("features", files, files / "teacher.safetensors", weights=files / "student.safetensors")


@unlabelled
def test_teachers_that_do_not_fit(files, stage):
    save_vit(ViT(replace(ARCH, depth=3)), files / "deeper.safetensors")
    save_vit(linearize(ViT(ARCH)), files / "orphan.safetensors")
    student = files / "student.safetensors"
    refused(stage, files, "deeper.safetensors", "architecture", weights=student, teacher=files / "deeper.safetensors")
    refused(stage, files, "student.safetensors", "softmax", weights=student, teacher=student)
    refused(stage, files, "none.pth", weights=student, teacher=files / "none.pth")
    refused(stage, files, "--teacher", weights=files / "orphan.safetensors")
    refused(stage, files, "--attention relu", weights=student, attention="relu")


def test_maps_need_hedgehog(files):
    refused("attention", files, "--train maps", "hedgehog", train="maps")
    refused("attention", files, "--train maps", "hedgehog", train="maps", attention="relu")
    refused("attention", files, "--train maps", "hedgehog", train="maps", weights=files / "student.safetensors")


def test_freeze_and_from_scratch(files):
    refused("classify", files, "--freeze", "--from-scratch", freeze=True, from_scratch=True)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

@pytest.mark.parametrize("size", (33, 4, 0, -8))
@every_stage
def test_size_is_a_multiple_of_the_patch(files, stage, size):
    refused(stage, files, size, "8 pixels", size=size)


@pytest.mark.parametrize("flags", (dict(steps=0), dict(steps=-1), dict(batch=0), dict(batch=-2)), ids=str)
@every_stage
def test_counts_are_positive(files, stage, flags):
    """Refused by argparse (exit code 2) or by us."""
    with pytest.raises((InputError, SystemExit)) as caught:
        call(stage, argv_of(stage, files, **flags))
    assert "\n" not in str(caught.value) and not (files / "out").exists()


@pytest.mark.parametrize("lr", (0, -1e-3, float("nan"), float("inf")))
@every_stage
def test_learning_rate_is_above_zero(files, stage, lr):
    refused(stage, files, "--lr", lr, lr=lr)


@every_stage
def test_the_demo_has_one_size(files, stage):
    refused(stage, files, "--size 32", "64", data="demo", size=32)


# ---------------------------------------------------------------------------------------------------------------------
# Photos and labels

@every_stage
def test_no_data(files, stage):
    refused(stage, files, "nowhere", data=files / "nowhere")
    (files / "empty/train").mkdir(parents=True)
    (files / "empty/val").mkdir()
    (files / "empty/train/notes.txt").write_text("no photo")
    refused(stage, files, "empty", data=files / "empty")


def some_image(stage, files, part):
    """A photo of the training or the held-out part of a stage's data."""
    if stage in ("attention", "features"):
        return files / "photos" / ("0.jpg" if part == "val" else "2.jpg")
    return files / stage / part / ("a" if stage == "classify" else "images") / "0.jpg"


@pytest.mark.parametrize("wrong", ("empty", "junk", "cut to half", "cut by a bit", "text"))
@pytest.mark.parametrize("part", ("train", "val"))
@every_stage
def test_unreadable_photo(files, stage, part, wrong):
    path = some_image(stage, files, part)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "junk": os.urandom(500), "cut to half": whole[:len(whole) // 2], "cut by a bit": whole[:-9],
                      "text": b"<html>404</html>"}[wrong])
    refused(stage, files, path)


@unlabelled
def test_unreadable_png(files, stage):
    path = files / "photos/1.png"
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:-30], whole[:40], b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        refused(stage, files, path)


@unlabelled
def test_photos_are_too_few_or_mixed(files, stage):
    (files / "one").mkdir()
    shutil.copy(files / "photos/0.jpg", files / "one")
    refused(stage, files, "one", data=files / "one")
    refused(stage, files, "imagenette", data=["imagenette", files / "photos"])
    refused(stage, files, "nowhere", data=[files / "photos", files / "nowhere"])


def test_classify_layout(files):
    data = files / "classify"
    refused("classify", files, files / "photos", "train", data=files / "photos")
    refused("classify", files, files / "segment", "masks", data=files / "segment")   # else the classes are images and masks
    (data / "val/b").rename(data / "val/c")
    refused("classify", files, data, "b, c")
    shutil.rmtree(data / "val/c")
    refused("classify", files, data, "b")
    (data / "val/b").mkdir()
    refused("classify", files, data, "b")
    shutil.rmtree(data / "val")
    refused("classify", files, data, "val")
    for part in ("train", "val"):
        shutil.copytree(files / "photos", files / "flat" / part)
    refused("classify", files, files / "flat", "class", data=files / "flat")


def test_segment_layout(files):
    data = files / "segment"
    refused("segment", files, "classify", "masks", data=files / "classify")
    refused("segment", files, "photos", data=files / "photos")
    shutil.rmtree(data / "val/masks")
    refused("segment", files, data / "val", "masks")
    shutil.rmtree(data / "train/images")
    refused("segment", files, data / "train", "images")


def mask_of(path, wrong):
    whole = path.read_bytes()
    if wrong == "missing":
        path.unlink()
    elif wrong == "other size":
        Image.new("L", (40, 48)).save(path)
    elif wrong in ("RGB", "RGBA", "LA", "1", "I;16"):
        Image.new(wrong, (48, 40)).save(path)
    else:
        changed = lambda at: whole[:at] + b"\x01" + whole[at + 1:]
        path.write_bytes({"empty": b"", "junk": b"junk" * 99, "cut": whole[:len(whole) // 2], "broken header": changed(11),
                          "broken chunk": changed(36)}[wrong])          # last bytes of the lengths of IHDR and IDAT


@pytest.mark.parametrize("wrong", ("missing", "other size", "RGB", "RGBA", "LA", "1", "I;16", "empty", "junk", "cut", "broken header", "broken chunk"))
@pytest.mark.parametrize("part", ("train", "val"))
def test_masks(files, part, wrong):
    path = files / "segment" / part / "masks/1.png"
    mask_of(path, wrong)
    refused("segment", files, path)


def test_mask_of_a_turned_photo(files):
    """Drawn on the photo as the file holds it, not as it is seen: it would not lie on what the network sees."""
    turned, path = Image.Exif(), files / "segment/train/images/1.jpg"
    turned[0x0112] = 6
    Image.open(path).save(path, exif=turned)
    refused("segment", files, files / "segment/train/masks/1.png")


# ---------------------------------------------------------------------------------------------------------------------
# Prediction

def test_predict_needs_a_checkpoint_with_a_head(files):
    for weights in ("teacher.safetensors", "student.safetensors"):
        refused("classify", files, weights, "head", weights=files / weights, predict=files / "photos")
    torch.save(tensors() | {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}, files / "imagenet.pth")
    refused("classify", files, "imagenet.pth", "head", weights=files / "imagenet.pth", predict=files / "photos")
    refused("classify", files, "--weights", weights=None, predict=files / "photos")
    for make, _ in WEIGHTS.values():
        path = make(files)
        refused("classify", files, path, weights=path, predict=files / "photos")


@pytest.mark.parametrize("stage", ("classify", "segment"))
def test_predict_needs_photos(files, stage):
    call(stage, argv_of(stage, files, out=files / "run"))
    checkpoint = files / f"run/0-{stage}.safetensors"
    refused(stage, files, "nowhere", weights=checkpoint, predict=files / "nowhere")
    (files / "empty").mkdir()
    refused(stage, files, "empty", weights=checkpoint, predict=files / "empty")
    cut(files / "photos/2.jpg")
    refused(stage, files, files / "photos/2.jpg", weights=checkpoint, predict=files / "photos")


# ---------------------------------------------------------------------------------------------------------------------
# Results

@every_stage
def test_out_is_a_file(files, stage):
    (files / "taken").write_text("mine")
    for out in (files / "taken", files / "taken/below"):
        refused(stage, files, out, out=out)
    assert (files / "taken").read_text() == "mine"


@every_stage
def test_no_room(files, stage, monkeypatch):
    monkeypatch.setattr(model.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    refused(stage, files, files / "out", "free")


@every_stage
def test_no_room_leaves_what_was_there(files, stage, monkeypatch):
    monkeypatch.setattr(model.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    (files / "mine").mkdir()
    (files / "mine/student.safetensors").write_text("mine")
    refused(stage, files, "mine", out=files / "mine")
    assert [path.read_text() for path in (files / "mine").iterdir()] == ["mine"]


def test_no_room_for_every_checkpoint(files, monkeypatch):
    """Fine-tuning writes one for each of --weights: enough for two is too little for three."""
    size = (files / "teacher.safetensors").stat().st_size
    monkeypatch.setattr(model.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2.6 * size))
    refused("classify", files, "free", weights=[files / "teacher.safetensors"] * 3)
    call("classify", argv_of("classify", files, weights=[files / "teacher.safetensors"] * 2))


def never_finite(stage, files, says, **flags):
    with pytest.raises(InputError) as caught:
        call(stage, argv_of(stage, files, **flags))
    message = str(caught.value)
    assert "\n" not in message and re.search(r"\b(nan|inf)\b", message)
    for word in says:
        assert word in message
    assert not [path.name for path in (files / "out").iterdir() if path.name != "log.jsonl"]   # no student, no report


@pytest.mark.parametrize("value", (float("nan"), 1e30))
@every_stage
def test_weights_that_give_no_finite_loss(files, stage, value):
    """The message names the step, stage 1's the block too."""
    vit = ViT(ARCH)
    with torch.no_grad():
        vit.blocks[1].attn.qkv.weight[:, :] = value
    save_vit(vit, files / "huge.safetensors")
    never_finite(stage, files, ["step 1", *["block 1"] * (stage == "attention")], weights=files / "huge.safetensors")
    if MODULES[stage] is finetune:
        never_finite(stage, files, ["step 1", "huge.safetensors"], weights=[files / "huge.safetensors"], freeze=True)


@every_stage
def test_learning_rate_that_gives_no_finite_loss(files, stage):
    never_finite(stage, files, ["step ", "--lr", "1e+30"], lr=1e30, steps=5)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts themselves

def test_a_loaders_worker_says_it_in_one_line_too(files):
    """On a GPU photos are read by other processes, whose errors come with a traceback in the message."""
    photos = align_attention.Photos([cut(files / "photos/0.jpg")], 32, augment=False)
    with pytest.raises(SystemExit) as caught:
        model.run(lambda: list(torch.utils.data.DataLoader(photos, num_workers=1)))
    message = caught.value.code
    assert "\n" not in message and f"{files / 'photos/0.jpg'} is not a readable image" in message and "InputError" not in message


@pytest.mark.parametrize("stage, flags, says", [
    ("attention", dict(weights="junk.pth"), "junk.pth"),
    ("attention", dict(lr=1e30, steps=5), "step 2"),                    # from within the progress bar
    ("features", dict(weights="student.safetensors", data="nowhere"), "nowhere"),
    ("classify", dict(size=33), "33"),
    ("segment", dict(data="classify"), "masks"),
], ids=("weights", "loss", "data", "size", "layout"))
def test_scripts_say_it_in_one_line(files, stage, flags, says):
    (files / "junk.pth").write_bytes(b"not a weight file\n")
    flags = {flag: files / value if isinstance(value, str) else value for flag, value in flags.items()}
    script = Path(MODULES[stage].__file__)
    done = subprocess.run([sys.executable, script, *argv_of(stage, files, **flags)], cwd=files, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    lines = [line for line in re.split(r"[\r\n]", done.stderr) if line.strip() and "img" not in line]   # "img": tqdm's bar
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(lines) == 1 and lines[0].startswith(script.name + ": ") and says in lines[0]
