"""Masks and labels are read as the files hold them, or refused with a sentence that names them."""
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

from support import labels
from support.labels import IGNORE, LAYOUTS, load_data, read_item, read_mask
from support.photos import Draws


def noise(*shape, top=256, seed=0):
    return np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8)


TWO = noise(20, 24, top=2)


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


def masks(top, train, val):
    """A folder of images/masks with these ids -> its name."""
    for part, arrays in (("train", train), ("val", val)):
        for i, ids in enumerate(arrays):
            put(top / part / f"images/{i}.jpg", noise(*ids.shape, 3, seed=i))
            put(top / part / f"masks/{i}.png", ids)
    return str(top)


VOC_LIST = "ImageSets/Segmentation/{}.txt"
FILES = {       # of each layout: a photo and its mask, by part and name
    "images/masks": ("{}/images/{}.jpg", "{}/masks/{}.png"),
    "VOC": ("JPEGImages/{1}.jpg", "SegmentationClass/{1}.png"),
    "CamVid": ("{}/{}.png", "{}annot/{}.png"),
    "Cityscapes": ("leftImg8bit/{}/ulm/{}_leftImg8bit.png",
                   "gtFine/{}/ulm/{}_gtFine_labelTrainIds.png"),
    "ADE20K": ("images/{}/{}.jpg", "annotations/{}/{}.png")}


def lay_out(top, kind):
    """A photo with a mask of the ids 0, 1, 2, 255 in each part of a layout -> [(photo, mask)]."""
    made, parts = [], LAYOUTS[kind].get("parts", ("train", "val"))
    for part in parts:
        photo, mask = (top / file.format(part, f"the {part}") for file in FILES[kind])
        made.append((put(photo), put(mask, np.tile(np.array([0, 1, 2, 255], np.uint8), (20, 6)))))
        if kind == "VOC":
            put(top / "JPEGImages/in no list.jpg"), put(top / VOC_LIST.format(part), format="PNG")
            (top / VOC_LIST.format(part)).write_bytes(f"\ufeff\r\nthe {part} \r\n".encode())
    return made


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_its_pairs_and_class_names(tmp_path, capsys, kind):
    made = lay_out(tmp_path, kind)
    train, val, classes, ids = load_data(str(tmp_path), "segment")
    assert [*train, *val] == made and f"read as {kind}" in capsys.readouterr().out
    assert ids == [id for id in (0, 1, 2) if id not in LAYOUTS[kind].get("ignore", ())]
    known = LAYOUTS[kind].get("names", ["0", "1", "2"])
    assert classes == [known[id] for id in ids]
    assert LAYOUTS["VOC"]["names"][20] == "tv"
    assert LAYOUTS["Cityscapes"]["names"][18] == "bicycle"


def test_a_list_that_names_no_photo_is_refused(tmp_path):
    lay_out(tmp_path, "VOC")
    (tmp_path / VOC_LIST.format("val")).write_bytes(b"the val\nval 9\n")
    assert "val 9" in refusal(load_data, tmp_path, "segment")


@pytest.mark.parametrize("depth", (1, 2, 4, 8))
@pytest.mark.parametrize("palette", (False, True))
def test_ids_are_what_the_file_stores(tmp_path, depth, palette):
    ids, colours = noise(20, 24, top=2 ** depth), noise(2 ** depth, 3).tobytes()
    file, photo = png(tmp_path / "mask.png", ids, depth, colours * palette), torch.zeros(3, 20, 24)
    assert np.array_equal(read_mask(file), ids)
    classes = read_item((photo, file), "segment", torch.arange(256).flip(0).byte())[1]
    assert np.array_equal(classes, 255 - ids)


@pytest.mark.parametrize("spoil", (
    lambda path: put(path, noise(20, 24, 3)), lambda path: put(path, TWO, format="BMP"),
    lambda path: png(path, TWO.astype(int) * 300, 16),
    lambda path: path.write_bytes(path.read_bytes()[:60])))
def test_what_is_no_mask_is_refused(tmp_path, spoil):
    spoil(file := png(tmp_path / "mask.png", TWO))
    assert "mask.png is no mask" in refusal(read_mask, file)


