"""Photos without labels: every stage reads, lists and draws them by the functions here."""
import math
import os
import sys
import zlib
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2
from torchvision.utils import make_grid

from support.runs import RANK, WORLD, InputError, leave_signals, one_line, write_whole

BICUBIC = dict(interpolation=v2.InterpolationMode.BICUBIC, antialias=True)  # of every family
# Folders of masks in labels.LAYOUTS, and what lies beside them: no photos.
MASK_FOLDERS = {"masks", "annotations", "trainannot", "valannot", "testannot", "gtFine", "gtCoarse",
                "SegmentationClass", "SegmentationObject"}


def views(size):
    """Views of a photo, squares -> (random crop, mirrored or not, to train on; its middle)."""
    crop = v2.RandomResizedCrop(size, (0.35, 1), **BICUBIC)
    whole = v2.Compose([v2.Resize(size, **BICUBIC), v2.CenterCrop(size)])
    return v2.Compose([crop, v2.RandomHorizontalFlip()]), whole


def read_image(source, short=None):
    """Path, tensor of the demo, or a tuple that begins with one -> uint8 (3, H, W), RGB, upright by
    EXIF. InputError: unreadable, more than 8 bits a channel, or above Pillow's limit. short: to
    save time a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side is
    at least 2 * short."""
    source = source[0] if isinstance(source, tuple) else source
    if isinstance(source, torch.Tensor):
        return source
    try:
        image = Image.open(source)
        image.filename = ""             # else Pillow maps a TIFF from it, and turns only its size
        if image.mode[0] in "IF" or math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.mode}, {image.size} pixels: expected 8 bits a channel, below "
                             f"Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels")
        if short:
            image.draft(None, (2 * short, 2 * short))
        return v2.functional.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:                          # junk makes decoders raise nearly anything
        raise InputError(f"{source} is not a readable image: {one_line(error)}") from None


def find_images(folder, classes=False):
    """Sorted paths of all images below a folder. It prints what it found and what it left out: dot
    names, MASK_FOLDERS, folders of our runs, circular links, unreadable folders. classes: the
    folders in `folder` are classes, whatever their names."""
    found, left_out = [], []
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: there is no such folder")
    for top, folders, files in os.walk(folder, followlinks=True,
                                       onerror=lambda error: left_out.append(str(error))):
        for name in [*folders]:
            path = Path(top, name)
            circle = os.path.realpath(path) in map(os.path.realpath, path.parents)
            masks = name in MASK_FOLDERS and not (classes and path.parent == Path(folder))
            if circle or masks or name.startswith(".") or os.path.exists(path / "run.json"):
                folders.remove(name)
                left_out.append(str(path))
        for name in filter(is_image_file, files):
            (left_out if name[0] == "." else found).append(os.path.join(top, name))
    kinds = Counter(os.path.splitext(path)[1].lower() for path in found)
    line = f"{folder}: " + (", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "no image")
    if left_out:
        line += f"; left out {len(left_out)}: {', '.join(sorted(left_out)[:8])}"
    if not found:
        raise InputError(line)
    if RANK == 0:
        print(line, file=sys.stderr)                    # stdout has the table of --predict
    return sorted(found)


def names(source):
    """The real paths of the photos of a list. The demo's images have none."""
    folder = lru_cache(os.path.realpath)                # once each: a million photos take minutes
    paths = [item[0] if isinstance(item, tuple) else item
             for item in (source if isinstance(source, list) else ())]
    return [os.path.realpath(path) if os.path.islink(path) else
            os.path.join(folder(os.path.dirname(path)), os.path.basename(path)) for path in paths]


def refuse_shared(train, held_out):
    """InputError if both parts list the same file, also by way of symbolic links."""
    if shared := sorted({*names(train)} & {*names(held_out)}):
        raise InputError(f"{len(shared)} photos are trained on and held out: {shared[:8]}")


def unlabelled(data):
    """Folders of photos for stages 1 and 2 -> (training, held out), lists of paths. Held out is
    val/ of a folder with train/ and val/, else every tenth photo, at most 256."""
    train, held_out = [], []
    for folder in data:
        if Path(folder, "train").is_dir() and Path(folder, "val").is_dir():
            train += find_images(Path(folder, "train"))
            held_out += find_images(Path(folder, "val"))
        else:
            paths = find_images(folder)
            step = max(10, math.ceil(len(paths) / 256))
            train += [path for i, path in enumerate(paths) if i % step]
            held_out += paths[::step]
    if not train:
        raise InputError(f"--data {data} holds one photo, which is held out: expected more")
    refuse_shared(train, held_out)
    return train, held_out


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n photos in an epoch -> int64 (n,). It depends on the arguments alone."""
    seed = zlib.crc32(repr((seed, "epoch", epoch)).encode())        # PyTorch uses 32 bits of it
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class Draws(Dataset):
    """Draw i of a run is transform(read(item)). It depends on seed and i alone, not on workers or
    processes. Each epoch is a permutation; with seed None photos come in order. skip: a photo that
    cannot be read is named on stderr, and the next photo takes its place."""

    def __init__(self, source, read, transform, seed=None, skip=False):
        self.source, self.read, self.transform = source, read, transform
        self.seed, self.skip = seed, skip

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        n = len(self)
        order = range(n) if self.seed is None else permutation(n, self.seed, i // n)
        for place in range(i, i + n):
            try:
                item = self.read(self.source[int(order[place % n])])
                break
            except InputError as error:
                if not self.skip:
                    raise
                print(f"left out: {error}", file=sys.stderr)
        else:
            raise InputError(f"none of {n} photos can be read")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(repr((self.seed, i)).encode()))
            return self.transform(item)


def loaders(args, source, held_out, first):
    """-> (training batches, uint8 (B, 3, size, size), of the steps after `first`; held-out batches,
    in order, of at most 256 photos, since more change no table's second digit). Training sees
    random crops of photos, and the demo's images whole."""
    read, (crop, whole) = partial(read_image, short=args.size), views(args.size)
    train = Draws(source, read, crop if args.data else whole, args.seed, skip=True)
    test = Draws(held_out, read, whole, skip=True)
    order = range(first * args.batch_size + RANK, args.steps * args.batch_size, WORLD)  # our part
    few = range(0, len(test), math.ceil(len(test) / 256))
    loader = partial(DataLoader, batch_size=args.batch_size // WORLD, num_workers=args.workers,
                     pin_memory=torch.cuda.is_available(), worker_init_fn=leave_signals)
    return loader(train, sampler=order), loader(test, sampler=few)


def save_picture(rows, captions, path):
    """Write a PNG: rows of images (n, 3, h, w) from 0 to 1, eight a line, and their captions."""
    strips = [v2.functional.to_pil_image(make_grid(row.clamp(0, 1), pad_value=1)) for row in rows]
    width = max([strip.width for strip in strips] + [8 * len(caption) for caption in captions])
    sheet, y = Image.new("RGB", (width, sum(20 + strip.height for strip in strips)), "white"), 0
    for caption, strip in zip(captions, strips, strict=True):
        ImageDraw.Draw(sheet).text((4, y + 2), caption, "black", ImageFont.load_default(13))
        sheet.paste(strip, (0, y + 20))
        y += 20 + strip.height
    write_whole(path, partial(sheet.save, format="png"))
