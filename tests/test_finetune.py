"""Stage 3 on tiny random ViTs and photos: heads, scores, rows of a table, masks, kept heads.

What it shares with stages 1 and 2 (seeds, workers, half precision, ...) is test_align.py's.
"""
import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

import finetune
from conftest import (ARCH, SIZE, brief, call, header, log_of, middle, moved, random_images,
                      random_vit, refusal, same, seeded)
from finetune import IGNORE, PALETTE, evaluate, kept_head, make_head, task_loss, upsampled_classes
from model import load_vit, read_image, read_weights

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
    """evaluate() on the held-out photos, all in one batch, read and scaled here."""
    if task == "classify":
        batch = [(middle(path), label) for path, label in finetune.by_class(files / task)[1]]
    else:
        class_of = np.array([0, *[1] * 254, IGNORE], dtype=np.uint8)
        batch = [(middle(path), torch.from_numpy(class_of[np.array(Image.open(mask))]))
                 for path, mask in finetune.pairs(files / task / "val")]
    return evaluate(load_vit(checkpoint), load_head(checkpoint, task),
                    DataLoader(batch, len(batch)), task, False, 2, "cpu")


@pytest.fixture
def heads(monkeypatch):
    """The state of every head as it was made."""
    made = []

    def make(*args):
        head = make_head(*args)
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
                 frozen=bool(freeze), seed=3)
    want = facts | dict(
        weights=str(files / "teacher.safetensors"), attention="softmax", stage="pretrained",
        head="Segmenter" if segment else "Linear", metric="mIoU" if segment else "top-1",
        held_out=5 if segment else 10, steps=3, batch_size=4, kept_head=False, checkpoint=str(file))
    assert {key: row[key] for key in want} == want and list(row["per_class"]) == row["classes"]
    assert {key: said[key] for key in facts} == facts and said["stage"] == "pretrained+finetune"
    start = load_vit(files / "teacher.safetensors").state_dict()        # a checkpoint is a backbone
    assert moved(start, load_vit(file).state_dict()) == (set() if freeze else start.keys())
    head = load_head(file, task).state_dict()
    assert moved(heads[0], head) == head.keys() and len(head) == (4 if segment else 2)
    if segment:                                 # picture: photo, truth, prediction of four photos
        with Image.open(tmp_path / "segment.png") as image:
            assert image.size == (4 * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2)
    score, per_class, _ = score_again(files, file, task)
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
    assert [(line[2], line[3]) for line in table] == list(zip(stages, weights))
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


def test_from_scratch_keeps_only_the_architecture(files, tmp_path):
    file = files / "teacher.safetensors"
    tune(files, tmp_path, "classify", "--from-scratch", "--weights", file, f"{file}:linear",
         "--lr", 1e-30)
    start, rows = load_vit(file), rows_of(tmp_path)
    for row, attention in zip(rows, ("softmax", "linear"), strict=True):
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
        tune(files, tmp_path, task)
    assert load_head(tmp_path / f"0-{task}.safetensors", task)


def one_hot(guess, classes):
    return F.one_hot(torch.as_tensor(guess), classes).float().movedim(-1, 1) * 5


def score(batches, task, classes):
    """evaluate() of a head whose logits are its input."""
    return evaluate(None, nn.Identity(), batches, task, True, classes, "cpu")


def test_miou_and_top_1_by_hand():
    """255 counts nowhere; a class neither there nor guessed is left out; guessed in vain is 0."""
    truth = torch.tensor([[[0, 0, 1, 255], [0, 1, 1, 255]], [[0, 0, 0, 0], [255, 255, 1, 1]]],
                         dtype=torch.uint8)
    guess = [[[0, 1, 1, 1], [0, 1, 0, 2]], [[0, 0, 0, 2], [1, 1, 1, 1]]]
    # 0: 5 right, 7 there, 6 guessed, 5 / 8.  1: 4 right, 5 there, 5 guessed, 4 / 6.  2: 0 / 1.
    batches = zip(one_hot(guess, 4).split(1), truth.split(1))
    found, by_class, first = score(batches, "segment", 4)
    assert by_class[:3] == pytest.approx([62.5, 100 * 4 / 6, 0]) and math.isnan(by_class[3])
    assert found == pytest.approx((62.5 + 100 * 4 / 6 + 0) / 3) and first.tolist() == guess[:1]
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 4, dtype=torch.uint8)[None]
    found, _, first = score([(one_hot([[[0, 1]]], 2), truth)], "segment", 2)    # a patch: 4 pixels
    assert found == 100 and torch.equal(first, truth.long())
    # top-1 is of all photos, not the mean of the classes; label 255 is a label like any other
    batches = [(one_hot([0, 0, 1, 1], 300), torch.tensor([0, 0, 0, 1])),
               (one_hot([1, 255], 300), torch.tensor([2, 255]))]
    found, by_class, first = score(batches, "classify", 300)
    assert found == pytest.approx(100 * 4 / 6) and by_class[255] == 100
    assert by_class[:3] == pytest.approx([100 * 2 / 3, 100, 0]) and first.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("grid, size, strip", [
    ((4, 4), (32, 32), 64), ((3, 5), (37, 61), 64), ((7, 3), (131, 45), 64), ((4, 6), (29, 50), 1),
    ((5, 4), (33, 31), 8), ((1, 1), (9, 5), 4), ((9, 8), (5, 7), 3), ((1, 6), (70, 1), 64)])
