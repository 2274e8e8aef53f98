"""No run overwrites anything; photos, masks and odd names are read right or refused."""
import contextlib
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, refusal
from PIL import Image

import align_attention
import align_features
import finetune
import model
from finetune import load_data, read_item, read_mask
from model import Draws, InputError, find_images, read_image

SCRIPT = {"attention": align_attention, "features": align_features, "classify": finetune,
          "segment": finetune, "predict": finetune}
TURN = [None, lambda x: x, lambda x: x.flip(-1), lambda x: x.flip(-1, -2), lambda x: x.flip(-2),
        lambda x: x.mT, lambda x: x.mT.flip(-1), lambda x: x.mT.flip(-1, -2),
        lambda x: x.mT.flip(-2)]                        # by EXIF's orientation: raw -> upright
EXIF = [b"Exif\0\0II*\0\b\0\0\0\1\0\x12\1\3\0\1\0\0\0%c" % turn + bytes(7) for turn in range(9)]


def noise(*shape, seed=0, top=256):
    return np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8)


TWO, FOUR = (noise(20, 24, top=top) for top in (2, 4))


def put(path, array=noise(20, 24, 3), mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(array).convert(mode) if mode else Image.fromarray(array)).save(path, **options)
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


def state(folder, *but):
    """Every file below a folder, but in these, -> what it holds; every link -> where it leads."""
    paths = [p for p in Path(folder).rglob("*") if p.relative_to(folder).parts[0] not in but]
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
            for p in paths if not p.is_dir()}


@pytest.fixture
def world(files, tmp_path):
    top, save = shutil.copytree(files, tmp_path / "world"), model.save_vit
    teacher, student, digest = model.load_pair(top / "teacher.safetensors")
    save(student, top / "student.safetensors", stage="attention", teacher=digest)
    for task in ("classify", "segment"):
        save(teacher, top / f"{task}.safetensors", finetune.make_head(teacher.arch, task, 2),
             task=task, classes=["sky", "sea"], ids=[0, 7], size=16, stage="finetune")
    return top


def start(stage, world, main=call, **changes):
    """A good, short command, some of its flags changed or added -> what it printed."""
    data = world / (stage if stage in ("classify", "segment") else "photos")
    flags = dict(weights=world / "teacher.safetensors", task=stage, data=data, steps=1)
    if stage in ("attention", "features"):
        flags = dict(teacher=world / "teacher.safetensors", data=data, steps=1)
    if stage == "predict":
        flags = dict(weights=world / "segment.safetensors", predict=data)
    flags |= dict(out=world / "out", batch_size=2, size=16) | changes
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
    return main(SCRIPT[stage], *sum(words, ()))


READS = dict(attention="teacher student data", features="teacher student data",
             classify="weights data", segment="weights data", predict="weights predict")


@pytest.mark.parametrize("way", ("is", "holds", "lies in", "input is a link", "holds the link"))
@pytest.mark.parametrize("stage, flag", [(s, flag) for s in READS for flag in READS[s].split()])
def test_out_over_what_is_read(world, stage, flag, way):
    """run.json makes each folder look like an earlier run's, which alone would be moved aside."""
    normal = start(stage, world, lambda *words: words, student=world / "student.safetensors")
    given, box = Path(normal[normal.index(f"--{flag}") + 1]), world / "box"
    box.mkdir()
    inside = given.rename(box / given.name)
    for folder in (box, inside) if inside.is_dir() else (box,):
        (folder / "run.json").write_text('{"script": ""}')
    given, out = inside, {"is": inside, "lies in": inside / "new"}.get(way, box)
    if way == "input is a link":
        (given := world / "link").symlink_to(inside)
        (out := world / "box link").symlink_to(box)
    elif way == "holds the link":
        inside.symlink_to(inside.rename(world / "elsewhere"))
    before = state(world)
    assert "--out" in refusal(start, stage, world, **{flag: given, "out": out})
    assert state(world) == before


def test_out_of_others(world, monkeypatch):
    (world / "run.json").write_text("mine")
    before, file = state(world), world / "teacher.safetensors"
    monkeypatch.setitem(model.KNOWN, "tiny", model.load_vit(file).arch)
    for out, spec in (("photos/album1", file), ("run.json", file), ("run.json/below", file),
                      (".", f"{file}:linear"), (".", f"tiny={file}"), (".", f"tiny={file}:linear")):
        assert "--out" in refusal(start, "classify", world, weights=spec, out=world / out)
    assert state(world) == before


