"""Stage 3 on tiny random ViTs and photos: heads, scores, rows of a table, masks, kept heads.

What it shares with stages 1 and 2 (seeds, workers, half precision, ...) is test_align.py's.
"""
import copy
import json
import math
import runpy
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import finetune
from conftest import (ARCH, SIZE, brief, call, header, log_of, middle, moved, random_images,
                      random_vit, refusal, same, seeded)
from finetune import IGNORE, PALETTE, evaluate, kept_head, make_head, task_loss, upsampled_classes
from model import Draws, load_vit, read_image, read_weights

FREEZE = pytest.mark.parametrize("freeze", ([], ["--freeze"]), ids=("tuned", "frozen"))
TASKS = pytest.mark.parametrize("task", ("classify", "segment"))
CLASSES = {"classify": ["blue", "red"], "segment": ["0", "7"]}


def tune(files, out, task, *flags):
    """finetune.py's main() on the fixture's files -> what it printed."""
    return brief(finetune, files, out, "--task", task, "--data", files / task, *flags)


def rows_of(out):
    return json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)    # NaN


def load_head(checkpoint, task):
    tensors, head = read_weights(checkpoint)[0], make_head(ARCH, task, 2)
    head.load_state_dict({n[5:]: t for n, t in tensors.items() if n.startswith("head.")})
    return head


def score_again(files, checkpoint, task):
    """evaluate() on the held-out photos, one by one, read and scaled here."""
    if task == "classify":
        batch = [(middle(path)[None], torch.tensor([label]))
                 for path, label in finetune.by_class(files / task)[1]]
    else:
        class_of = np.array([0, *[1] * 254, IGNORE], dtype=np.uint8)
        batch = [(middle(path)[None], torch.from_numpy(class_of[np.array(Image.open(mask))])[None])
                 for path, mask in finetune.by_layout(files / task)[1]]
    return evaluate(load_vit(checkpoint), load_head(checkpoint, task), [batch], task, False, 2,
                    "cpu")


@pytest.fixture
def heads(monkeypatch):
    """The state of every head as it was made."""
    made = []

    def make(*args, **more):
        head = make_head(*args, **more)
        made.append(copy.deepcopy(head.state_dict()))
        return head
    monkeypatch.setattr(finetune, "make_head", make)
    return made


@pytest.fixture(scope="module")
def tuned(files, tmp_path_factory):
    """{task: checkpoint of a longer run, whose head tells the classes apart}. Only to be read."""
    outs = {task: tmp_path_factory.mktemp("tuned") / task for task in CLASSES}
    for task, out in outs.items():
        tune(files, out, task, "--steps", 20, "--lr", 1e-3 if task == "segment" else 3e-4)
    return {task: out / f"0-{task}.safetensors" for task, out in outs.items()}


# --------------------------------------------------------------------------------------------------
# Training

@FREEZE
@TASKS
def test_finetune(files, tmp_path, heads, task, freeze):
    """What moved, what the files say, and that the score belongs to the written checkpoint."""
    segment, file = task == "segment", tmp_path / f"0-{task}.safetensors"
    printed = tune(files, tmp_path, task, *freeze, "--seed", 3)
    (row,), said = rows_of(tmp_path), header(file)
    facts = dict(task=task, classes=CLASSES[task], ids=[0, 7] if segment else [0, 1], size=SIZE,
                 frozen=bool(freeze), seed=3, head_kind="linear")
    want = facts | dict(
        weights=str(files / "teacher.safetensors"), attention="softmax", stage="pretrained",
        metric="mIoU" if segment else "top-1",
        held_out=5 if segment else 10, steps=3, batch_size=4, kept_head=False, checkpoint=str(file))
    assert {key: row[key] for key in want} == want and list(row["per_class"]) == row["classes"]
    assert {key: said[key] for key in facts} == facts and said["stage"] == "pretrained+finetune"
    start = load_vit(files / "teacher.safetensors").state_dict()        # a checkpoint is a backbone
    assert moved(start, load_vit(file).state_dict()) == (set() if freeze else start.keys())
    head = load_head(file, task).state_dict()
    assert moved(heads[0], head) == head.keys() and len(head) == (4 if segment else 2)
    if segment:         # picture: five photos, truth and prediction below captions, and a legend
        with Image.open(tmp_path / "segment.png") as image:
            assert image.size == (5 * 160, 3 * 180 + 10 + 20) and len(image.getcolors(10 ** 6)) > 99
        assert printed.count("IoU of class") == 1
    score, per_class = score_again(files, file, task)
    near = dict(abs=(1 if segment else 20.1) if freeze else 1e-9)   # float16 may turn a photo
    assert row["score"] == pytest.approx(score, **near) and f"{row['score']:.2f}" in printed
    assert list(row["per_class"].values()) == pytest.approx(per_class, **near)