def test_upsampled_classes_are_those_of_interpolate(grid, size, strip):
    """But where two classes are as likely, up to rounding."""
    logits = seeded(2, 6, *grid)
    found = upsampled_classes(logits, size, strip)
    whole = F.interpolate(logits, size, mode="bilinear")
    assert found.shape == (2, *size) and (found == whole.argmax(1)).float().mean() > 0.999
    assert (whole.amax(1) - whole.gather(1, found[:, None])[:, 0]).max() < 1e-5


def test_ignored_pixels_have_no_gradient():
    """A crop may hold none else: 0 with a gradient of 0, not the 0 / 0 of a mean over nothing."""
    masks = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    masks[:, 0], masks[1, 1] = IGNORE, 2
    for masks, some in ((masks, True), (torch.full((2, 4, 4), IGNORE), False)):
        logits, counted = seeded(2, 3, 4, 4).requires_grad_(), masks != IGNORE
        loss = task_loss(None, nn.Identity(), logits, masks.to(torch.uint8), "segment", True)
        loss.backward()
        assert torch.equal(logits.grad.abs().sum(1) > 0, counted) and counted.any() == some
        kept = logits.detach().movedim(1, -1)[counted].log_softmax(-1)      # (pixels, K)
        want = -kept.gather(1, masks[counted][:, None]).sum() / max(1, len(kept))
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)


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

def test_masks_follow_their_photos(tmp_path, files, drawn):
    """Cropped, mirrored, squeezed and turned upright together: a photo that is its own mask stays
    so but for edges, which only a photo blends. 255 and classes are not blended."""
    pixels, turned, made = np.zeros((40, 48), dtype=np.uint8), Image.Exif(), drawn(finetune)
    pixels[5:25, 6:20], pixels[30:] = 255, 100
    turned[0x0112] = 6                              # seen turned right; its mask is drawn on that
    for part in (tmp_path / "segment/train", tmp_path / "segment/val"):
        (part / "images").mkdir(parents=True)
        (part / "masks").mkdir()
        raw = Image.fromarray(np.rot90(pixels)).convert("RGB")
        raw.save(part / "images/a.png", exif=turned)
        Image.fromarray(pixels).save(part / "masks/a.png")
    tune(tmp_path, tmp_path / "out", "segment", "--weights", files / "teacher.safetensors")
    train, held_out = ([draws[i][0] for i in range(n)] for draws, n in zip(made, (12, 1)))
    for image, mask in train + held_out:
        assert image.shape == (3, SIZE, SIZE) and mask.shape == (SIZE, SIZE)
        assert set(mask.unique().tolist()) <= {0, 1, 255}                   # 100 is class 1
        shown = torch.tensor([0, 100, 255])[mask.clamp(max=2).long()]
        assert ((image[0].int() - shown).abs() < 40).float().mean() > 0.85
    assert len({mask.numpy().tobytes() for _, mask in train}) > 6
    squeezed = F.interpolate(torch.from_numpy(pixels)[None, None], SIZE).clamp(max=101)
    assert torch.equal(held_out[0][1], torch.tensor([0] * 100 + [1, 255])[squeezed[0, 0].long()])


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
    _, _, first = score_again(files, file, "classify")
    assert list(guesses) == [CLASSES["classify"][i] for i in first]
    assert not (tmp_path / "none").exists()         # nothing to write but the lines


def test_predict_writes_masks_as_evaluate_does(files, tuned, tmp_path):
    """Palette PNGs of the photo's own size, ids as in the data; of a photo that has the run's size
    exactly the mask that was scored. Beside each, the photo with its mask's colours over it."""
    _, _, first = score_again(files, tuned["segment"], "segment")
    assert first.unique().tolist() == [0, 1]
    predict = finetune, "--weights", tuned["segment"], "--predict"
    for part, size in (("train", (48, 40)), ("val", (SIZE, SIZE))):
        photos = sorted((files / "segment" / part / "images").iterdir())
        printed = call(*predict, photos[0].parents[1], photos[0], "--out", tmp_path / part)
        masks = tmp_path / part / "masks/images"
        assert {path.name for path in masks.iterdir()} == {
            f"{photo.name}{end}.png" for photo in photos for end in ("", ".overlay")}
        assert (masks.parent / "0.jpg.png").read_bytes() == (masks / "0.jpg.png").read_bytes()
        for i, photo in enumerate(photos):
            with Image.open(masks / f"{photo.name}.png") as mask:
                assert (mask.size, mask.mode) == (size, "P")
                ids, palette = torch.from_numpy(np.array(mask)).long(), mask.getpalette()
            assert set(ids.unique().tolist()) <= {0, 7} and f"\t{masks / photo.name}.png" in printed
            assert part == "train" or torch.equal(ids, 7 * first[i])
            assert palette[21:24] == [int(255 * share) for share in PALETTE[7]]
            want = read_image(photo) / 2 + 255 * PALETTE[ids].movedim(-1, 0) / 2
            found = read_image(masks / f"{photo.name}.overlay.png")
            assert (found - want).abs().max() <= 1
    both = files / "segment/train", files / "segment/val"
    assert "one name" in refusal(call, *predict, *both, "--out", tmp_path / "both")


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
    good = ("images", "labels"), ("", "")
    assert list(finetune.labelled([good, good])) == [good[0]] * 2
    gone = ("images", "labels"), ("", "a.jpg is not a readable image: gone")
    assert "a.jpg" in refusal(list, finetune.labelled([good, gone]))