@pytest.mark.parametrize("stage", SCRIPT)
def test_the_next_run_keeps_the_last(world, stage, monkeypatch):
    """The same command again, a run that fails late, another task: each folder stays, numbered."""
    start(stage, world)
    first, others = state(world / "out"), state(world, "out")
    assert "out-1" in start(stage, world)
    second = state(world / "out")
    refusal(start, stage if stage != "predict" else "classify", world, lr=1e30, steps=9)
    assert "out-3" in start("segment", world) and second.keys() == first.keys()
    third = state(world / "out")
    monkeypatch.chdir(world / "out")                    # it moves; the new run belongs where it was
    start("attention", world, out=".")
    assert [state(world / f"out-{i}") for i in (1, 2, 4)] == [first, second, third]
    assert state(world, "out", *(f"out-{i}" for i in range(1, 5))) == others


def test_predictions_stay_apart(world):
    """Masks and overlays have names that two photos cannot share; a single file is taken, too."""
    names, ends = ("a.jpg", "a.png", "a.png.overlay.png", "deep/a.jpg"), (".png", ".overlay.png")
    before = [put(world / "p" / name).read_bytes() for name in names]
    start("predict", world, predict=world / "p")
    assert [(world / "p" / name).read_bytes() for name in names] == before
    assert set(state(world / "out/masks")) == {name + end for name in names for end in ends}
    assert "a.jpg\t" in start("predict", world, predict=world / "p/deep/a.jpg")
    assert len(state(world / "out/masks")) == 2
    assert set(read_mask(world / "out/masks/a.jpg.png").unique().tolist()) <= {0, 7}


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation(tmp_path, value):
    """By EXIF, EXIF behind an XMP block, or XMP alone; also when decoded at a fraction."""
    raw, path = put(tmp_path / "raw.jpg").read_bytes(), tmp_path / "x.jpg"
    upright, turned = TURN[value](read_image(tmp_path / "raw.jpg")), put(path, exif=EXIF[value])
    turned = turned.read_bytes()[2:]
    said = b'tiff:Orientation="%d"/>', b"><tiff:Orientation>%d</tiff:Orientation></a>"
    for told, rest in ((b"", turned), (b"/>", turned), *((s % value, raw[2:]) for s in said)):
        body = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:RDF><rdf:Description " + told
        block = b"\xff\xe1" + struct.pack(">H", len(body) + 24) + body + b"</rdf:RDF></x:xmpmeta>"
        path.write_bytes(raw[:2] + (block if told else b"") + rest)
        assert all(torch.equal(read_image(path, short), upright) for short in (None, 16)), told
    slope = np.add.outer(np.linspace(0, 120, 900), np.linspace(0, 135, 1200)).astype(np.uint8)
    put(path, slope, "RGB", exif=EXIF[value])
    whole, quick = (read_image(path, short)[None].float() for short in (None, 20 + 10 * value))
    assert 40 + 20 * value <= min(quick.shape[2:]) < min(whole.shape[2:]) == 900
    quick = torch.nn.functional.interpolate(quick, whole.shape[2:], mode="bilinear")
    assert (quick - whole).abs().mean() < 2


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


def test_depths(tmp_path):
    deep, big = noise(20, 24).astype(np.uint16) * 256 + 99, tmp_path / "big.tif"
    Image.frombytes("I;16B", (24, 20), deep.astype(">u2").tobytes()).save(big)
    unit, want = (deep / 65535).astype(np.float32), np.rint(deep[None] / 257)
    for path in (big, png(tmp_path / "x.png", deep, 16), put(tmp_path / "x.tif", unit)):
        assert np.array_equal(read_image(path), np.repeat(want, 3, axis=0)), path
    hole = np.where(np.arange(24) == 0, np.nan, unit).astype(np.float32)
    for bad in (unit * 255, unit - 0.9, hole, deep.astype(np.int32)):
        assert "bad.tif" in refusal(read_image, put(tmp_path / "bad.tif", bad))


@pytest.mark.parametrize("stage", ("attention", "features"))
@pytest.mark.parametrize("part", ("train", "val"))
def test_unreadable_photos(world, stage, part):
    """Named and counted once, whatever the name, held out or not; the second ends the run."""
    data, photos = world / "segment", world / "segment" / part / "images"
    (photos / "two\nlines.jpg").write_bytes(b"junk")
    assert "lines.jpg" in start(stage, world, steps=9, data=data)
    assert (world / "out/report.json").read_text().count("lines.jpg is not") == 1
    (photos / "0.jpg").write_bytes(b"")
    refusal(start, stage, world, steps=9, data=data)