def test_rows(files, chain, tmp_path):
    """One for each of --weights, in order; FILE:linear is swapped and nothing else."""
    weights = [str(chain / name) for name in (
        "teacher.safetensors", "teacher.safetensors:linear", "one/student.safetensors",
        "two/student.safetensors")]
    printed = tune(files, tmp_path, "classify", "--freeze", "--weights", *weights)
    stages, rows = ["pretrained", "none", "attention", "attention+features"], rows_of(tmp_path)
    assert [row["weights"] for row in rows] == weights and [row["stage"] for row in rows] == stages
    assert [row["attention"] for row in rows] == ["softmax", "linear", "linear", "linear"]
    table = [line.split() for line in printed.splitlines()[-5:-1]]
    assert [(line[4], line[5]) for line in table] == list(zip(stages, weights))
    assert all(row["images_per_s"] > 0 and row["peak_mb"] > 0 for row in rows)
    for i, row in enumerate(rows):
        vit, source = load_vit(row["checkpoint"]), load_vit(weights[i].removesuffix(":linear"))
        assert same(source, vit) and vit.attention == row["attention"]
        assert row["checkpoint"] == str(tmp_path / f"{i}-classify.safetensors")
    assert [row["weights"] for row in log_of(tmp_path)] == [w for w in weights for _ in range(3)]


@FREEZE
def test_rows_differ_in_nothing_but_the_weights(files, tmp_path, heads, freeze):
    """Same crops, and the same head to start from, whatever the attention: rows are compared."""
    file = str(files / "teacher.safetensors")
    tune(files, tmp_path, "classify", *freeze, "--weights", file, f"{file}:softmax",
         f"{file}:hedgehog", file)
    first, again, other, last = (read_weights(tmp_path / f"{i}-classify.safetensors")[0]
                                 for i in range(4))
    assert not moved(first, again) and not moved(first, last)
    assert moved({name: other[name] for name in first}, first)
    assert len(heads) == 4 and not any(moved(heads[0], head) for head in heads)


def test_from_scratch_keeps_only_the_architecture(files, chain, tmp_path):
    file, student = files / "teacher.safetensors", chain / "one/student.safetensors"
    tune(files, tmp_path, "classify", "--from-scratch", "--weights", file, f"{file}:relu", student,
         "--lr", 1e-30)
    start, rows = load_vit(file), rows_of(tmp_path)
    for row, attention in zip(rows, ("softmax", "relu", "linear"), strict=True):
        vit = load_vit(row["checkpoint"])
        assert row["stage"] == "scratch" and vit.attention == attention and vit.arch == start.arch
        assert moved(start.state_dict(), vit.state_dict()) == start.state_dict().keys()


@FREEZE
def test_a_fresh_head_learns_faster(files, tmp_path, monkeypatch, freeze):
    """Ten times, but from scratch; with warm-up and decay; the log has the backbone's rate."""
    peaks, real = [], torch.optim.lr_scheduler.OneCycleLR
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR",
                        lambda groups, lr, *a, **b: peaks.append(lr) or real(groups, lr, *a, **b))
    tune(files, tmp_path / "a", "classify", *freeze, "--lr", 1e-3, "--steps", 30)
    tune(files, tmp_path / "b", "classify", "--from-scratch", "--lr", 1e-3)
    assert peaks == [[1e-2] if freeze else [1e-2, 1e-3], [1e-3, 1e-3]]
    rates, losses = ([row[key] for row in log_of(tmp_path / "a")] for key in ("lr", "loss"))
    assert max(rates) == pytest.approx(peaks[0][-1], rel=0.1)
    assert rates[0] < 0.5 * peaks[0][-1] and rates[-1] < 0.02 * peaks[0][-1]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@TASKS
