"""Photos with labels or masks, for stage 3: lists of (image, label or mask)."""
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2

from demo.shapes import Shapes
from support.photos import BICUBIC, find_images, read_image, refuse_shared, save_picture, views
from support.runs import InputError, bar, one_line

TEXT = dict(encoding="utf-8-sig", errors="replace")     # with a byte-order mark or without
IGNORE = 255                                # in our masks: neither in the loss nor in the score
PALETTE = torch.rand(256, 3, generator=torch.Generator().manual_seed(6)) * 0.8 + 0.2
PALETTE[0], PALETTE[IGNORE] = 0, 1                      # background black, ignored white
# {} is train or val, or the two of `parts`. A mask has its photo's name, but .png, and ends[1] for
# ends[0]. listed: a file of photos' names; ignore: ids that count nowhere; names: of id 0, 1 ...
# A new folder of masks is for photos.MASK_FOLDERS, too: else stages 1 and 2 train on masks.
LAYOUTS = {
    "images/masks": dict(photos="{}/images", masks="{}/masks"),
    "VOC": dict(
        photos="JPEGImages", masks="SegmentationClass", listed="ImageSets/Segmentation/{}.txt",
        names="background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, "
        "dining table, dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv"
        .split(", ")),
    "CamVid": dict(photos="{}", masks="{}annot", ignore=[11], names="sky building pole road "
                   "pavement tree sign fence car pedestrian bicyclist void".split()),
    "Cityscapes": dict(
        photos="leftImg8bit/{}", masks="gtFine/{}", ends=("_leftImg8bit", "_gtFine_labelTrainIds"),
        names=[kind.name for kind in Cityscapes.classes if kind.train_id in range(19)]),
    "ADE20K": dict(photos="images/{}", masks="annotations/{}", parts=("training", "validation"),
                   ignore=[0]),
}


