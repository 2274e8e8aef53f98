"""Photos with labels or masks, for stage 3: lists of (image, label or mask), each a path, a PIL
image or a drawn tensor."""
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks

from demo.shapes import Shapes
from support.photos import BICUBIC, SETS, find_images, open_image, open_set, read_image
from support.photos import refuse_shared, save_picture, some, views
from support.runs import InputError, bar, one_line

IGNORE = 255                                # in our masks: neither in the loss nor in the score
PALETTE = torch.rand(256, 3, generator=torch.Generator().manual_seed(6)) * 0.8 + 0.2
PALETTE[0], PALETTE[IGNORE] = 0, 1                      # background black, ignored white
# {} is train or val, or the two of `parts`; ends: what photos' and masks' names have after the name
# they share; listed: a file of photos' names; ignore: ids that count nowhere; names: of id 0, 1 ...
LAYOUTS = {
    "images/masks": dict(photos="{}/images", masks="{}/masks"),
    "VOC": dict(
        photos="JPEGImages", masks="SegmentationClass", listed="ImageSets/Segmentation/{}.txt",
        names="background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, "
        "dining table, dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv"),
    "CamVid": dict(photos="{}", masks="{}annot", ignore=[11], names="sky, building, pole, road, "
                   "pavement, tree, sign, fence, car, pedestrian, bicyclist, void"),
    "Cityscapes": dict(
        photos="leftImg8bit/{}", masks="gtFine/{}", ends=("_leftImg8bit", "_gtFine_labelTrainIds"),
        names="road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, "
        "vegetation, terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle"),
    "ADE20K": dict(photos="images/{}", masks="annotations/{}", parts=("training", "validation"),
                   ignore=[0]),
}


def read_mask(source):
    """Path, PIL image or drawn mask -> ids as the file stores them, uint8 (H, W)."""
    if isinstance(source, torch.Tensor):
        return source
    try:
        image = open_image(source)
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