def test_weights_are_saved_before_scoring(files, tmp_path, monkeypatch, task):
    monkeypatch.setattr(finetune, "evaluate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune(files, tmp_path, task, "--every", 9)
    assert load_head(tmp_path / f"0-{task}.safetensors", task)


def one_hot(guess, classes):
    return F.one_hot(torch.as_tensor(guess), classes).float().movedim(-1, 1) * 5


def logits_of_photo(checkpoint, path):
    """The likeliest class of the middle of a photo."""
    vit, head = load_vit(checkpoint), load_head(checkpoint, "classify")
    return finetune.logits_of(vit, head, middle(path)[None], "classify", False).argmax().item()


def score(batches, task, classes):
    """evaluate() of a head whose logits are its input."""
    return evaluate(None, nn.Identity(), batches, task, True, classes, "cpu")


def test_miou_and_top_1_by_hand():
    """255 counts nowhere; a class neither there nor guessed is left out; guessed in vain is 0."""
    truth = torch.tensor([[[0, 0, 1, 255], [0, 1, 1, 255]], [[0, 0, 0, 0], [255, 255, 1, 1]]],
                         dtype=torch.uint8)
    guess = [[[0, 1, 1, 1], [0, 1, 0, 2]], [[0, 0, 0, 2], [1, 1, 1, 1]]]
    # 0: 5 right, 7 there, 6 guessed, 5 / 8.  1: 4 right, 5 there, 5 guessed, 4 / 6.  2: 0 / 1.
    batches = [list(zip(one_hot(guess, 4).split(1), truth.split(1)))]
    found, by_class = score(batches, "segment", 4)
    assert by_class[:3] == pytest.approx([62.5, 100 * 4 / 6, 0]) and math.isnan(by_class[3])
    assert found == pytest.approx((62.5 + 100 * 4 / 6 + 0) / 3)
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 4, dtype=torch.uint8)[None]
    assert score([[(one_hot([[[0, 1]]], 2), truth)]], "segment", 2)[0] == 100   # a patch: 4 pixels
    # top-1 is of all photos, not the mean of the classes; label 255 is a label like any other
    batches = [[(one_hot([0, 0, 1, 1], 300), torch.tensor([0, 0, 0, 1])),
                (one_hot([1, 255], 300), torch.tensor([2, 255]))]]
    found, by_class = score(batches, "classify", 300)
    assert found == pytest.approx(100 * 4 / 6) and by_class[255] == 100
    assert by_class[:3] == pytest.approx([100 * 2 / 3, 100, 0])


@pytest.mark.parametrize("grid, size", [
    ((4, 4), (32, 32)), ((3, 5), (37, 61)), ((7, 3), (131, 45)), ((1, 1), (9, 5)),
    ((9, 8), (5, 7))])
def test_upsampled_classes_are_those_of_interpolate(grid, size):
    """Ties, too: the first class; and logits all below any start of a running maximum."""
    logits = seeded(2, 6, *grid) - 1e30 * (size == (9, 5))
    logits[:, 4] = logits[:, 2]
    whole = F.interpolate(logits, size, mode="bilinear").argmax(1)
    assert torch.equal(upsampled_classes(logits, size), whole)


def test_more_classes_than_a_mask_has_ids(files, tmp_path):
    data, out = tmp_path / "photos", tmp_path / "out"
    for part in ("train", "val"):
        for name in range(300):
            folder = data / part / f"{name:03}"
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 16), (name % 256, 0, 0)).save(folder / "a.png")
    brief(finetune, files, out, "--data", data, "--freeze")
    row, = rows_of(out)
    assert row["held_out"] == 300 == len(row["per_class"])


def test_ignored_pixels_have_no_gradient():
    """A crop may hold none else: 0 with a gradient of 0, not the 0 / 0 of a mean over nothing."""
    masks = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    masks[:, 0], masks[1, 1] = IGNORE, 2
    for masks, some in ((masks, True), (torch.full((2, 4, 4), IGNORE), False)):
        logits, counted = seeded(2, 3, 4, 4).requires_grad_(), masks != IGNORE
        total, count = task_loss(None, nn.Identity(), logits, masks.byte(), "segment", True)
        total.backward()
        assert torch.equal(logits.grad.abs().sum(1) > 0, counted) and counted.any() == some
        kept = logits.detach().movedim(1, -1)[counted].log_softmax(-1)      # (pixels, K)
        want = -kept.gather(1, masks[counted][:, None]).sum()
        assert total.item() == pytest.approx(want.item(), rel=1e-5) and count == len(kept)


def test_metrics_are_json_where_a_class_is_in_no_held_out_mask(files, tmp_path):
    """NaN is no JSON. Class "rare" is one pixel of training, and this short a run never says it."""
    shutil.copytree(files / "segment", tmp_path / "segment")
    mask = np.zeros((40, 48), dtype=np.uint8)
    mask[0, 0] = 2
    Image.fromarray(mask).save(tmp_path / "segment/train/masks/0.png")
    (tmp_path / "segment/classes.txt").write_text("ground\nunused\nrare\n")
    tune(tmp_path, tmp_path / "out", "segment", "--steps", 20, "--lr", 1e-3, "--freeze",
         "--weights", files / "teacher.safetensors")
    row, = rows_of(tmp_path / "out")
    assert list(row["per_class"]) == ["ground", "rare", "7"] and row["ids"] == [0, 2, 7]
    ground, rare, other = row["per_class"].values()
    assert rare is None and row["score"] == pytest.approx((ground + other) / 2)


