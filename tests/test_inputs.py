"""Photos and odd names are read right or named; no run overwrites what it reads."""
import os
import pickle
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import STAGES, brief, refusal
from PIL import Image
from test_labels import noise, png, put
from torchvision.transforms import v2

import finetune
from support import photos
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
    quick, whole = read_image(turned, 100), TURN[value](raw)
    assert 200 <= min(quick.shape[1:]) < 900
    again = v2.functional.resize(quick, whole.shape[1:])
    assert (again.float() - whole).abs().mean() < 2


@pytest.mark.parametrize("kind, modes", (
    ("jpeg", "RGB L CMYK"), ("png", "RGB RGBA L LA P 1"), ("tiff", "RGB RGBA L P 1 CMYK")))
def test_every_format_and_mode_is_upright_whatever_the_suffix(tmp_path, kind, modes):
    path = tmp_path / "x.jpg"
    for mode in modes.split():
        image = Image.fromarray(noise(6, 9, 3)).convert(mode)
        image.save(path, format=kind, exif=EXIF[6])
        seen = (Image.open(path) if kind == "jpeg" else image).convert("RGB")
        assert torch.equal(read_image(path), TURN[6](v2.functional.pil_to_tensor(seen))), mode


@pytest.mark.parametrize("kind", ("bmp", "gif", "webp", "png", "tiff", "ppm", "jpeg"))
def test_the_first_frame_counts_and_what_is_damaged_is_named(tmp_path, kind):
    path = tmp_path / "x.jpg"
    frames = [Image.fromarray(noise(20, 24, 3, seed=i)).quantize(9).convert("RGB") for i in (1, 2)]
    more = dict(save_all=True, append_images=frames[1:]) if kind in "gif webp png tiff" else {}
    frames[0].save(path, format=kind, lossless=True, **more)
    assert kind == "jpeg" or np.array_equal(read_image(path).permute(1, 2, 0), frames[0])
    whole = path.read_bytes()
    for content in (b"", whole[:len(whole) // 3], whole[:30], b"<a>\n</a>"):
        path.write_bytes(content)
        assert "x.jpg" in refusal(read_image, path) and refusal(read_image, path, 4)


def test_16_bits_floats_and_too_many_pixels_are_refused(tmp_path, monkeypatch):
    deep = noise(20, 24).astype(np.uint16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 499)     # at up to twice that Pillow only warns
    for file in (png(tmp_path / "grey.png", deep, 16),
                 put(tmp_path / "float.tif", deep.astype(np.float32)),
                 put(tmp_path / "large.png", noise(20, 25, 3))):
        assert f"{file.name} is not a readable image" in refusal(read_image, file)


# ---- List

def test_what_is_listed_and_what_is_left_out_are_said(tmp_path, capsys):
    top, away = tmp_path / "top", put(tmp_path / "away/e.jpg").parent
    kept = ["a b.jpg", "b.JPG", "deep/er/日本.png", "p.webp"]
    out = ["._a.jpg", ".ipynb/d.jpg", "masks/a.png", "run/f.jpg"]
    for name in (*kept, *out, "z.txt", "README", ".DS_Store"):
        put(top / name, format="PNG")
    (top / "run/run.json").touch()
    (top / "link").symlink_to(away)
    (top / "deep/up").symlink_to(top)                   # one circle: without end, not without time
    found = find_images(top)
    assert found == sorted(str(top / name) for name in (*kept, "link/e.jpg"))
    _, left_out = capsys.readouterr().err.split("; left out 5: ")
    assert left_out == ", ".join(f"{top / name}" for name in (
        "._a.jpg", ".ipynb", "deep/up", "masks", "run")) + "\n"
    assert len(find_images(top / "masks")) == 1         # what is given itself is read
    assert "no image" in refusal(find_images, put(tmp_path / "empty/a.txt", format="PNG").parent)


def test_val_or_every_tenth_photo_is_held_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(25):
        put(tmp_path / f"pets/{i:02}.jpg")
    for name in ("train/a", "train/b", "val/c"):
        put(tmp_path / f"parts/{name}.jpg")
    train, held_out = unlabelled(["pets", "parts"])
    assert held_out == ["pets/00.jpg", "pets/10.jpg", "pets/20.jpg", "parts/val/c.jpg"]
    assert len(train) == 24 and not {*train} & {*held_out}


def test_a_photo_in_both_parts_is_refused(tmp_path):
    for name in ("train/a", "train/b", "val/c"):
        put(tmp_path / f"{name}.jpg")
    (tmp_path / "val/d.jpg").symlink_to(tmp_path / "train/a.jpg")
    assert "train/a.jpg" in refusal(unlabelled, [tmp_path])
    (tmp_path / "val/d.jpg").unlink()
    assert "a.jpg" in refusal(unlabelled, [tmp_path, tmp_path / "train"])       # holds out a.jpg
    assert "one photo" in refusal(unlabelled, [tmp_path / "val"])


# ---- Draw

@pytest.fixture
def run_of(tmp_path):
    """run_of(flags) -> (flags of stages 1 and 2, training photos, held-out photos)."""
    for i in range(12):
        put(tmp_path / f"{i:02}.png", noise(20, 24, 3, seed=i))
    flags = dict(data=[tmp_path], size=16, steps=6, batch_size=4, seed=3, workers=0)
    return lambda **changes: (Namespace(**flags | changes), *unlabelled([tmp_path]))


def test_a_draw_is_a_function_of_seed_and_number(run_of):
    whole = torch.cat(list(loaders(*run_of(), 0)[0]))
    assert whole.shape == (24, 3, 16, 16) and whole.dtype == torch.uint8
    assert len(whole.flatten(1).unique(dim=0)) == 24    # crops differ from epoch to epoch
    torch.manual_seed(9)
    rest = loaders(*run_of(), 2)[0]
    assert torch.equal(torch.cat(list(rest)), whole[8:])
    copied = pickle.loads(pickle.dumps(rest.dataset))   # as for a worker that is spawned
    assert torch.equal(copied[13], whole[13])
    assert not torch.equal(torch.cat(list(loaders(*run_of(seed=4), 0)[0])), whole)


def test_processes_share_each_step(run_of, monkeypatch):
    whole, halves = torch.cat(list(loaders(*run_of(), 0)[0])), []
    monkeypatch.setattr(photos, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(photos, "RANK", rank)
        halves.append(torch.stack(list(loaders(*run_of(), 1)[0])))          # (5, 2, 3, 16, 16)
    assert torch.equal(torch.stack(halves, dim=2).flatten(0, 2), whole[4:])


def test_each_epoch_is_a_permutation():
    draws = Draws(list(range(10)), int, v2.Identity(), seed=3)
    first, second = ([draws[i] for i in range(start, start + 10)] for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [Draws(list("abc"), str, str)[i] for i in range(3)] == list("abc")


@pytest.mark.parametrize("workers", (0, 2))
def test_an_unreadable_photo_is_named_and_left_out(tmp_path, run_of, capfd, workers):
    bad = [tmp_path / f"{i:02}.png" for i in (3, 10)]   # 10 is held out
    for path in bad:
        path.write_bytes(b"junk")
    train, test = loaders(*run_of(workers=workers), 0)
    assert len(torch.cat(list(train))) == 24 and len(torch.cat(list(test))) == 2
    said = capfd.readouterr().err
    assert all(f"left out: {path} is not" in said for path in bad)


def test_the_next_photo_of_the_epoch_takes_the_place_of_an_unreadable_one():
    def read(item):
        return item if isinstance(item, int) else read_image(item)
    order, source = photos.permutation(10, 3, 0).tolist(), [*range(10)]
    source[order[4]] = source[order[9]] = "gone.jpg"
    draws = Draws(source, read, int, 3, skip=True)
    assert (draws[4], draws[5], draws[9]) == (order[5], order[5], order[0])
    assert "gone.jpg" in refusal(Draws(source, read, int, 3).__getitem__, 4)
    assert "none of 2" in refusal(Draws(["a", "b"], read_image, int, 3, skip=True).__getitem__, 0)


# ---- Whole commands

@pytest.mark.parametrize("stage", STAGES)
def test_out_over_what_is_read_is_refused(files, tmp_path, stage):
    given = shutil.copytree(files, tmp_path / "given")
    data = "classify" if stage is finetune else "photos"
    for out in given / "teacher.safetensors", given / data / "new", given:
        assert "which is read" in refusal(brief, stage, given, out)
    assert sorted(os.listdir(given)) == sorted(os.listdir(files))