def test_all_bad_photos_and_masks_are_named_in_one_message(tmp_path):
    data = masks(tmp_path, [TWO] * 5, [TWO])
    (tmp_path / "train/images/0.jpg").write_bytes(b"junk")
    (tmp_path / "train/masks/1.png").write_bytes(b"junk")
    (tmp_path / "train/masks/3.png").unlink()
    put(tmp_path / "train/images/2.jpg", noise(24, 20, 3))
    put(tmp_path / "val/masks/0.png", TWO[1:])
    says = refusal(load_data, data, "segment")
    assert "5 photos" in says and "images/4.jpg" not in says
    for name in ("images/0.jpg", "masks/1.png", "images/2.jpg", "masks/3.png", "val/masks/0.png"):
        assert name in says


def test_255_may_be_ignored_or_a_class_and_each_part_needs_labels(tmp_path):
    data = masks(tmp_path / "255", [TWO * 255], [TWO * 255])
    assert "--ignore -1" in refusal(load_data, data, "segment")
    assert load_data(data, "segment", [-1])[2:] == (["0", "255"], [0, 255])
    for i, (train, val) in enumerate(((TWO, TWO | 255), (TWO | 255, TWO), (TWO * 0, TWO * 0))):
        assert "ids" in refusal(load_data, masks(tmp_path / str(i), [train], [val]), "segment")


def test_classes_have_the_names_of_a_file_if_each_has_its_own(tmp_path, capsys):
    data = masks(tmp_path, [noise(20, 24, top=5)], [TWO])
    (tmp_path / "classes.txt").write_text("sky\n\nsea\nsea\n", encoding="utf-8-sig")
    assert load_data(data, "segment")[2:] == (["sky", "1", "2", "3", "4"], [0, 1, 2, 3, 4])
    assert "without a pixel in train or in val: [2, 3, 4]" in capsys.readouterr().out


# ---- Classes

def photos(top, folders):
    for folder in folders.split():
        put(top / folder / "0.jpg")
    return str(top)


def test_a_class_in_one_part_only_is_named_and_bad_held_out_photos_are_refused(tmp_path, capsys):
    data = photos(tmp_path, "train/cat train/masks/a/b val/cat val/dog")
    train, val, classes, ids = load_data(data, "classify")
    assert classes == ["cat", "dog", "masks"] and ids == [0, 1, 2]
    assert [label for _, label in train] == [0, 2] and [label for _, label in val] == [0, 1]
    assert "in train or in val: dog, masks" in capsys.readouterr().out
    for path, _ in (*val, train[0]):                    # training leaves them out
        path.write_bytes(b"junk")
    says = refusal(load_data, data, "classify")
    assert "2 photos" in says and all(str(path) in says for path, _ in val)


@pytest.mark.parametrize("folders", (
    "train/a val/a", "train/a train/b", "a b", "train train/a train/b val/a val/b",
    "train/images train/masks val/images val/masks"))
def test_folders_without_common_classes_or_with_photos_of_none_are_refused(tmp_path, folders):
    assert "classes" in refusal(load_data, photos(tmp_path, folders), "classify")
    assert "there is no such folder" in refusal(load_data, str(tmp_path / "typo"), "classify")


# ---- Views

def test_a_photo_that_is_its_own_mask_stays_so():
    """Scaled, cropped and mirrored together; what a crop has beyond the photo is ignored."""
    ids = torch.from_numpy(np.kron(noise(5, 6, top=2), np.ones((8, 8), np.uint8)))
    item = read_item((ids.expand(3, -1, -1) * 200, ids), "segment", torch.arange(256).byte())
    crop, whole = labels.views_of("segment", 32, 8)
    draws, ignored = Draws([item], tuple, crop, seed=0), 0
    for image, mask in (draws[i] for i in range(20)):
        assert image.shape == (3, 32, 32) and mask.shape == (32, 32)
        beyond = mask == IGNORE
        assert (image[:, beyond] == 124).float().mean() > 0.9 or not beyond.any()
        assert ((image[0].int() - 200 * mask.int()).abs() < 60)[~beyond].float().mean() > 0.8
        ignored += int(beyond.any())
    assert 2 < ignored < 18
    image, mask = whole(item)
    assert image.shape == (3, 32, 40) and torch.equal(mask, ids)        # 32 x 38.4, to the patch