def test_features_are_cls_and_mean_patch_or_the_grid():
    vit, bare = random_vit().eval(), random_vit(cls=False, cls_position=False).eval()
    images = random_images()
    tokens, patches = vit(vit.normalize(images)), bare(bare.normalize(images))[:, 1:].mean(1)
    both, grid = (finetune.features(vit, images, task) for task in ("classify", "segment"))
    torch.testing.assert_close(both, torch.cat([tokens[:, 0], tokens[:, 2:].mean(1)], 1))
    assert torch.equal(grid, tokens[:, 2:].view(3, 4, 4, ARCH.width))
    torch.testing.assert_close(finetune.features(bare, images, "classify"), patches)
    assert make_head(ARCH, "classify", 5)(both).shape == (3, 5)
    assert make_head(bare.arch, "classify", 5)(patches).shape == (3, 5)
    assert make_head(ARCH, "segment", 5)(grid).shape == (3, 5, 4, 4)


# --------------------------------------------------------------------------------------------------
# Masks, predictions, kept heads

def mixed(top, shapes, turn=None):
    """images/masks of these (rows, columns): a photo is its own mask, 100 and ignored 255."""
    for part in ("train", "val"):
        for name in ("images", "masks"):
            (top / part / name).mkdir(parents=True, exist_ok=True)
        for i, (rows, columns) in enumerate(shapes):
            pixels, exif = np.zeros((rows, columns), dtype=np.uint8), Image.Exif()
            pixels[rows // 8:rows // 2, columns // 8:columns // 2] = 255
            pixels[3 * rows // 4:] = 100
            exif[0x0112] = 6                    # seen turned right; its mask is drawn on that
            raw = Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).convert("RGB")
            raw.save(top / f"{part}/images/{i}.png", exif=exif)
            Image.fromarray(pixels).save(top / f"{part}/masks/{i}.png")
    return top


def test_masks_follow_their_photos(tmp_path, files, drawn):
    """Scaled, cropped, mirrored and turned upright together: a photo that is its own mask stays so
    but for edges, which only a photo blends. What a crop has beyond the photo is ignored."""
    made, data = drawn(finetune), mixed(tmp_path / "segment", [(40, 48)])
    tune(tmp_path, tmp_path / "out", "segment", "--weights", files / "teacher.safetensors")
    train, held_out = ([draws[i][0] for i in range(n)] for draws, n in zip(made, (30, 1)))
    margins = 0
    for image, mask in train:
        assert image.shape == (3, SIZE, SIZE) and mask.shape == (SIZE, SIZE)
        assert set(mask.unique().tolist()) <= {0, 1, 255}                   # 100 is class 1
        shown = torch.tensor([0, 100, 255])[mask.clamp(max=2).long()]
        beyond = (image == 124).all(0)
        assert (mask[beyond] == IGNORE).float().mean() > 0.9 if beyond.sum() > 99 else True
        margins += beyond.sum() > 99
        assert ((image[0].int() - shown).abs() < 40)[~beyond].float().mean() > 0.85
    assert 3 < margins < 27 and len({mask.numpy().tobytes() for _, mask in train}) > 25
    (image, mask), truth = held_out[0], np.array(Image.open(data / "val/masks/0.png"))
    assert image.shape == (3, SIZE, 40)                 # 32 x 38.4, to the patch; its mask as it is
    assert torch.equal(mask, torch.tensor([0] * 100 + [1] * 155 + [255])[truth.astype(int)].byte())


def test_predict_labels_as_evaluate_does(files, tuned, tmp_path):
    """A line for each photo; the share of right ones is the score that the run wrote."""
    file, (row,) = tuned["classify"], rows_of(tuned["classify"].parent)
    printed = call(finetune, "--weights", file, "--predict", files / "classify/val", "--out",
                   tmp_path / "none")
    paths, guesses, shares = zip(*(line.split("\t") for line in printed.splitlines()))
    assert list(map(Path, paths)) == sorted((files / "classify/val").rglob("*.jpg"))
    assert set(guesses) == {"blue", "red"}          # or the comparison would say little
    right = [Path(path).parent.name == label for path, label in zip(paths, guesses)]
    assert row["score"] == pytest.approx(100 * sum(right) / len(right))
    assert all(0.5 <= float(share) <= 1 for share in shares)
    assert list(guesses) == [CLASSES["classify"][logits_of_photo(file, path)] for path in paths]
    assert not (tmp_path / "none").exists()         # nothing to write but the lines


def test_predict_writes_masks(files, tuned, tmp_path):
    """Palette PNGs of the photo's own size, ids as in the data. Beside each, the photo with its
    mask's colours over it."""
    predict = finetune, "--weights", tuned["segment"], "--predict"
    photos = sorted((files / "segment/train/images").iterdir())
    printed = call(*predict, photos[0].parents[1], photos[0], "--out", tmp_path / "out")
    masks, seen = tmp_path / "out/masks/images", set()
    assert {path.name for path in masks.iterdir()} == {
        f"{photo.name}{end}.png" for photo in photos for end in ("", ".overlay")}
    assert (masks.parent / "0.jpg.png").read_bytes() == (masks / "0.jpg.png").read_bytes()
    for photo in photos:
        with Image.open(masks / f"{photo.name}.png") as mask:
            assert (mask.size, mask.mode) == ((48, 40), "P")
            ids, palette = torch.from_numpy(np.array(mask)).long(), mask.getpalette()
        seen |= set(ids.unique().tolist())
        assert f"\t{masks / photo.name}.png" in printed
        assert palette[21:24] == [int(255 * share) for share in PALETTE[7]]
        want = read_image(photo) / 2 + 255 * PALETTE[ids].movedim(-1, 0) / 2
        found = read_image(masks / f"{photo.name}.overlay.png")
        assert (found - want).abs().max() <= 1
    assert seen == {0, 7}
    both = files / "segment/train", files / "segment/val"
    assert "one name" in refusal(call, *predict, *both, "--out", tmp_path / "both")
    assert "nowhere" in refusal(call, *predict, photos[0], tmp_path / "nowhere")


SHAPES = [(40, 48), (48, 40), (20, 200), (150, 30), (5, 7), (1, 1), (33, 32)]


def test_photos_of_any_shape(files, tuned, tmp_path):
    """The score is that of the masks that --predict writes, by an independent count; these have the
    photos' own size, in batches or one by one, and differ with --size."""
    data, file = mixed(tmp_path / "segment", SHAPES), tuned["segment"]
    tune(tmp_path, tmp_path / "run", "segment", "--weights", file, "--lr", 1e-3, "--steps", 9)
    file, masks = tmp_path / "run/0-segment.safetensors", {}
    for size, flags in ((SIZE, []), (16, []), (64, []), ("8", ["--batch-size", 3])):
        size_flag = [] if size == SIZE else ["--size", size]            # the checkpoint's own
        call(finetune, "--weights", file, "--predict", data / "val/images", *size_flag, *flags,
             "--out", tmp_path / f"p{size}")
        masks[size] = [np.array(Image.open(tmp_path / f"p{size}/masks/{i}.png.png"))
                       for i in range(len(SHAPES))]
        assert [mask.shape for mask in masks[size]] == SHAPES
    assert len({b"".join(mask.tobytes() for mask in found) for found in masks.values()}) == 4
    call(finetune, "--weights", file, "--predict", data / "val/images", "--batch-size", 5, "--out",
         tmp_path / "batch")
    for i, mask in enumerate(masks[SIZE]):
        assert np.array_equal(mask, Image.open(tmp_path / f"batch/masks/{i}.png.png"))
    truth, guess = (np.concatenate([np.ravel(mask) for mask in part]) for part in (
        [Image.open(data / f"val/masks/{i}.png") for i in range(len(SHAPES))], masks[SIZE]))
    truth, guess = truth[truth != 255], guess[truth != 255]
    iou = [((truth == id) & (guess == id)).sum() / ((truth == id) | (guess == id)).sum()
           for id in (0, 100)]
    assert rows_of(tmp_path / "run")[0]["score"] == pytest.approx(100 * np.mean(iou), abs=0.01)
    tune(tmp_path, tmp_path / "frozen", "segment", "--weights", file, "--steps", 0, "--freeze")
    frozen, = rows_of(tmp_path / "frozen")
    assert frozen["kept_head"] and frozen["score"] == pytest.approx(100 * np.mean(iou), abs=0.5)
    assert len(set(np.unique(guess))) == 2              # or it would say little


def test_flags_that_predict_has_no_use_for(tuned, tmp_path):
    for flag in (["--data", "x"], ["--task", "segment"], ["--steps", 0], ["--freeze"],
                 ["--head", "mask"], ["--ignore", 3], ["--lr", 1], ["--align", 1],
                 ["--teacher", "x"], ["--every", 1]):
        assert flag[0] in refusal(call, finetune, "--weights", tuned["segment"], "--predict", "p",
                                  *flag, "--out", tmp_path / "out")
    assert "--ignore" in refusal(finetune.parse, ["--weights", "x", "--ignore", "3"])


def layout(top, photo, mask, names, ids=(0, 1, 255)):
    """Photos and masks of 8 x 8 pixels by two patterns, a column of each id in every mask."""
    for name in names:
        for path in (top / photo.format(*name), top / mask.format(*name)):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 9, dtype=np.uint8)).save(top / photo.format(*name))
        columns = np.resize(np.array(ids, dtype=np.uint8), 8)
        Image.fromarray(np.tile(columns, (8, 1))).save(top / mask.format(*name))
    return top