def read_mask(source):
    """Path, or mask of the demo -> ids as the file stores them, uint8 (H, W)."""
    if isinstance(source, torch.Tensor):
        return source
    try:
        image = Image.open(source)
        if image.format != "PNG" or image.mode not in ("1", "L", "P"):
            raise ValueError(f"expected a PNG, an id a pixel, found {image.format} {image.mode}")
        stretch = {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1)   # Pillow's, of 2 and 4 bits
        return torch.from_numpy(np.array(image, dtype=np.uint8) // stretch)
    except Exception as error:                          # junk makes decoders raise nearly anything
        raise InputError(f"{source} is no mask: {one_line(error)}") from None


def read_item(item, task, lookup=None, short=None):
    """-> (uint8 (3, H, W), label), or with a mask of classes (H, W), lookup[id] of each id."""
    if task == "classify":
        return read_image(item, short), item[1]
    return read_image(item), tv_tensors.Mask(lookup[read_mask(item[-1]).long()])


def pairs(data, part, photos, masks, ends=("", ""), listed=None, **_):
    """A part of a folder of this layout -> [(path of photo, path of mask), ...], files unread."""
    top, below = Path(data, photos.format(part)), Path(data, masks.format(part))
    found = {path: str(Path(path).relative_to(top).with_suffix("")) for path in find_images(top)}
    if len({*found.values()}) < len(found):
        raise InputError(f"{top} has two photos of one name: expected one a mask")
    if listed:
        file = Path(data, listed.format(part))
        wanted = {line.strip() for line in file.read_text(**TEXT).splitlines()} - {""}
        if lost := sorted(wanted - {*found.values()}):
            raise InputError(f"{file} names {len(lost)} photos that {top} lacks: {lost[:8]}; "
                             "expected names without suffix, a line each")
        found = {path: name for path, name in found.items() if name in wanted}
    return [(Path(path), below / f"{name.replace(*ends)}.png") for path, name in found.items()]


def by_layout(data):
    """-> training pairs, held-out pairs, names of id 0, 1, ..., the row of LAYOUTS that fits."""
    expected, own = [], Path(data, "classes.txt")
    for layout, row in LAYOUTS.items():
        parts = row.get("parts", ("train", "val"))
        needed = [row[key].format(part) for key in ("photos", "masks", "listed") if key in row
                  for part in parts]
        if all(Path(data, path).exists() for path in needed):
            print(f"{data}: read as {layout}")
            names = own.read_text(**TEXT).splitlines() if own.exists() else row.get("names", [])
            if any("\0" in name for name in names):
                raise InputError(f"{own} is UTF-16: expected a name a line in UTF-8")
            return *(pairs(data, part, **row) for part in parts), names, row
        expected.append(" ".join(dict.fromkeys(needed)))
    raise InputError(f"{data}, --task segment: expected in it {', or '.join(expected)}")


def by_class(data):
    """train/CLASS/ and val/CLASS/ -> [(photo, label), ...] of each part, class names."""
    parts = []
    for top in (Path(data, "train"), Path(data, "val")):
        own = not (top / "images").is_dir()             # else "masks" is a layout's, no class
        found = find_images(top, classes=own) if top.is_dir() else []
        paths = [Path(path).relative_to(top) for path in found]
        parts.append([(top / path, (path.parent.parts or ".")[0]) for path in paths])
    train, val = ({name for _, name in part} for part in parts)
    classes, alone = sorted(train | val), sorted(train ^ val)
    if len(classes) < 2 or not train & val or "." in classes:   # ".": in the folder of no class
        raise InputError(f"{data}, --task classify: expected photos of the same classes, two or "
                         f"more, in train/CLASS and val/CLASS, found {classes[:8]}")
    if alone:
        print(f"{data}: classes without a photo in train or in val: {', '.join(alone)}")
    return *([(path, classes.index(name)) for path, name in part] for part in parts), classes


def look(part, i, segment):
    """Read a photo and its mask -> what is wrong, as text; else to segment: pixels of each id."""
    try:
        item = part[i]
        shape = read_image(item, None if segment else 32).shape[1:]
        if segment:
            ids = read_mask(item[-1])
            if ids.shape != shape:
                raise InputError(f"{item[-1]} has {tuple(ids.shape)} pixels, {item[0]}, upright by "
                                 f"EXIF, {tuple(shape)}: expected the same")
            return ids.flatten().bincount(minlength=256)                        # (256,)
    except InputError as error:
        return str(error)


def load_data(data, task, ignore=None):
    """-> (training items, held-out items, class names, their ids in masks). It reads all that is
    held out and all masks, and names the bad ones; training to classify leaves bad photos out.
    ignore: ids that count nowhere; None: IGNORE and the layout's."""
    segment, row = task == "segment", {}
    if data is None:
        parts = Shapes("train"), Shapes("val")
        names = ["background"] * segment + list(Shapes.classes)
    elif not Path(data).is_dir():
        raise InputError(f"--data {data}: there is no such folder")
    elif segment:
        *parts, names, row = by_layout(data)
    else:
        *parts, names = by_class(data)
    refuse_shared(*parts)
    with ThreadPoolExecutor() as pool:                  # decoding leaves Python's lock
        looks = [[*bar(pool.map(partial(look, part, segment=segment), range(len(part))),
                       "looking at photos", len(part))] for part in parts[not segment:]]
    if wrong := [found for part in looks for found in part if isinstance(found, str)]:
        raise InputError(f"{len(wrong)} photos of {data} cannot be used: {'; '.join(wrong)}")
    if not segment:
        return *parts, names, [*range(len(names))]
    counts = torch.stack([sum(part, torch.zeros(256)) for part in looks])       # (2, 256)
    ignore = [IGNORE, *row.get("ignore", ())] if ignore is None else ignore
    ids = [id for id in counts.sum(0).nonzero().flatten().tolist() if id not in ignore]
    if not 2 <= len(ids) <= 255 or not counts[:, ids].any(1).all():
        raise InputError(f"{data} has the ids {ids} besides {ignore}, which --ignore -1 counts: "
                         "expected 2 to 255 classes, and labels in each part")
    if alone := [id for id in ids if not counts[:, id].all()]:
        print(f"{data}: ids without a pixel in train or in val: {alone}")
    named = {id: name for id, name in enumerate(names) if names.count(name) == 1}
    return *parts, [named.get(id) or str(id) for id in ids], ids


def fitted(item, size, patch, points=None):
    """(photo uint8 (3, H, W), mask) -> the same, resized: the photo's shorter side to `size`, then
    each side to the nearest multiple of the patch; the mask, if points is given, to points x points
    pixels a patch."""
    photo, mask = item
    grid = [max(1, round(n * size / min(photo.shape[1:]) / patch)) for n in photo.shape[1:]]
    if points:
        shape = [n * points for n in grid]
        mask = F.interpolate(mask[None, None], shape, mode="nearest-exact")[0, 0]
    return v2.functional.resize(photo, [n * patch for n in grid], **BICUBIC), mask


def views_of(task, size, patch):
    """-> (random crop, mirrored or not, for training; the whole photo), both with their mask."""
    if task == "classify":
        return views(size)
    fill = {tv_tensors.Mask: IGNORE, "others": 124}     # about the mean of photos
    crop = v2.Compose([v2.RandomResize(size // 2, 2 * size, **BICUBIC),
                       v2.RandomCrop(size, pad_if_needed=True, fill=fill),
                       v2.RandomHorizontalFlip()])
    return crop, partial(fitted, size=size, patch=patch)


def by_shape(draws):
    """A batch of Draws, [(input, target), ...] -> [(inputs, targets), ...], stacked by shape."""
    groups = {}
    for inputs, target in draws:
        target = torch.as_tensor(target)
        groups.setdefault((inputs.shape, target.shape), []).append((inputs, target))
    return [tuple(map(torch.stack, zip(*group))) for group in groups.values()]


def draw_segments(photos, truths, guesses, classes, path, side=160):
    """Write a PNG: photos uint8 (3, H, W), below them their masks and the guesses, and a legend.
    truths, guesses: a class or IGNORE of each pixel (H, W), of any size."""
    rows, square = [[], [], [], []], v2.CenterCrop(side)
    for photo, *masks in zip(photos, truths, guesses):
        photo = v2.functional.resize(photo, None, max_size=side) / 255
        rows[0].append(square(photo))
        for row, mask in zip(rows[1:], masks):
            mask = F.interpolate(mask[None, None].byte(), photo.shape[1:], mode="nearest-exact")
            row.append(square(0.3 * photo + 0.7 * PALETTE[mask[0, 0].long()].movedim(-1, 0)))
    for i, name in [*enumerate(classes), (IGNORE, "ignored")]:
        swatch = Image.new("RGB", (side, side // 8), tuple((255 * PALETTE[i]).int().tolist()))
        ImageDraw.Draw(swatch).text((4, 4), name, "white", stroke_width=2, stroke_fill="black")
        rows[3].append(v2.functional.to_image(swatch) / 255)
    save_picture([torch.stack(row) for row in rows], ["photo", "mask", "guess", "classes"], path)
