"""Photos without labels: one reader, one listing, one order of draws, the same in every stage."""
import math
import os
import random
import sys
import warnings
import zlib
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2
from torchvision.utils import make_grid

from support.runs import RANK, WORLD, InputError, leave_signals, one_line, rank_0_first, write_whole

BICUBIC = dict(interpolation=v2.InterpolationMode.BICUBIC, antialias=True)  # of every family
SETS = {            # torchvision's downloads: class, its word for a part, training, held-out part
    "imagenette": (partial(datasets.Imagenette, size="320px"), "split", "train", "val"),
    "flowers102": (datasets.Flowers102, "split", "train", "test"),
    "pets": (datasets.OxfordIIITPet, "split", "trainval", "test"),
    "voc2012": (datasets.VOCSegmentation, "image_set", "train", "val"),
}
# Folders of masks in labels.LAYOUTS, and what lies beside them: no photos.
MASK_FOLDERS = {"masks", "annotations", "trainannot", "valannot", "testannot", "gtFine", "gtCoarse",
                "SegmentationClass", "SegmentationObject"}


def views(size):
    """Photos to squares: -> (a random crop, mirrored or not, for training; all of the middle)."""
    return (v2.Compose([v2.RandomResizedCrop(size, (0.35, 1), **BICUBIC),
                        v2.RandomHorizontalFlip()]),
            v2.Compose([v2.Resize(size, **BICUBIC), v2.CenterCrop(size)]))


def some(things, most=8):
    """The first of many things for a message, and how many more there are."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more


def open_image(source):
    """Path or PIL image -> PIL image. Above Pillow's limit of pixels is an error, not a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = source if isinstance(source, Image.Image) else Image.open(source)
    if math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.size} pixels, above Pillow's limit of {Image.MAX_IMAGE_PIXELS}")
    image.filename = ""                 # else Pillow maps a TIFF from it, and turns only its size
    return image


def read_image(source, short=None):
    """Path, PIL image, drawn tensor, or an item that begins with one -> uint8 (3, H, W), RGB,
    upright by EXIF. InputError: unreadable, more than 8 bits a channel, or above Pillow's limit.

    short: a JPEG may be decoded at 1/2, 1/4 or 1/8, its shorter side not below twice that.
    """
    source = source[0] if isinstance(source, tuple) else source
    if isinstance(source, torch.Tensor):
        return source
    try:
        image = open_image(source)
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
        if short:
            image.draft(None, (2 * short, 2 * short))
        return v2.functional.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:                          # junk makes decoders raise nearly anything
        raise InputError(f"{source} is not a readable image: {one_line(error)}") from None


def find_images(folder, apart=MASK_FOLDERS):
    """Paths of all images below a folder, sorted. A line says what was found, and what was left
    out: dot names, folders of masks (apart), of a run of ours, and links in a circle."""
    found, left_out = [], []
    for top, folders, files in os.walk(folder, followlinks=True):
        for name in [*folders]:
            path = Path(top, name)
            circle = os.path.realpath(path) in map(os.path.realpath, path.parents)
            ours = (path / "run.json").exists()
            if circle or ours or name in apart or name.startswith("."):
                folders.remove(name)
                left_out.append(str(path))
        for name in filter(is_image_file, files):
            (left_out if name.startswith(".") else found).append(os.path.join(top, name))
    kinds = Counter(os.path.splitext(path)[1].lower() for path in found)
    line = f"{folder}: " + (", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
                            or "expected a folder of images, found none")
    if left_out:
        line += f"; left out: {some(sorted(left_out))}"
    if not found:
        raise InputError(line)
    print(line)
    return sorted(found)


@rank_0_first()
def open_set(name, root="data"):
    """One of torchvision's sets, downloaded to `root` on first use -> [training, held-out part]."""
    kind, argument, *parts = SETS[name]
    try:
        return [kind(root, download=True, **{argument: part}) for part in parts]
    except Exception as error:          # a package, the network, or an archive that was cut
        raise InputError(f"--data {name} could not be had in {root}: {one_line(error)}") from None


def names(source):
    """The real paths of the photos that a dataset lists. What is no list: its kind and length."""
    found = []
    for part in getattr(source, "datasets", [source]):
        if isinstance(part, list):
            photos = (item[0] if isinstance(item, tuple) else item for item in part)
            found += map(os.path.realpath, photos)
        else:
            found.append(f"{type(part).__name__} of {len(part)}")
    return found