def lines_of(file):
    """The lines of a text in UTF-8, with or without a byte-order mark."""
    try:
        return [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as error:
        raise InputError(f"{file}: expected names, a line each: {one_line(error)}") from None


def by_name(folder, end):
    """{name: path} of the images in a folder whose names are NAME + end + suffix."""
    paths = [path for path in map(Path, find_images(folder)) if path.stem.endswith(end)]
    named = {str(path.relative_to(folder).with_suffix("")).removesuffix(end): path
             for path in paths}
    if len(named) < len(paths):
        same = sorted({*paths} - {*named.values()})
        raise InputError(f"expected one suffix of each name in {folder}, found also {some(same)}")
    return named


def pairs(data, part, photos, masks, ends=("", ""), listed=None, **_):
    """A part of a folder that a row of LAYOUTS fits -> [(photo, mask), ...], none opened."""
    top, below = (Path(data, folder.format(part)) for folder in (photos, masks))
    photo, mask = by_name(top, ends[0]), by_name(below, ends[1])
    file = listed and Path(data, listed.format(part))
    wanted = set(filter(None, lines_of(file))) if listed else photo.keys() | mask.keys()
    both = sorted(wanted & photo.keys() & mask.keys())
    line = f"{file or data}: {len(both)} photos in {top} with masks in {below}"
    if lone := sorted(wanted.difference(both)):
        line += f", {len(lone)} names without photo or mask: {some(lone)}"
    if not both or listed and lone:
        raise InputError(line)
    print(line)
    return [(photo[name], mask[name]) for name in both]


def by_layout(data):
    """-> training pairs, held-out pairs, names of id 0, 1, ..., the row of LAYOUTS that fits."""
    expected = []
    for name, row in LAYOUTS.items():
        parts = row.get("parts", ("train", "val"))
        folders = {row[key].format(part): None for key in ("photos", "masks") for part in parts}
        if all(Path(data, folder).is_dir() for folder in folders):
            break
        expected.append(" ".join(folders))
    else:
        raise InputError(f"{data} is not laid out for --task segment, expected the folders "
                         f"{', or '.join(expected)}")
    print(f"{data}: read as {name}")
    names, file = row["names"].split(", ") if "names" in row else [], Path(data, "classes.txt")
    names = lines_of(file) if file.is_file() else names
    return *(pairs(data, part, **row) for part in parts), names, row


def by_class(data):
    """train/CLASS/ and val/CLASS/ -> [(photo, label), ...] of each part, class names."""
    parts = []
    for top in (Path(data, "train"), Path(data, "val")):
        paths = [Path(path) for path in find_images(top, apart=())] if top.is_dir() else []
        if loose := [str(path) for path in paths if path.parent == top]:
            print(f"left out, in the folder of no class: {some(loose)}")
        parts.append([(path, path.relative_to(top).parts[0]) for path in paths
                      if path.parent != top])
    train, val = ({name for _, name in part} for part in parts)
    classes, alone = sorted(train | val), sorted(train ^ val)
    if len(classes) < 2 or not train & val or classes == ["images", "masks"]:
        raise InputError(f"{data} is not laid out for --task classify: expected photos of the same "
                         "classes, two or more, in train/CLASS and val/CLASS, found the classes "
                         f"{some(classes) or 'none'}")
    if alone:
        print(f"{data}: classes without a photo in train or in val: {some(alone)}")
    return *([(path, classes.index(name)) for path, name in part] for part in parts), classes


def look(part, i, segment):
    """Look at a photo, and at its mask to segment -> (pixels of each id (256,), what is wrong)."""
    none = torch.zeros(256, dtype=torch.long)
    try:
        item = part[i]
        size = read_image(item, None if segment else 32).shape[1:]
        if not segment:
            return none, None
        ids = read_mask(item[-1])
        if ids.shape != size:
            raise InputError(f"{item[-1]} has {tuple(ids.shape)} pixels, {item[0]}, upright by "
                             f"EXIF, has {tuple(size)}: expected the same")
        return ids.flatten().bincount(minlength=256), None
    except (InputError, OSError) as error:              # OSError: of a torchvision set
        return none, str(error)


def load_data(data, task, ignore=None):
    """-> (training items, held-out items, class names, their ids in masks), after a look at all.
    ignore: ids that count nowhere; None: IGNORE and those of the folder's layout."""
    segment, row = task == "segment", {}
    if data is None:
        parts = Shapes("train"), Shapes("val")
        names = ["background"] * segment + list(Shapes.classes)
    elif data in SETS and not Path(data).is_dir():
        if segment != (data == "voc2012"):
            raise InputError(f"--data {data} has no labels for --task {task}")
        parts = open_set(data)
        names = LAYOUTS["VOC"]["names"].split(", ") if segment else [
            name if isinstance(name, str) else name[0] for name in parts[0].classes]
    elif segment:
        *parts, names, row = by_layout(data)
    else:
        *parts, names = by_class(data)
    refuse_shared(*parts)
    with ThreadPoolExecutor() as pool:                  # decoding leaves Python's lock
        looks = [[*bar(pool.map(partial(look, part, segment=segment), range(len(part))),
                       "looking at photos", len(part))] for part in parts]
    counts = torch.stack([sum(count for count, _ in part) for part in looks])           # (2, 256)
    if wrong := [error for part in looks for _, error in part if error]:
        raise InputError(f"{len(wrong)} photos of {data} cannot be used: {'; '.join(wrong)}")
    if not segment:
        return *parts, names, [*range(len(names))]
    ignore = [IGNORE, *row.get("ignore", ())] if ignore is None else ignore
    if not all(-1 <= id <= 255 for id in ignore):
        raise InputError(f"--ignore {ignore}: expected ids from 0 to 255, or -1 for none")
    counts[:, [id for id in ignore if id >= 0]] = 0
    ids = counts.sum(0).nonzero().flatten().tolist()
    if not 2 <= len(ids) <= 255 or not counts.sum(1).all():
        raise InputError(f"{data} has the ids {ids} besides {ignore}, which --ignore -1 would "
                         "count: expected 2 to 255 classes, and labels in train and in val")
    classes = [names[id] if id < len(names) and names.count(names[id]) == 1 else str(id)
               for id in ids]
    for id, name in zip(ids, classes):
        train, val = (100 * counts[:, id] / counts.sum(1)).tolist()
        print(f"class {name:24s} id {id:3d}  {train:6.2f} % of train  {val:6.2f} % of val")
    return *parts, classes, ids


def fitted(item, size, patch, points=None):
    """(photo uint8 (3, H, W), mask) -> the photo in its own shape, its shorter side scaled to size,
    each side to the nearest multiple of the patch; points: the mask with that many a patch."""
    photo, mask = item
    grid = [max(1, round(n * size / min(photo.shape[1:]) / patch)) for n in photo.shape[1:]]
    if points:
        shape = [n * points for n in grid]
        mask = F.interpolate(mask[None, None], shape, mode="nearest-exact")[0, 0]
    return v2.functional.resize(photo, [n * patch for n in grid], **BICUBIC), mask


def views_of(task, size, patch):
    """-> (a random crop, mirrored or not, for training; all of a photo), with its mask, if any."""
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
    colours = [tuple(rgb) for rgb in (255 * PALETTE).int()[[*range(len(classes)), IGNORE]].tolist()]
    rows, square = [[], [], [], []], v2.CenterCrop(side)
    for photo, *masks in zip(photos, truths, guesses):
        photo = v2.functional.resize(photo, None, max_size=side)
        rows[0].append(square(photo))
        for row, mask in zip(rows[1:], masks):
            mask = F.interpolate(mask[None, None].byte(), photo.shape[1:], mode="nearest-exact")[0]
            mask = mask.clamp(max=len(classes)) == torch.arange(len(colours))[:, None, None]
            row.append(square(draw_segmentation_masks(photo, mask, 0.7, colours)))
    for name, colour in zip([*classes, "ignored"], colours):
        swatch = Image.new("RGB", (side, side // 8), colour)
        ImageDraw.Draw(swatch).text((4, 4), name, "white", stroke_width=2, stroke_fill="black")
        rows[3].append(v2.functional.pil_to_tensor(swatch))
    save_picture([torch.stack(row) / 255 for row in rows], ["photo", "mask", "guess", "classes"],
                 path)
