"""Photos and odd names are read right or named; no run overwrites anything."""
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, refusal
from PIL import Image
from test_labels import noise, png, put
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import align_attention
import align_features
import finetune
from model import load_vit, save_vit
from support import photos
from support.labels import read_item, read_mask
from support.photos import Draws, find_images, loaders, read_image, unlabelled

TURN = [None, lambda x: x, lambda x: x.flip(-1), lambda x: x.flip(-1, -2), lambda x: x.flip(-2),
        lambda x: x.mT, lambda x: x.mT.flip(-1), lambda x: x.mT.flip(-1, -2),
        lambda x: x.mT.flip(-2)]                        # by EXIF's orientation: raw -> upright
EXIF = [b"Exif\0\0II*\0\b\0\0\0\1\0\x12\1\3\0\1\0\0\0%c" % turn + bytes(7) for turn in range(9)]


# ---- Read

@pytest.mark.parametrize("value", range(1, 9))
def test_photos_are_upright_and_a_fraction_of_a_jpeg_looks_the_same(tmp_path, value):
    slope = np.add.outer(np.linspace(0, 120, 900), np.linspace(0, 135, 1200)).astype(np.uint8)
    raw = read_image(put(tmp_path / "raw.jpg", slope))
    turned = put(tmp_path / "turned.jpg", slope, exif=EXIF[value])
    assert torch.equal(read_image(turned), TURN[value](raw))
    quick, whole = read_image(turned, 100)[None].float(), TURN[value](raw)[None].float()
    assert 200 <= min(quick.shape[2:]) < 900
    assert (torch.nn.functional.interpolate(quick, whole.shape[2:]) - whole).abs().mean() < 2