def test_listing(tmp_path, capsys):
    """Links are followed, in no circles and into no run; dot names are not looked at; the rest is
    counted."""
    top, away = tmp_path / "top", put(tmp_path / "away/e.jpg").parent
    kept = ["a.jpg", "b.JPG", "deep/er/c.png", "p.webp", "q.tif", "r.tiff", "s.bmp", "t.ppm"]
    for name in (*kept, "._a.jpg", ".ipynb/d.jpg", "x.gif", "y.gif", "z.txt", "README"):
        put(top / name, format="PNG")
    (put(tmp_path / "out/f.jpg").parent / "run.json").write_text('{"script": ""}')
    for link, to in (("top/l1", away), ("top/l2", away), ("top/up", top), ("away/up", top),
                     ("top/run", tmp_path / "out")):
        (tmp_path / link).symlink_to(to)
    want = sorted([*kept, "l1/e.jpg", "l2/e.jpg"])
    assert find_images(top) == [str(top / name) for name in want]
    run, said = capsys.readouterr().out.splitlines()
    assert f"{top / 'run'}: left out" in run and len(find_images(tmp_path / "out")) == 1
    assert all(part in said for part in ("4 files", "2 .gif", "1 .txt", "1 without suffix"))


@pytest.mark.parametrize("photos, labels, depth, palette", [
    ("train/{}.png", "trainannot/{}.png", 8, b""), ("images/{}.jpg", "labels/{}_L.png", 8, b""),
    ("JPEGImages/2_{}.jpg", "SegmentationClass/2_{}.png", 8, bytes(range(9))),
    ("x/a b/{}.jpg", "y/c/{}.png", 1, b""), ("rgb/{}.jpg", "ids/{}.png", 16, b""),
    ("leftImg8bit/ulm/ulm_00000{}_000019_leftImg8bit.png",
     "gtFine/ulm/ulm_00000{}_000019_gtFine_labelIds.png", 8, b"")])
def test_label_maps_are_no_photos(tmp_path, capsys, photos, labels, depth, palette):
    """Left out, and said; but grey photos, and digits of few values beside digits, are kept."""
    for i in range(10):
        put(tmp_path / "x" / photos.format(i)), put(tmp_path / f"a/rgb/{i}.jpg")
        label = png(tmp_path / "x" / labels.format(i), TWO, depth, palette)
        png(tmp_path / f"a/grey/{i}.png", noise(20, 24) * (i > 0))      # one of them black
        png(tmp_path / f"digits/0/{i}.png", TWO), png(tmp_path / f"digits/1/{i}.png", TWO)
        if "gtFine" in labels:
            png(label.with_stem(label.stem.replace("labelIds", "instanceIds")), FOUR, 16)
            put(label.with_stem(label.stem.replace("labelIds", "color")))
    assert len(find_images(tmp_path / "a")) == 20 == len(find_images(tmp_path / "digits"))
    assert {*find_images(tmp_path / "x")} == {f"{tmp_path}/x/{photos.format(i)}" for i in range(10)}
    found = f"{label.parent}: {len(list(label.parent.iterdir()))} files left out"
    assert found in capsys.readouterr().out


ODD = ("plain", "a b", "日本語", "two\nlines", "a=b", "a:linear", "ünï", "%s", "-", "'\"", "a.b")
TURNED = {"jpeg": "RGB L CMYK", "png": "RGB RGBA L LA P 1 16", "webp": "RGB RGBA",
          "tiff": "RGB RGBA L P 1 16 F CMYK"}
MODES = TURNED | {"bmp": "RGB L P 1", "gif": "L P", "ppm": "RGB L 16", "avif": "RGB RGBA"}


def random_photo(chance, path, seed):
    kind, turn = chance.choice(list(MODES)), chance.randint(1, 8)
    mode, turn = chance.choice(MODES[kind].split()), turn if kind in TURNED else 1
    array = noise(chance.randint(1, 20), chance.randint(1, 20), 3, seed=seed)
    image = Image.fromarray(array).convert(mode if mode not in ("16", "F") else "L")
    want = np.array(image.convert("RGB"))
    if mode in ("16", "F"):
        deep = np.array(image).astype(np.uint16) * 257
        image = Image.fromarray(deep if mode == "16" else (deep / 65535).astype(np.float32))
    image.save(path, format=kind, lossless=True, **dict(exif=EXIF[turn]) if turn > 1 else {})
    if kind in ("jpeg", "avif"):                        # lossy: what the file holds, not turned
        want = np.array(Image.open(path).convert("RGB"))
    return TURN[turn](torch.from_numpy(want).permute(2, 0, 1))