def refuse_shared(train, held_out):
    """InputError if both parts list a file, by whatever links."""
    if shared := {*names(train)} & {*names(held_out)}:
        raise InputError(f"photos both in the training and in the held-out part, {len(shared)}: "
                         f"{some(sorted(shared))}")


def unlabelled(data):
    """Photos for stages 1 and 2 -> (training, held out): paths, or items that begin with an image.

    data: folders of any depth, or names in SETS, which a folder of that name beats. A folder with
    train/ and val/ holds out val/; of any other every tenth photo is held out, at most 256.
    """
    parts = []
    for folder in data:
        if folder in SETS and not Path(folder).is_dir():
            parts.append(open_set(folder))
        elif Path(folder, "train").is_dir() and Path(folder, "val").is_dir():
            parts.append([find_images(Path(folder, part)) for part in ("train", "val")])
        else:
            paths = find_images(folder)
            step = max(10, math.ceil(len(paths) / 256))
            parts.append([[path for i, path in enumerate(paths) if i % step], paths[::step]])
    train, held_out = map(ConcatDataset, zip(*parts))
    if not len(train):
        raise InputError(f"{some(data)} holds one photo, which is held out: expected more")
    refuse_shared(train, held_out)
    return train, held_out


def seed_of(*parts):
    """Any values -> a seed of 32 bits, which is all that PyTorch's generator looks at."""
    return zlib.crc32(repr(parts).encode())


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, "epoch", epoch)))


class Draws(Dataset):
    """Draw i of a run, transform(read(item)), is a function of (seed, i) alone: any number of
    workers sees the same data. Every epoch is a permutation; seed None: in order. Draw (i, size)
    uses transform[size]. skip: a photo that cannot be read is named on stderr, once for all
    workers, and the next photo takes its place."""

    def __init__(self, source, read, transform, seed=None, skip=False):
        self.source, self.read, self.transform = source, read, transform
        self.seed, self.skip = seed, skip
        self.named = torch.zeros(len(source), dtype=torch.bool).share_memory_() if skip else None

    def __len__(self):
        return len(self.source)

    def __getitem__(self, draw):
        i, transform, n = draw, self.transform, len(self)
        if isinstance(draw, tuple):
            i, transform = draw[0], self.transform[draw[1]]
        order = range(n) if self.seed is None else permutation(n, self.seed, i // n)
        for place in range(i, i + n):
            photo = int(order[place % n])
            try:
                item = self.read(self.source[photo])
            except (InputError, OSError) as error:      # OSError: of a torchvision set
                if not self.skip:
                    raise
                if not self.named[photo]:
                    print(f"left out: {error}", file=sys.stderr)
                self.named[photo] = True
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.seed, i))
                return transform(item)
        raise InputError(f"none of {n} photos can be read")


def batches(args, first):
    """Yield this process's draws of each step after `first`, [(i, size), ...]. A step's size is a
    function of (seed, step) alone; its batch holds about as many tokens as --batch-size photos of
    the first size. Draws are numbered on from step to step."""
    start = 0
    for step in range(args.steps):
        size = random.Random(f"size {args.seed} {step}").choice(args.size)
        n = WORLD * max(1, round(args.batch_size * (args.size[0] / size) ** 2 / WORLD))
        if step >= first:
            yield [(i, size) for i in range(start + RANK, start + n, WORLD)]
        start += n


def loaders(args, source, held_out, first, most=256):
    """Stages 1 and 2: -> (batches uint8 (B, 3, size, size) of the steps after `first`; held-out
    batches of the first size, in order). More than `most` held-out photos change no table's second
    digit. Without --data the images are drawn, and stay as they are."""
    crops, whole = {size: views(size)[0] for size in args.size}, views(args.size[0])[1]
    if not args.data:
        crops, whole = dict.fromkeys(args.size, v2.Identity()), v2.Identity()
    loader = partial(DataLoader, num_workers=args.workers, pin_memory=torch.cuda.is_available(),
                     worker_init_fn=leave_signals)
    train = Draws(source, partial(read_image, short=max(args.size)), crops, args.seed, skip=True)
    few = Subset(held_out, range(0, len(held_out), math.ceil(len(held_out) / most)))
    test = Draws(few, partial(read_image, short=args.size[0]), whole, skip=True)
    return loader(train, batch_sampler=batches(args, first)), loader(test, args.batch_size // WORLD)


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