@pytest.mark.parametrize("kind, photo, mask, parts, ids, want", [
    ("images/masks", "{}/images/{}.jpg", "{}/masks/{}.png", ("train", "val"), (0, 1, 255),
     {0: "0", 1: "1"}),
    ("VOC", "JPEGImages/{}_{}.jpg", "SegmentationClass/{}_{}.png", ("train", "val"), (0, 15, 255),
     {0: "background", 15: "person"}),
    ("CamVid", "{}/{}.png", "{}annot/{}.png", ("train", "val"), (0, 3, 11),
     {0: "sky", 3: "road"}),
    ("Cityscapes", "leftImg8bit/{}/ulm/{}_leftImg8bit.png",
     "gtFine/{}/ulm/{}_gtFine_labelTrainIds.png", ("train", "val"), (0, 13, 255),
     {0: "road", 13: "car"}),
    ("ADE20K", "images/{}/{}.jpg", "annotations/{}/{}.png", ("training", "validation"), (0, 1, 150),
     {1: "wall", 150: "150"})])
def test_layouts(tmp_path, capsys, kind, photo, mask, parts, ids, want):
    """Pairs, class names and ignored ids of each; lone photos and masks are said, and left out."""
    names = [(part, f"{part}{i}") for part in parts for i in range(3)]
    top = layout(tmp_path / "data", photo, mask, names, ids)
    if kind == "VOC":                                   # lists of the photos; the third is in none
        (top / "ImageSets/Segmentation").mkdir(parents=True)
        for part in parts:
            lines = "".join(f"{part}_{part}{i}\n" for i in range(2))
            (top / f"ImageSets/Segmentation/{part}.txt").write_text(lines)
    else:
        (top / photo.format(parts[0], f"{parts[0]}2")).unlink()
        (top / mask.format(parts[1], f"{parts[1]}2")).unlink()
    if kind == "ADE20K":
        (top / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.15\twall \n")
    train, val, classes, found = finetune.load_data(str(top), "segment")
    assert dict(zip(found, classes, strict=True)) == want
    for part, items in zip(parts, (train, val), strict=True):
        assert [(str(path), str(truth)) for path, truth in items] == [
            tuple(str(top / way.format(part, f"{part}{i}")) for way in (photo, mask))
            for i in range(2)]
    said = capsys.readouterr().out
    assert f"read as {kind}" in said and said.count("left out") == 2 * (kind != "VOC")
    others = finetune.load_data(str(top), "segment", [ids[1], ids[2]] if ids[0] else [ids[1]])[3]
    assert ids[1] not in others and len(others) == 2


@pytest.mark.parametrize("attention", ("softmax", "linear_conv"))
def test_mask_head(attention):
    """Twice the patches are twice the FLOPs but for softmax; a batch is its photos one by one;
    class tokens bypass the grid; every tensor learns; whitened, no direction is lost."""
    torch.manual_seed(0)
    head = make_head(ARCH, "segment", 3, "mask", attention)
    flops = []
    for rows in (8, 16):
        with FlopCounterMode(display=False) as counter:
            head(torch.zeros(1, rows, 64, ARCH.width))
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] == pytest.approx(2, abs=0.02) or attention == "softmax"
    x = seeded(2, 3, 5, ARCH.width)
    both = head(x)
    assert both.shape == (2, 3, 3, 5)
    torch.testing.assert_close(both, torch.cat([head(x[:1]), head(x[1:])]), atol=1e-4,
                               rtol=1e-4)
    if attention == "linear_conv":
        seen = []
        for block in head.blocks:
            nn.init.normal_(block.attn.operator.conv.weight)
            block.attn.operator.conv.register_forward_hook(lambda _, x, y: seen.append(x[0].shape))
        head(x)
        assert seen == [(2, ARCH.width, 3, 5)] * 2
    stretched = seeded(999, ARCH.width) @ seeded(ARCH.width, ARCH.width, seed=1)
    head.whiten(stretched)
    spread, before = (torch.linalg.eigvalsh(x.T.cov()) for x in (head.start(stretched), stretched))
    assert spread[6:].min() > 0.6 and spread.max() < 1.01 and before[-1] > 99 * before[6]
    F.cross_entropy(head(x), torch.ones(2, 3, 5, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


@FREEZE
def test_the_kind_of_head_is_remembered(files, tuned, tmp_path, freeze):
    """By --predict, --steps 0 and FILE:OPERATOR, which swaps its operator, too; so is --size."""
    teacher, out = files / "teacher.safetensors", tmp_path / "out"
    tune(files, out, "segment", "--head", "mask", *freeze, "--weights", f"{teacher}:linear_conv",
         "--size", 8)
    file, head = out / "0-segment.safetensors", make_head(ARCH, "segment", 2, "mask", "linear_conv")
    assert header(file)["head_kind"] == "mask" and rows_of(out)[0]["head_kind"] == "mask"
    assert kept_head(head, file, "segment", ["0", "7"], [0, 7], "mask")
    assert not kept_head(make_head(ARCH, "segment", 2), file, "segment", ["0", "7"], [0, 7])
    said = tune(files, tmp_path / "again", "segment", "--weights", file, f"{file}:linear",
                "--steps", 0, "--size", 8, *freeze)
    rows = rows_of(tmp_path / "again")
    assert said.count("is kept") == 4 and rows[0]["head_kind"] == "mask"
    call(finetune, "--task", "segment", "--data", files / "segment", "--weights", f"{file}:linear",
         "--steps", 0, *freeze, "--out", tmp_path / "alone")
    alone, = rows_of(tmp_path / "alone")
    assert alone["size"] == 8 and alone["score"] == rows[1]["score"]
    assert rows[0]["score"] == pytest.approx(rows_of(out)[0]["score"], abs=1 if freeze else 1e-9)
    call(finetune, "--weights", file, "--predict", files / "segment/val/images", "--out",
         tmp_path / "predicted")
    assert len(list((tmp_path / "predicted/masks").iterdir())) == 10
    assert "--head" in refusal(tune, files, tmp_path / "c", "classify", "--head", "mask")


def test_a_frozen_run_caches_photos_of_any_shape(files, tmp_path, monkeypatch):
    """Each once, whole, without augmentation; draws follow from seed and number alone."""
    data, seen, made = mixed(tmp_path / "segment", SHAPES), [], []
    real, teacher = finetune.Draws, files / "teacher.safetensors"
    monkeypatch.setattr(finetune, "Draws", lambda *args: made.append(real(*args)) or made[-1])
    tune(tmp_path, tmp_path / "out", "segment", "--freeze", "--weights", teacher, "--seed", 5)
    cached = next(draws for draws in made if isinstance(draws.source, list) and isinstance(
        draws.source[0][0], torch.Tensor))
    vit, shapes = load_vit(teacher), [tuple(x.shape[:2]) for x, _ in cached.source]
    for path, truth in zip(*(sorted((data / f"train/{name}").iterdir())
                             for name in ("images", "masks"))):
        photo, _ = finetune.fitted((read_image(path), None), SIZE, 8)
        want = finetune.features(vit, photo[None], "segment")[0]
        near = [x for x, mask in cached.source if x.shape == want.shape
                and (x.float() - want).abs().max() < 0.01]
        assert len(near) >= 1 and all(x.dtype == torch.float16 for x in near)
    assert len(shapes) == len(SHAPES) and all(
        mask.shape == (4 * rows, 4 * columns) for (rows, columns), (_, mask) in
        zip(shapes, cached.source))
    order = [id(cached[i][0][0]) for i in range(7)]
    assert sorted(order) == sorted(id(x) for x, _ in cached.source) and cached.seed == 5
    made.clear()                                        # and none that is not drawn
    tune(tmp_path, tmp_path / "few", "segment", "--freeze", "--weights", teacher, "--steps", 1,
         "--batch-size", 2)
    assert any(isinstance(draws.source, list) and len(draws) == 2 for draws in made)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_cached_features_of_workers_keep_no_file_open(files):
    read = partial(finetune.read_item, task="classify", short=SIZE)
    photos = finetune.by_class(files / "classify")[0] * 5
    batches = DataLoader(Draws(photos, read, finetune.views_of("classify", SIZE, 8)[1]), 1,
                         num_workers=1, collate_fn=finetune.by_shape)
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = finetune.cached(random_vit(), batches, "classify", False, "cpu", torch.float32)
    assert len(kept) == len(photos) > 20 > len(list(Path("/proc/self/fd").iterdir())) - before


@FREEZE
@TASKS
def test_steps_0_scores_a_kept_head(files, tuned, tmp_path, task, freeze):
    """That of the checkpoint, whose score it must find again and whose tensors it leaves."""
    printed = tune(files, tmp_path, task, *freeze, "--weights", tuned[task], "--steps", 0)
    (row,), (again,) = rows_of(tuned[task].parent), rows_of(tmp_path)
    assert "its head is kept" in printed and again["kept_head"] and not row["kept_head"]
    assert again["score"] == pytest.approx(row["score"], abs=1 if freeze else 1e-9)
    assert not moved(*(read_weights(one["checkpoint"])[0] for one in (row, again)))


def test_a_head_is_kept_only_for_the_same_task_classes_and_ids(files, tuned, tmp_path, capsys):
    file, teacher = str(tuned["segment"]), str(files / "teacher.safetensors")
    for task, classes, ids, kept in (
            ("segment", ["0", "7"], [0, 7], True), ("segment", ["0", "8"], [0, 7], False),
            ("segment", ["0", "7"], [0, 8], False), ("segment", ["7", "0"], [7, 0], False),
            ("classify", ["0", "7"], [0, 7], False)):
        head = copy.deepcopy(fresh := make_head(ARCH, task, 2))
        assert kept_head(head, file, task, classes, ids) == kept == (not same(fresh, head))
        assert not kept or same(head, load_head(file, task))
        assert f"its head is {'' if kept else 'not '}kept" in capsys.readouterr().out
        assert not kept_head(head, teacher, task, classes, ids)
    file = tuned["classify"]
    weights = "--weights", file, f"{file}:linear"
    assert tune(files, tmp_path / "on", "classify", *weights, "--lr", 1e-30).count("is kept") == 2
    assert all(row["kept_head"] for row in rows_of(tmp_path / "on"))
    assert same(load_head(file, "classify"), load_head(tmp_path / "on" / file.name, "classify"))
    printed = tune(files, tmp_path / "new", "classify", "--weights", file, "--from-scratch")
    assert "head is" not in printed and not rows_of(tmp_path / "new")[0]["kept_head"]
    for weights in ([teacher], [file, teacher], [file, "--from-scratch"], [tuned["segment"]]):
        assert "--steps 0" in refusal(tune, files, tmp_path / str(len(str(weights))), "classify",
                                      "--steps", 0, "--weights", *weights)


def test_a_labelled_photo_that_is_gone_ends_the_run():
    """Its neighbour would be trained on, or scored, twice."""
    image = torch.zeros(3, 2, 4)
    draws = [((image, 0), ""), ((image.mT, 1), ""), ((image, 2), "")]
    (wide, first), (tall, second) = finetune.by_shape(draws)
    assert (wide.shape, tall.shape) == ((2, 3, 2, 4), (1, 3, 4, 2))
    assert (first.tolist(), second.tolist()) == ([0, 2], [1])
    assert "a.jpg" in refusal(finetune.by_shape, [*draws, ((image, 3), "a.jpg is gone")])


def test_score_py_gives_what_the_commands_it_prints_give(files, tmp_path, monkeypatch,
                                                             capsys):
    """results/score.py: data read once, features of a backbone computed once for all its heads."""
    runs = ["classify-32", "segment-32-linear", "segment-64-linear", "segment-64-of-32-linear",
            "segment-32-mask", "segment-64-of-32-mask"]
    script = runpy.run_path(str(Path(finetune.__file__).parent / "results/score.py"))
    script["STEPS"].update(dict.fromkeys(("classify", "segment"), ["--steps", "3"]))
    with monkeypatch.context() as patch:
        for name in ("load_data", "cached"):
            patch.setattr(finetune, name, getattr(finetune, name))          # to be restored
        words = [tmp_path, files / "teacher.safetensors", files / "classify", files / "segment"]
        script["main"](*map(str, words), *runs, "--", "--batch-size", "4", "--dtype", "float32")
    commands = [shlex.split(line)[2:] for line in capsys.readouterr().out.splitlines()
                if line.startswith("python")]
    assert len(commands) == len(runs)
    for run, command in zip(runs, commands):
        call(finetune, *command[:-1], tmp_path / "again" / run)
        have, want = (rows_of(tmp_path / part / run)[0] for part in ("", "again"))
        assert have["score"] == want["score"] and have["per_class"] == want["per_class"]