@pytest.mark.parametrize("number", range(200))
def test_random_folder(tmp_path, number):
    chance, lookup = random.Random(number), torch.arange(256, dtype=torch.uint8)
    top, away, want = tmp_path / "top", tmp_path / "away", {}
    away.mkdir()
    for i in range(chance.randint(1, 4)):
        folder = top.joinpath(*chance.sample(ODD, chance.randint(0, 2)))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{chance.choice(ODD)} {i}{chance.choice(sorted(model.SUFFIXES))}"
        real = path if chance.random() < 0.8 else away / f"{i} {path.name}"
        want[str(path)] = random_photo(chance, real, 50 * number + i)
        if real != path:                                # reached by a link, and in a linked folder
            path.symlink_to(real)
            (top / "linked").is_symlink() or (top / "linked").symlink_to(away)
            want[str(top / "linked" / real.name)] = want[str(path)]
        [(folder / name).touch() for name in chance.sample(("._x.jpg", "x.txt", "y.gif", ".x"), 2)]
    assert find_images(top) == sorted(want)
    drawn = Draws(sorted(want), read_image, lambda image: image)
    for i, (path, found) in enumerate(sorted(want.items())):
        depth, palette = chance.choice((1, 2, 4, 8, 16)), noise(256, 3, seed=i).tobytes()
        ids = noise(*found.shape[1:], seed=i, top=min(256, 2 ** depth))
        palette = palette[:3 * 2 ** depth] if depth < 16 and chance.random() < 0.5 else b""
        mask = png(tmp_path / f"{i}.png", ids, depth, palette)
        photo, classes = read_item((path, mask), "segment", lookup)
        for way in (read_image(path), drawn[i][0], read_item((path, 3), "classify")[0], photo):
            assert torch.equal(way, found), path
        assert np.array_equal(read_mask(mask), ids) and np.array_equal(classes, ids), depth


def masks(top, train, val, depth=8, palette=b""):
    for part, arrays in (("train", train), ("val", val)):
        for i, ids in enumerate(arrays):
            put(top / part / f"images/{i}.jpg", noise(*ids.shape, 3, seed=i))
            png(top / part / f"masks/{i}.png", ids, depth, palette)
    return str(top)


def test_ids_of_masks(tmp_path):
    """As the files hold them; 0 and 255 are foreground or ignored, and the sentence says both."""
    says = refusal(load_data, masks(tmp_path / "255", [TWO * 255], [TWO * 255]), "segment", [255])
    assert "255" in says and "ignore" in says and "--ignore -1" in says
    assert load_data(str(tmp_path / "255"), "segment", [-1])[2:] == (["0", "255"], [0, 255])
    for i, parts in enumerate((([TWO], [TWO | 255]), ([TWO | 255], [TWO]), ([TWO * 0],) * 2)):
        refusal(load_data, masks(tmp_path / str(i), *parts), "segment", [255])
    assert load_data(masks(tmp_path / "4", [FOUR], [TWO], 2), "segment", [255])[3] == [0, 1, 2, 3]
    for name in ("train/masks/1.png", "val/masks/0.png"):   # one colour of two ids
        data = masks(tmp_path / "p", [TWO, TWO], [TWO], 8, bytes([9, 9, 9, 200, 0, 0]))
        assert load_data(data, "segment", [255])[3] == [0, 1]
        png(Path(data, name), TWO, 8, bytes([200, 0, 0, 9, 9, 9]))
        says = refusal(load_data, data, "segment", [255])
        assert f"{data}/{name}" in says and f"{data}/train/masks/0.png" in says
    refusal(load_data, str(tmp_path / "255"), "segment", [256])


