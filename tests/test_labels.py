"""Masks and labels are read as the files hold them, or refused with a sentence that names them."""
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

from support import labels
from support.labels import IGNORE, LAYOUTS, load_data, read_item, read_mask
from support.photos import MASK_FOLDERS, Draws


def noise(*shape, top=256, seed=0):
    return np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8)


TWO, FOUR = noise(20, 24, top=2), noise(20, 24, top=4)


def put(path, array=noise(20, 24, 3), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def png(path, ids, depth=8, palette=b""):
    """A grey or palette PNG of any depth: Pillow writes no grey of 2 or 4."""
    bits = (ids[..., None].astype(int) >> np.arange(depth)[::-1] & 1).reshape(len(ids), -1)
    data = zlib.compress(b"".join(b"\0" + np.packbits(row).tobytes() for row in bits))
    size = struct.pack(">IIBBBBB", *ids.shape[::-1], depth, 3 if palette else 0, 0, 0, 0)
    chunks = [b"IHDR" + size, *[b"PLTE" + palette] * bool(palette), b"IDAT" + data, b"IEND"]
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def masks(top, train, val, depth=8):
    """A folder of images/masks with these ids -> its name."""
    for part, arrays in (("train", train), ("val", val)):
        for i, ids in enumerate(arrays):
            put(top / part / f"images/{i}.jpg", noise(*ids.shape, 3, seed=i))
            png(top / part / f"masks/{i}.png", ids, depth)
    return str(top)


FILES = {       # of each layout: a photo and its mask, by part and name
    "images/masks": ("{}/images/{}.jpg", "{}/masks/{}.png"),
    "VOC": ("JPEGImages/{1}.jpg", "SegmentationClass/{1}.png"),
    "CamVid": ("{}/{}.png", "{}annot/{}.png"),
    "Cityscapes": ("leftImg8bit/{}/ulm/{}_leftImg8bit.png",
                   "gtFine/{}/ulm/{}_gtFine_labelTrainIds.png"),
    "ADE20K": ("images/{}/{}.jpg", "annotations/{}/{}.png")}


def lay_out(top, kind):
    """Three photos with masks of the ids 0, 1, 2, 255 in each part of a layout -> the parts."""
    parts = LAYOUTS[kind].get("parts", ("train", "val"))
    for part in parts:
        for i in range(3):
            photo, mask = (top / file.format(part, f"{part} {i}") for file in FILES[kind])
            put(photo, np.full((8, 8, 3), 9, np.uint8))
            put(mask, np.tile(np.array([0, 1, 2, 255], np.uint8), (8, 2)))
    if kind == "VOC":
        for part in parts:                              # the third photo is in no list
            file = top / f"ImageSets/Segmentation/{part}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"\ufeff{part} 0\r\n\r\n{part} 1 \r\n".encode())
    return parts


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_its_pairs_and_class_names(tmp_path, capsys, kind):
    parts = lay_out(tmp_path, kind)
    train, val, classes, ids = load_data(str(tmp_path), "segment")
    count = 2 if kind == "VOC" else 3
    for part, items in zip(parts, (train, val), strict=True):
        assert items == [tuple(tmp_path / file.format(part, f"{part} {i}") for file in FILES[kind])
                         for i in range(count)]
    assert ids == [id for id in (0, 1, 2) if id not in LAYOUTS[kind].get("ignore", ())]
    known = LAYOUTS[kind].get("names", "").split(", ")
    assert classes == [known[id] if id < len(known) and known[id] else str(id) for id in ids]
    assert f"read as {kind}" in capsys.readouterr().out


def test_a_photo_or_mask_alone_is_named_and_left_out(tmp_path, capsys):
    data = masks(tmp_path, [TWO] * 3, [TWO])
    (tmp_path / "train/images/2.jpg").unlink(), (tmp_path / "train/masks/1.png").unlink()
    assert len(load_data(data, "segment")[0]) == 1
    assert "2 names without photo or mask: 1, 2" in capsys.readouterr().out


@pytest.mark.parametrize("content, says", (
    (b"val 0\nval 9\n", "val 9"), (b"val 0\nval 1.jpg\n", "val 1.jpg"),
    (b"val 0\ntrain 1\n", "train 1.jpg"), (b"W\xe4sser\n", "val.txt"), (b"", "val.txt")))
def test_a_list_that_names_no_photo_or_one_of_training_is_refused(tmp_path, content, says):
    lay_out(tmp_path, "VOC")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_bytes(content)
    assert says in refusal(load_data, tmp_path, "segment")


def test_a_folder_of_no_layout_is_told_the_real_folders_of_all(tmp_path):
    says = refusal(load_data, tmp_path, "segment")
    assert "{" not in says
    for row in LAYOUTS.values():
        assert row["masks"].format(row.get("parts", ("train", "val"))[1]) in says


def test_stages_1_and_2_leave_out_the_masks_of_every_layout():
    for row in LAYOUTS.values():
        for part in row.get("parts", ("train", "val")):
            assert MASK_FOLDERS & {*Path(row["masks"].format(part)).parts}


@pytest.mark.parametrize("depth", (1, 2, 4, 8))
@pytest.mark.parametrize("palette", (False, True))
def test_ids_are_what_the_file_stores(tmp_path, depth, palette):
    ids, colours = noise(20, 24, top=2 ** depth), noise(2 ** depth, 3).tobytes()
    file, photo = png(tmp_path / "mask.png", ids, depth, colours * palette), torch.zeros(3, 20, 24)
    assert np.array_equal(read_mask(file), ids)
    classes = read_item((photo, file), "segment", torch.arange(256).flip(0).byte())[1]
    assert np.array_equal(classes, 255 - ids)


@pytest.mark.parametrize("spoil", (
    lambda path: put(path, noise(20, 24, 3)), lambda path: put(path, noise(20, 24, 2)),
    lambda path: put(path, TWO, format="JPEG"), lambda path: put(path, TWO, format="BMP"),
    lambda path: png(path, TWO.astype(int) * 300, 16), lambda path: path.write_bytes(b"junk"),
    lambda path: path.write_bytes(path.read_bytes()[:60])))
def test_what_is_no_mask_is_refused(tmp_path, spoil):
    spoil(file := png(tmp_path / "mask.png", TWO))
    assert "mask.png is no mask" in refusal(read_mask, file)


def test_all_bad_photos_and_masks_are_named_in_one_message(tmp_path):
    data = masks(tmp_path, [TWO] * 4, [TWO])
    (tmp_path / "train/images/0.jpg").write_bytes(b"junk")
    (tmp_path / "train/masks/1.png").write_bytes(b"junk")
    exif = Image.Exif()
    exif[0x0112] = 6                                    # seen turned, its mask is not
    put(tmp_path / "train/images/2.jpg", exif=exif)
    png(tmp_path / "val/masks/0.png", TWO[1:])
    says = refusal(load_data, data, "segment")
    assert "4 photos" in says and "EXIF" in says and "train/images/3.jpg" not in says
    for name in ("train/images/0.jpg", "train/masks/1.png", "images/2.jpg", "val/masks/0.png"):
        assert name in says


def test_two_photos_of_one_mask_are_refused(tmp_path):
    masks(tmp_path, [TWO], [TWO]), put(tmp_path / "train/images/0.png")
    assert "0.jpg" in refusal(load_data, tmp_path, "segment")


def test_255_may_be_ignored_or_a_class_and_each_part_needs_labels(tmp_path):
    data = masks(tmp_path / "255", [TWO * 255], [TWO * 255])
    assert "--ignore -1" in refusal(load_data, data, "segment")
    assert load_data(data, "segment", [-1])[2:] == (["0", "255"], [0, 255])
    assert "256" in refusal(load_data, data, "segment", [256])
    for i, (train, val) in enumerate(((TWO, TWO | 255), (TWO | 255, TWO), (TWO * 0, TWO * 0))):
        assert "ids" in refusal(load_data, masks(tmp_path / str(i), [train], [val]), "segment")


def test_shares_of_classes_and_names_of_a_file_are_printed(tmp_path, capsys):
    left = np.repeat(np.array([[2] * 6 + [0] * 18], np.uint8), 20, axis=0)
    data = masks(tmp_path, [left], [left * 0, left // 2])
    (tmp_path / "classes.txt").write_text("sky\nsea\n", encoding="utf-8-sig")
    assert load_data(data, "segment")[2:] == (["sky", "sea", "2"], [0, 1, 2])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [row[1] for row in rows] == ["sky", "sea", "2"]
    assert [(row[4], row[8]) for row in rows] == [
        ("75.00", "87.50"), ("0.00", "12.50"), ("25.00", "0.00")]


# ---- Classes

def photos(top, *folders):
    for folder in folders:
        put(top / folder / "0.jpg")
    return str(top)


def test_a_class_in_one_part_only_is_named(tmp_path, capsys):
    data = photos(tmp_path, "train/masks", "train/cat", "train/.x", "train", "val/cat", "val/dog")
    (tmp_path / "train/empty").mkdir()
    train, val, classes, ids = load_data(data, "classify")
    assert classes == ["cat", "dog", "masks"] and ids == [0, 1, 2]
    assert [(str(path), label) for path, label in train] == [
        (f"{data}/train/cat/0.jpg", 0), (f"{data}/train/masks/0.jpg", 2)]
    assert [label for _, label in val] == [0, 1]
    said = capsys.readouterr().out
    assert "in train or in val: dog, masks" in said
    assert f"{data}/train/.x" in said and f"no class: {data}/train/0.jpg" in said


@pytest.mark.parametrize("folders", (
    "train/Cat train/Dog val/cat val/dog", "train/a val/a", "train val", "train/a train/b",
    "train/images train/masks val/images val/masks", "a b"))
def test_folders_without_common_classes_are_refused(tmp_path, folders):
    assert "classes" in refusal(load_data, photos(tmp_path, *folders.split()), "classify")


def test_all_bad_photos_of_classes_are_named_in_one_message(tmp_path):
    data = photos(tmp_path, "train/a", "train/b", "val/a", "val/b")
    (tmp_path / "train/b/0.jpg").write_bytes(b"junk"), (tmp_path / "val/a/0.jpg").write_bytes(b"")
    says = refusal(load_data, data, "classify")
    assert "train/b/0.jpg" in says and "val/a/0.jpg" in says and "train/a" not in says


def test_a_set_without_labels_for_the_task_is_refused():
    assert "has no labels" in refusal(load_data, "voc2012", "classify")
    assert "has no labels" in refusal(load_data, "pets", "segment")


# ---- Views, batches, picture

def test_a_photo_that_is_its_own_mask_stays_so(tmp_path):
    """Scaled, cropped and mirrored together; what a crop has beyond the photo is ignored."""
    ids = np.kron(noise(5, 6, top=2), np.ones((8, 8), np.uint8))
    put(tmp_path / "photo.png", np.stack([ids * 200] * 3, axis=-1))
    item, lookup = (tmp_path / "photo.png", torch.from_numpy(ids)), torch.arange(256).byte()
    crop, whole = labels.views_of("segment", 32, 8)
    draws, margins = Draws([read_item(item, "segment", lookup)], tuple, crop, seed=0), 0
    for image, mask in (draws[i] for i in range(20)):
        assert image.shape == (3, 32, 32) and mask.shape == (32, 32)
        beyond = (image == 124).all(0)
        assert (mask[beyond] == IGNORE).float().mean() > 0.9 or beyond.sum() < 99
        assert ((image[0].int() - 200 * mask.int()).abs() < 60)[~beyond].float().mean() > 0.8
        margins += int(beyond.sum() > 99)
    assert 2 < margins < 18
    image, mask = whole(read_item(item, "segment", lookup))
    assert image.shape == (3, 32, 40) and np.array_equal(mask, ids)     # 32 x 38.4, to the patch


def test_photos_of_any_shape_are_fitted_and_stacked_by_shape():
    for shape, want in (((20, 200), (32, 320)), ((5, 7), (32, 48)), ((1, 1), (32, 32))):
        photo, mask = torch.zeros(3, *shape).byte(), torch.ones(shape).byte()
        photo, mask = labels.fitted((photo, mask), 32, 8, points=4)
        assert photo.shape[1:] == want and mask.shape == (want[0] // 2, want[1] // 2)
    image = torch.zeros(3, 2, 4)
    (wide, first), (tall, second) = labels.by_shape([(image, 0), (image.mT, 1), (image, 2)])
    assert (wide.shape, tall.shape) == ((2, 3, 2, 4), (1, 3, 4, 2))
    assert (first.tolist(), second.tolist()) == ([0, 2], [1])


def test_the_picture_shows_photos_masks_guesses_and_a_legend(tmp_path):
    photos = [torch.full((3, 40, 60), i).byte() for i in range(0, 200, 40)]
    masks = [torch.tensor([[0, 1], [1, IGNORE]]) for _ in photos]
    labels.draw_segments(photos, masks, masks, ["sky", "sea"], tmp_path / "segment.png")
    shown = np.array(Image.open(tmp_path / "segment.png")).astype(int)
    assert [shown[102, 83 + 162 * i, 0] for i in range(5)] == [0, 40, 80, 120, 160]
    sea, ignored = (255 * labels.PALETTE[[1, IGNORE]]).numpy()
    assert abs(shown[246, 446] - (0.3 * 80 + 0.7 * sea)).max() < 3          # right in the mask
    assert abs(shown[306, 446] - (0.3 * 80 + 0.7 * ignored)).max() < 3      # and below that
    assert abs(shown[-10, [312, 474]] - [sea, ignored]).max() < 3           # the legend