@pytest.mark.parametrize("kind", ("bmp", "gif", "webp", "png", "tiff", "ppm", "jpeg"))
def test_the_first_frame_counts_and_what_is_damaged_is_named(tmp_path, kind):
    path = tmp_path / "x.jpg"
    frames = [Image.fromarray(noise(20, 24, 3, seed=i)).quantize(9).convert("RGB") for i in (1, 2)]
    more = dict(save_all=True, append_images=frames[1:]) if kind in "gif webp png tiff" else {}
    frames[0].save(path, format=kind, lossless=True, **more)
    assert kind == "jpeg" or np.array_equal(read_image(path).permute(1, 2, 0), frames[0])
    whole = path.read_bytes()
    for content in (b"", whole[:len(whole) // 3], whole[:30], noise(500).tobytes(), b"<a>\n</a>"):
        path.write_bytes(content)
        assert "x.jpg" in refusal(read_image, path) and refusal(read_image, path, 4)


def test_16_bits_floats_and_a_large_colour_profile_are_refused(tmp_path):
    deep = noise(20, 24).astype(np.uint16) * 256 + 99
    files = [png(tmp_path / "grey.png", deep, 16), put(tmp_path / "int.tif", deep.astype(np.int32)),
             put(tmp_path / "float.tif", deep.astype(np.float32)),
             put(tmp_path / "profile.png", icc_profile=bytes(2 ** 21))]
    for file, why in zip(files, ["8 bits a channel"] * 3 + ["too large"], strict=True):
        assert file.name in (says := refusal(read_image, file)) and why in says


def test_a_photo_above_pillows_limit_is_refused_and_the_limit_named(tmp_path, monkeypatch):
    path = put(tmp_path / "large.png")
    for limit in (479, 200):            # Pillow would warn above it, and refuse above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(record=True) as warned:
            assert "large.png" in (says := refusal(read_image, path)) and "limit" in says
            assert "large.png is no mask" in refusal(read_mask, path)
        assert not warned


TURNED = {"jpeg": "RGB L CMYK", "png": "RGB RGBA L LA P 1", "webp": "RGB RGBA",
          "tiff": "RGB RGBA L P 1 CMYK"}
MODES = TURNED | {"bmp": "RGB L P 1", "gif": "L P", "ppm": "RGB L"}
ODD = "plain", "a b", "日本語", "two\nlines", "a=b", "a:linear", "ünï", "%s", "-", "'\"", "a.b"


def random_photo(chance, path, seed):
    """Write a photo of any format, mode and orientation, called anything -> what is seen."""
    kind = chance.choice(list(MODES))
    turn = chance.randint(1, 8) if kind in TURNED else 1
    size = chance.randint(1, 20), chance.randint(1, 20)
    image = Image.fromarray(noise(*size, 3, seed=seed)).convert(chance.choice(MODES[kind].split()))
    image.save(path, format=kind, lossless=True, **dict(exif=EXIF[turn]) if turn > 1 else {})
    seen = np.array((Image.open(path) if kind == "jpeg" else image).convert("RGB"))
    return TURN[turn](torch.from_numpy(seen).permute(2, 0, 1))


@pytest.mark.parametrize("number", range(12))
def test_a_folder_of_random_photos_and_names(tmp_path, number):
    chance, want = random.Random(number), {}
    (away := tmp_path / "away").mkdir()
    for i in range(8):
        folder = tmp_path.joinpath("top", *chance.sample(ODD, chance.randint(0, 2)))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{chance.choice(ODD)} {i}{chance.choice(IMG_EXTENSIONS)}"
        real = path if chance.random() < 0.8 else away / f"{i} {path.name}"
        want[str(path)] = random_photo(chance, real, 50 * number + i)
        if real != path:                                # reached by a link
            path.symlink_to(real)
        (folder / "x.txt").touch()
    assert find_images(tmp_path / "top") == sorted(want)
    draws = Draws(sorted(want), read_image, v2.Identity())
    for i, path in enumerate(sorted(want)):
        for way in (read_image(path), draws[i], read_item((path, 3), "classify")[0]):
            assert torch.equal(way, want[path]), path


# ---- List

def test_what_is_listed_and_what_is_left_out_are_said(tmp_path, capsys):
    top, away = tmp_path / "top", put(tmp_path / "away/e.jpg").parent
    kept = ["a.jpg", "b.JPG", "deep/er/c.png", "p.webp", "q.tif", "s.bmp"]
    out = ["._a.jpg", ".ipynb/d.jpg", "masks/a.png", "run/f.jpg"]
    for name in (*kept, *out, "z.txt", "README", ".DS_Store"):
        put(top / name, format="PNG")
    (top / "run/run.json").touch()
    for link, to in (("top/l1", away), ("top/l2", away), ("top/up", top), ("away/up", top)):
        (tmp_path / link).symlink_to(to)
    (top / "gone.jpg").symlink_to("/nowhere")
    found = find_images(top)
    assert found == sorted(str(top / name) for name in (*kept, "l1/e.jpg", "l2/e.jpg", "gone.jpg"))
    assert "gone.jpg" in refusal(read_image, top / "gone.jpg")
    line, = capsys.readouterr().out.splitlines()
    found, left_out = line.split("; left out")
    assert "5 .jpg" in found and "1 .webp" in found and ".txt" not in found
    for name in ("._a.jpg", ".ipynb", "masks", "run", "up", "l1/up", "l2/up"):
        assert f"{top / name}" in left_out
    assert len(find_images(top / "masks")) == 1         # what is given itself is read
    assert "no image" in refusal(find_images, put(tmp_path / "empty/a.txt", format="PNG").parent)
    assert "nowhere" in refusal(find_images, tmp_path / "nowhere")


def test_val_or_every_tenth_photo_is_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(photos.SETS, "pets", None)      # a folder of that name is taken
    for i in range(25):
        put(tmp_path / f"pets/{i:02}.jpg")
    for name in ("train/a", "train/b", "val/c"):
        put(tmp_path / f"parts/{name}.jpg")
    train, held_out = unlabelled(["pets", "parts"])
    assert list(held_out) == ["pets/00.jpg", "pets/10.jpg", "pets/20.jpg", "parts/val/c.jpg"]
    assert len(train) == 24 and not {*train} & {*held_out}
    absolute = unlabelled([tmp_path / "pets", f"{tmp_path}/parts/"])
    assert [photos.names(part) for part in absolute] == [*map(photos.names, (train, held_out))]


def test_a_photo_in_both_parts_is_refused(tmp_path):
    for name in ("train/a", "train/b", "val/c"):
        put(tmp_path / f"{name}.jpg")
    (tmp_path / "val/d.jpg").symlink_to(tmp_path / "train/a.jpg")
    assert "train/a.jpg" in refusal(unlabelled, [tmp_path])
    (tmp_path / "val/d.jpg").unlink()
    assert "a.jpg" in refusal(unlabelled, [tmp_path, tmp_path / "train"])       # holds out a.jpg
    assert "one photo" in refusal(unlabelled, [tmp_path / "val"])


def test_a_broken_download_is_one_sentence(tmp_path, monkeypatch):
    def broken(root, split, download):
        raise tarfile.ReadError("unexpected end of data")
    monkeypatch.setitem(photos.SETS, "flowers102", (broken, "split", "train", "test"))
    assert "flowers102" in refusal(unlabelled, ["flowers102"])


# ---- Draw

def run_of(folder, **changes):
    """-> (flags of stages 1 and 2, training photos, held-out photos)."""
    flags = dict(data=[folder], size=[16], steps=6, batch_size=4, seed=3, workers=0)
    return Namespace(**flags | changes), *unlabelled([folder])


@pytest.fixture
def some_photos(tmp_path):
    for i in range(12):
        put(tmp_path / f"photos/{i:02}.png", noise(20, 24, 3, seed=i))
    return tmp_path / "photos"


def test_a_draw_is_a_function_of_seed_and_number(some_photos):
    args, train, held_out = run_of(some_photos)
    whole, test = loaders(args, train, held_out, 0)
    whole = torch.cat(list(whole))
    assert whole.shape == (24, 3, 16, 16) and whole.dtype == torch.uint8
    assert len(whole.flatten(1).unique(dim=0)) == 24    # crops differ from epoch to epoch
    torch.manual_seed(9)
    rest = loaders(args, train, held_out, 2)[0]
    assert torch.equal(torch.cat(list(rest)), whole[8:])
    copied = pickle.loads(pickle.dumps(rest.dataset))   # as for a worker that is spawned
    assert torch.equal(copied[13, 16], whole[13])
    assert [len(batch) for batch in test] == [2]
    args.seed = 4
    assert not torch.equal(torch.cat(list(loaders(args, train, held_out, 0)[0])), whole)


def test_each_epoch_is_a_permutation(some_photos):
    draws = Draws(list(range(10)), int, v2.Identity(), seed=3)
    first, second = ([draws[i] for i in range(start, start + 10)] for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [Draws(list("abc"), str, str)[i] for i in range(3)] == list("abc")


def test_drawn_images_stay_as_they_are():
    source = [(torch.full((3, 64, 64), i).byte(), i, None) for i in range(8)]
    args = Namespace(data=None, size=[64], steps=2, batch_size=4, seed=3, workers=0)
    train, held_out = (torch.cat(list(part)) for part in loaders(args, source, source, 0))
    assert torch.equal(held_out, torch.stack([image for image, *_ in source]))
    assert torch.equal(train.sort(0)[0], held_out)


def test_the_sizes_of_steps_follow_from_the_seed_and_share_tokens(some_photos, monkeypatch):
    args, *_ = run_of(some_photos, size=[32, 16, 64], batch_size=8, steps=40)
    whole = list(photos.batches(args, 0))
    assert {batch[0][1]: len(batch) for batch in whole} == {32: 8, 16: 32, 64: 2}
    assert [i for batch in whole for i, _ in batch] == list(range(sum(map(len, whole))))
    assert list(photos.batches(args, 17)) == whole[17:]
    monkeypatch.setattr(photos, "WORLD", 2)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(photos, "RANK", rank)
        ranks.append(list(photos.batches(args, 0)))
    assert [sorted(a + b) for a, b in zip(*ranks)] == whole
    assert all(len(a) == len(b) for a, b in zip(*ranks))


def test_images_have_the_size_of_their_step(some_photos):
    train, held_out = loaders(*run_of(some_photos, size=[16, 32]), 0)
    assert {tuple(batch.shape) for batch in train} == {(4, 3, 16, 16), (1, 3, 32, 32)}
    assert {batch.shape[2] for batch in held_out} == {16}


@pytest.mark.parametrize("workers", (0, 2))
def test_an_unreadable_photo_is_named_once_in_all_epochs(some_photos, capfd, workers):
    bad = [some_photos / f"{i:02}.png" for i in (3, 10)]           # 10 is held out
    for path in bad:
        path.write_bytes(b"junk")
    train, test = loaders(*run_of(some_photos, workers=workers, steps=15), 0)
    assert len(torch.cat(list(train))) == 60 and len(torch.cat(list(test))) == 2
    said = capfd.readouterr().err
    assert [said.count(f"left out: {path} is not") for path in bad] == [1, 1]


def test_the_next_photo_of_the_epoch_takes_the_place_of_an_unreadable_one(tmp_path):
    def read(item):
        return item if isinstance(item, int) else read_image(item)
    order, source = photos.permutation(10, 3, 0).tolist(), [*range(10)]
    source[order[4]] = source[order[9]] = tmp_path / "gone.jpg"
    draws = Draws(source, read, int, 3, skip=True)
    assert (draws[4], draws[5], draws[9]) == (order[5], order[5], order[0])
    assert "gone.jpg" in refusal(Draws(source, read, int, 3).__getitem__, 4)       # stage 3
    assert "none of 2" in refusal(Draws(["a", "b"], read_image, int, 3, skip=True).__getitem__, 0)


def test_a_picture_has_each_row_below_its_caption(tmp_path):
    rows = [torch.full((3, 3, 20, 30), 0.2), torch.full((9, 3, 10, 30), 1.7)]
    photos.save_picture(rows, ["a", "b"], tmp_path / "x.png")
    shown = np.array(Image.open(tmp_path / "x.png"))
    assert shown.shape == (20 + 24 + 20 + 26, 8 * 32 + 2, 3)
    assert (shown[22:42, 2:32] == 51).all() and (shown[66:76, 2:32] == 255).all()
    assert (shown[:20, :20] < 99).any() and (shown[44:64, :20] < 99).any()     # captions
    photos.save_picture(rows, ["a caption wider than the images " * 3, "b"], tmp_path / "x.png")
    assert (np.array(Image.open(tmp_path / "x.png"))[:20, -200:] < 99).any()


# ---- Whole commands

READS = dict(attention="teacher student data", features="teacher student data",
             classify="weights data", segment="weights data", predict="weights predict")
SCRIPT = dict.fromkeys(READS, finetune) | dict(attention=align_attention, features=align_features)


def state(folder):
    """What each file below a folder holds, but what a run wrote to out/."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.relative_to(folder).parts[0] != "out"}


@pytest.fixture
def world(files, chain, tmp_path):
    top = shutil.copytree(files, tmp_path / "world")
    shutil.copy(chain / "one/student.safetensors", top)
    teacher = load_vit(top / "teacher.safetensors")
    head = finetune.make_head(teacher.arch, "segment", 2)
    save_vit(teacher, top / "segment.safetensors", head, task="segment", classes=["sky", "sea"],
             ids=[0, 7], size=16, stage="finetune")
    return top


def flags_of(stage, world, **changes):
    """The words of a good, short command, some of its flags changed."""
    flags = dict(weights=world / "teacher.safetensors", task=stage, data=world / stage, steps=1)
    if stage in ("attention", "features"):
        flags = dict(teacher=world / "teacher.safetensors", data=world / "photos", steps=1)
    if stage == "predict":
        flags = dict(weights=world / "segment.safetensors", predict=world / "photos")
    flags |= dict(out=world / "out", batch_size=2, size=16) | changes
    return [str(word) for name, value in flags.items()
            for word in (f"--{name.replace('_', '-')}", value)]


@pytest.mark.parametrize("stage, flag", [(s, flag) for s in READS for flag in READS[s].split()])
def test_out_over_what_is_read_is_refused(world, stage, flag):
    words = ["--student", world / "student.safetensors", *flags_of(stage, world)]
    given = Path(words[words.index(f"--{flag}") + 1])
    (world / "link").symlink_to(given)
    (world / "run.json").write_text("{}")               # as if a run of ours had written it
    before = state(world)
    for read, out in (given, given / "new"), (world / "link", given), (given, world):
        words = flags_of(stage, world, **{flag: read, "out": out})
        assert "--out" in refusal(call, SCRIPT[stage], *words)
    assert state(world) == before


@pytest.mark.parametrize("stage", SCRIPT)
def test_the_least_data_are_enough_and_sizes_fit_the_patch(world, stage):
    for path in find_images(world / "photos")[2:]:
        os.remove(path)                                 # one photo is held out
    call(SCRIPT[stage], *flags_of(stage, world, size=8))
    for size in (-8, 12, 0):
        assert str(size) in refusal(call, SCRIPT[stage], *flags_of(stage, world, size=size))


def test_predictions_of_odd_names_stay_apart(world):
    names = ("a.jpg", "a.png", "a.png.overlay.png", "deep/a.jpg", "日本.jpg", "two\nlines.jpg")
    for name in (*names, os.fsdecode(b"\xff\xfe.jpg")):
        put(world / "p" / name, format="PNG")
    before = state(world)
    done = subprocess.run(
        [sys.executable, finetune.__file__, *flags_of("predict", world, predict=world / "p")],
        env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONIOENCODING="cp1252"), capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert state(world) == before and len(state(world / "out/masks")) == 14
    assert set(read_mask(world / "out/masks/a.jpg.png").unique().tolist()) <= {0, 7}


@pytest.mark.parametrize("script", ("align_attention", "align_features", "finetune", "bench"))
def test_help_says_every_default(script, monkeypatch):
    seen, parse = [], "argparse.ArgumentParser.parse_args"
    monkeypatch.setattr(parse, lambda *args: seen.extend(args) or sys.exit())
    with pytest.raises(SystemExit):
        __import__(script).parse([])
    for flag in seen[0]._actions:
        if flag.option_strings and flag.nargs != 0 and flag.dest != "predict":
            assert "default:" in flag.help or "demo:" in flag.help, flag.dest
            assert not isinstance(flag.default, str) or flag.default in flag.help