def test_masks_that_do_not_fit(tmp_path):
    data = masks(tmp_path, [TWO, TWO], [TWO])
    photo, mask = tmp_path / "train/images/1.jpg", tmp_path / "train/masks/1.png"
    whole, refused = mask.read_bytes(), lambda: refusal(load_data, data, "segment", [255])
    for bad in (lambda: put(mask, TWO, "RGB"), lambda: put(mask, TWO, "LA"),
                lambda: put(mask, TWO, format="JPEG"), lambda: png(mask, TWO.astype(int) * 300, 16),
                lambda: mask.write_bytes(whole[:40]), lambda: mask.write_bytes(b"junk")):
        bad()
        assert str(mask) in refused()
    mask.write_bytes(whole)                             # as the photo lies in the file, not as seen
    put(photo, exif=EXIF[6])
    assert all(word in refused() for word in (str(mask), str(photo), "EXIF"))
    load_data((png(mask, TWO.T), data)[1], "segment", [255])
    put(photo.with_suffix(".png"))
    assert "1.jpg" in refused() and "1.png" in refused()


def test_class_lines_and_names(tmp_path, capsys):
    left = np.repeat(np.array([[2] * 6 + [0] * 18], np.uint8), 20, axis=0)
    data = masks(tmp_path, [left], [left * 0, left // 2])
    (tmp_path / "classes.txt").write_text("sky\nsea\n", encoding="utf-8-sig")
    assert load_data(data, "segment", [255])[2:] == (["sky", "sea", "2"], [0, 1, 2])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    for line, parts in zip(lines, ("sky 75.00 87.50", "sea 0.00 12.50", "2 25.00 0.00")):
        assert len(lines) == 3 and set(parts.split()) <= set(line)
    (tmp_path / "classes.txt").write_bytes(b"W\xe4sser\n")
    assert "classes.txt" in refusal(load_data, data, "segment", [255])


def test_class_folders(tmp_path, capsys, monkeypatch):
    """A folder beats the set of that name; loose photos are of no class, and that is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.SETS, "pets", None)       # asked, it would fail
    for name in "train/masks/0 train/cats/0 train/cats/1 train/.x/0 val/cats/0 val/dogs/0".split():
        put(tmp_path / f"pets/{name}.jpg")
    put(tmp_path / "pets/train/loose.jpg")
    train, val, classes, _ = load_data("pets", "classify")
    assert classes == ["cats", "dogs", "masks"] and (len(train), len(val)) == (3, 2)
    assert [*map(len, model.unlabelled(["pets"]))] == [4, 2]            # with the loose one
    assert "66.67 % of train   50.00 % of val" in (said := capsys.readouterr().out)
    (tmp_path / "pets/val/dogs/0.jpg").write_bytes(b"junk")
    assert "dogs/0.jpg" in refusal(load_data, "pets", "classify") and "1 .jpg" in said
    for i, names in enumerate(("train/a val/a", "train val", "train/a", "train/a train/b val",
                               "train/images train/masks val/images val/masks")):
        for name in names.split():
            put(tmp_path / str(i) / name / "0.jpg")
        assert str(tmp_path / str(i)) in refusal(load_data, str(tmp_path / str(i)), "classify")


@pytest.mark.parametrize("stage", READS)
def test_least_sizes(world, stage):
    [os.remove(path) for path in find_images(world / "photos")[2:]]      # one photo is held out
    assert start(stage, world, size=8)
    thin = np.where(np.arange(160000).reshape(400, 400) == 401, 1, 255).astype(np.uint8)
    if stage == "segment":                              # a label that the resized mask has not
        with contextlib.suppress(InputError):
            start(stage, world, data=masks(world / "thin", [TWO], [thin]))
    for size in (-8, 12, 0) if stage != "predict" else ():
        assert str(size) in refusal(start, stage, world, size=size)


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


@pytest.mark.parametrize("stage, flag, value, says", (
    ("attention", "out", "photos", "--out"), ("features", "data", "nowhere", "nowhere"),
    ("segment", "data", "classify", "images"), ("predict", "predict", "p", None)))
def test_scripts(world, stage, flag, value, says):
    put(world / "p/日本.jpg"), put(world / "p" / os.fsdecode(b"\xff\xfe.jpg"), format="JPEG")
    before, more = state(world), dict(OMP_NUM_THREADS="1", PYTHONIOENCODING="cp1252")
    done = start(stage, world, lambda script, *words: subprocess.run(
        [sys.executable, script.__file__, *words], env=os.environ | more, cwd=world,
        capture_output=True, text=True, errors="replace"), **{flag: world / value})
    assert state(world, "out") == before and "Traceback" not in done.stderr
    if says:
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and says in done.stderr
    assert len(list(world.glob("out/masks/*"))) == 4 * (says is None)
