"""Stage 3 on tiny random ViTs and photos: heads, phases, scores, kept heads, predictions.

Layouts and masks are test_labels.py's, bad input test_inputs.py's.
"""
import copy
import json
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import align_attention
import align_features
import finetune
from bench import count_flops
from conftest import (ARCH, SIZE, brief, call, log_of, moved, random_images, random_vit,
                      refusal, same, seeded)
from demo import shapes
from finetune import (HEADS, PALETTE, evaluate, features_of, make_head, standardised, task_loss,
                      upsampled_classes)
from model import load_pair, load_vit, read_weights
from support.labels import IGNORE

FREEZE = pytest.mark.parametrize("freeze", ([], ["--freeze"]), ids=("tuned", "frozen"))
CLASSES = {"classify": (["blue", "red"], [0, 1]), "segment": (["0", "7"], [0, 7])}
FROZEN = "--lr", 1e-30                                  # a rate at which no weight moves


def tune(files, out, task, *flags):
    """finetune.py's main() on the fixture's files -> what it printed."""
    return brief(finetune, files, out, "--task", task, "--data", files / task, *flags)


def rows_of(out):
    return json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)    # NaN


def head_of(checkpoint, task):
    head = make_head(ARCH, task, 2)
    head.load_state_dict(load_vit(checkpoint).head)
    return head


def test_the_demo_runs_without_data(tmp_path, monkeypatch):
    """README's first command. Its first call, of all four rows, needs the students of that line."""
    monkeypatch.chdir(Path(finetune.__file__).parent)
    for part in ("train", "val"):
        monkeypatch.setitem(shapes.IMAGES, part, 1000)
    call(finetune, "--weights", "demo/teacher.safetensors", "demo/teacher.safetensors:linear",
         "--freeze", "--steps", 3, "--batch-size", 8, "--out", tmp_path)
    assert [row["attention"] for row in rows_of(tmp_path)] == ["softmax", "linear"]


@pytest.fixture
def steps(monkeypatch):
    """(phase, a copy of the ViT or None, of the head) before each step, as task_loss saw them."""
    seen = []

    def loss(vit, head, *more):
        seen.append(("all" if vit else "head", *copy.deepcopy((vit, head))))
        return task_loss(vit, head, *more)
    monkeypatch.setattr(finetune, "task_loss", loss)
    return seen


@pytest.fixture(scope="module")
def tuned(files, tmp_path_factory):
    """{task: checkpoint of a longer run, whose head tells the classes apart}. Only to be read."""
    outs = {task: tmp_path_factory.mktemp("tuned") / task for task in CLASSES}
    for task, out in outs.items():
        tune(files, out, task, "--steps", 40, "--lr", 3e-4)
    return {task: out / f"0-{task}.safetensors" for task, out in outs.items()}


# ---- Training

@FREEZE
@pytest.mark.parametrize("task", CLASSES)
def test_the_files_say_what_was_trained(files, tmp_path, steps, task, freeze):
    tune(files, tmp_path, task, *freeze)
    file, (row,) = tmp_path / f"0-{task}.safetensors", rows_of(tmp_path)
    classes, ids = CLASSES[task]
    facts = dict(task=task, classes=classes, ids=ids, size=SIZE, frozen=bool(freeze), seed=0,
                 head_kind="linear")
    written = load_vit(file)
    assert facts.items() <= row.items() and facts.items() <= written.header.items()
    assert written.header["stage"] == "pretrained+finetune" and row["stage"] == "pretrained"
    assert row["held_out"] == (5 if task == "segment" else 10) and [*row["per_class"]] == classes
    start = load_vit(files / "teacher.safetensors").state_dict()
    assert moved(start, written.state_dict()) == (set() if freeze else start.keys())
    first = [p.detach() for p in steps[0][-1].parameters()]
    assert not any(map(torch.equal, first, head_of(file, task).parameters()))
    assert (tmp_path / "0-segment.png").exists() == (task == "segment")


def test_an_unreadable_training_photo_is_left_out_of_both_phases(files, tmp_path, steps):
    data = shutil.copytree(files / "classify", tmp_path / "data")
    for path in (data / "train/red").iterdir():
        path.write_bytes(b"junk")
    tune(files, tmp_path / "out", "classify", "--data", data, "--steps", 30, "--lr", 1e-3)
    assert [phase for phase, *_ in steps] == ["head"] * 30 + ["all"] * 30
    assert rows_of(tmp_path / "out")[0]["per_class"] == {"blue": 100, "red": 0}     # never seen


@pytest.mark.parametrize("flags, phases", (
    ([], ["head", "all"]), (["--freeze"], ["head"]), (["--from-scratch"], ["all"])))
def test_the_head_learns_first_and_then_all(files, tmp_path, steps, flags, phases):
    """The first step of all is on the weights as given, but for --from-scratch."""
    tune(files, tmp_path, "classify", *flags)
    wanted = [phase for phase in phases for _ in range(3)]
    assert [phase for phase, *_ in steps] == wanted
    assert [row["phase"] for row in log_of(tmp_path) if "loss" in row] == wanted
    start = load_vit(files / "teacher.safetensors")
    first = next((vit for phase, vit, _ in steps if phase == "all"), start)
    assert same(first, start) == ("--from-scratch" not in flags)


def test_a_standardised_head_reads_mean_0_and_variance_1_and_does_the_same():
    features = 3 + seeded(50, 8, dtype=torch.float64) * torch.logspace(-0.5, 0.5, 8).double()
    head = nn.Linear(8, 3).double()
    logits = head(features)
    both = standardised(head, features, its_own=True)
    read = both[0](features)
    torch.testing.assert_close(both(features), logits)
    torch.testing.assert_close(read.mean(0), torch.zeros(8).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(read.var(0), torch.ones(8).double(), atol=0.04, rtol=0)
    finetune.fold(*both)
    torch.testing.assert_close(head(features), logits)


@FREEZE
def test_folding_leaves_the_score_of_the_head_phase(files, tmp_path, freeze):
    flags = freeze or FROZEN                            # a second phase that changes nothing
    tune(files, tmp_path, "classify", *flags, "--steps", 8, "--every", 8)
    scores = [row["held_out"] for row in log_of(tmp_path) if "held_out" in row]
    assert {*scores, rows_of(tmp_path)[0]["score"]} == {scores[0]}


@pytest.mark.parametrize("stop", (2, 5))                # a step of each phase
def test_a_stopped_phase_goes_on_to_the_same_bits(files, tmp_path, monkeypatch, stop):
    tune(files, tmp_path / "whole", "classify", "--save-every", 0)
    calls = []

    def loss(*args):
        calls.append(1)
        return 1 / 0 if len(calls) == stop else task_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "task_loss", loss)
        with pytest.raises(ZeroDivisionError):
            tune(files, tmp_path / "out", "classify", "--save-every", 0)
    assert "goes on from step 1 of 3" in tune(files, tmp_path / "out", "classify")
    ends = [read_weights(tmp_path / out / "0-classify.safetensors")[0] for out in ("whole", "out")]
    assert not moved(*ends) and log_of(tmp_path / "whole") == log_of(tmp_path / "out")
    assert not (tmp_path / "out/state.pt").exists()     # no state is needed any more


@FREEZE
def test_a_table_has_a_row_for_each_of_weights_and_they_differ_in_nothing_else(
        files, chain, tmp_path, steps, freeze):
    """In order. The same photos, and the same head to start from: equal weights give equal bits."""
    file = str(files / "teacher.safetensors")
    weights = [file, f"{file}:hedgehog", f"{chain / 'two/student.safetensors'}:hedgehog", file]
    tune(files, tmp_path, "classify", *freeze, "--weights", *weights)
    stages = ["pretrained", "none", "attention+features, swapped", "pretrained"]
    for row, spec, stage in zip(rows_of(tmp_path), weights, stages, strict=True):
        vit, source = load_vit(row["checkpoint"]), load_vit(spec.removesuffix(":hedgehog"))
        assert vit.attention == row["attention"] and (row["weights"], row["stage"]) == (spec, stage)
        assert stage == "pretrained" or vit.arch.aligned == 4
        if freeze:                      # FILE:OPERATOR is swapped, and nothing else
            vit, source = vit.state_dict(), source.state_dict()
            assert not moved({name: vit[name] for name in source}, source)
    first, other, _, last = (read_weights(tmp_path / f"{i}-classify.safetensors")[0]
                             for i in range(4))
    assert not moved(first, last) and moved({name: other[name] for name in first}, first)
    heads = [head[-1].state_dict() for phase, _, head in steps[::3] if phase == "head"]
    assert len(heads) == 4 and not any(moved(heads[0], head) for head in heads)


def test_weights_are_saved_before_scoring_and_nan_is_null_in_metrics(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(finetune, "evaluate", lambda *args, **more: 1 / 0)
        tune(files, tmp_path, "segment", "--every", 9)
    assert head_of(tmp_path / "0-segment.safetensors", "segment")
    monkeypatch.setattr(finetune, "evaluate", lambda *args, **more: (50.0, [math.nan, 50.0], None))
    tune(files, tmp_path, "segment", "--every", 9)
    assert rows_of(tmp_path)[0]["per_class"] == {"0": None, "7": 50.0}


# ---- Features, losses, scores

def test_features_are_cls_and_mean_patch_or_the_grid():
    vit, bare = random_vit().eval(), random_vit(cls=False, cls_position=False).eval()
    images = random_images()
    tokens, patches = vit(vit.normalize(images)), bare(bare.normalize(images))[:, 1:].mean(1)
    both, grid = (features_of(vit, images, task) for task in ("classify", "segment"))
    torch.testing.assert_close(both, torch.cat([tokens[:, 0], tokens[:, 2:].mean(1)], 1))
    assert torch.equal(grid, tokens[:, 2:].view(3, 4, 4, ARCH.width))
    torch.testing.assert_close(features_of(bare, images, "classify"), patches)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_to_segment_gives_logits_of_each_patch_and_learns_with_all_it_has(kind):
    """Twice the patches are twice the FLOPs, since a mask head attends as its backbone does."""
    head, x = make_head(ARCH, "segment", 3, kind, "hedgehog"), seeded(2, 3, 5, ARCH.width)
    both = head(x)
    assert both.shape == (2, 3, 3, 5)
    torch.testing.assert_close(both, torch.cat([head(x[:1]), head(x[1:])]), atol=1e-4, rtol=1e-4)
    F.cross_entropy(both, torch.ones(2, 3, 5, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    few, many = (count_flops(lambda: head(torch.zeros(1, n, 64, ARCH.width))) for n in (8, 16))
    assert many < 2.02 * few


def test_a_mask_head_starts_from_whitened_features(files, tmp_path, monkeypatch):
    """No direction is lost among the large ones; and main() does so, with a fresh head alone."""
    stretched, head = seeded(999, ARCH.width) @ seeded(ARCH.width, ARCH.width, seed=1), make_head(
        ARCH, "segment", 3, "mask")
    head.whiten(stretched)
    spread, before = (torch.linalg.eigvalsh(x.T.cov()) for x in (head.start(stretched), stretched))
    assert spread[6:].min() > 0.6 and spread.max() < 1.01 and before[-1] > 99 * before[6]
    calls, flags = [], ("--freeze", "--head", "mask", "--steps", 1, "--weights")
    monkeypatch.setattr(finetune.MaskHead, "whiten", lambda *args: calls.append(args[1].shape[1]))
    tune(files, tmp_path / "a", "segment", *flags, f"{files / 'teacher.safetensors'}:hedgehog")
    tune(files, tmp_path / "b", "segment", *flags, tmp_path / "a/0-segment.safetensors")
    assert calls == [ARCH.width]
    assert "blocks.1.attn.operator.map_q" in load_vit(tmp_path / "a/0-segment.safetensors").head


def one_hot(guess, classes):
    return F.one_hot(torch.as_tensor(guess), classes).float().movedim(-1, 1) * 5


def score(batches, task, classes):
    """evaluate() of a head whose logits are its input."""
    return evaluate(None, nn.Identity(), batches, task, classes, "cpu")[:2]


def test_miou_by_hand():
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


def test_top_1_by_hand():
    """It is of all photos, not the mean of the classes; label 255 is a label like any other."""
    batches = [[(one_hot([0, 1, 1, 1], 300), torch.tensor([0, 0, 0, 1])),
                (one_hot([1, 255], 300), torch.tensor([2, 255]))]]
    found, by_class = score(batches, "classify", 300)
    assert found == pytest.approx(100 * 3 / 6) and by_class[255] == 100
    assert by_class[:3] == pytest.approx([100 / 3, 100, 0])


@pytest.mark.parametrize("grid, size", [((3, 5), (37, 61)), ((1, 1), (9, 5)), ((9, 8), (5, 7))])
def test_upsampled_classes_are_those_of_interpolate(grid, size):
    """Ties, too: the first class; and logits all below any start of a running maximum."""
    logits = seeded(2, 6, *grid) - 1e30 * (size == (9, 5))
    logits[:, 4] = logits[:, 2]
    whole = F.interpolate(logits, size, mode="bilinear").argmax(1)
    assert torch.equal(upsampled_classes(logits, size), whole)


@pytest.mark.parametrize("some", (True, False))
def test_ignored_pixels_have_no_gradient(some):
    """A crop may hold none else: 0 with a gradient of 0, not the 0 / 0 of a mean over nothing."""
    masks = torch.full((2, 4, 4), IGNORE)
    masks[:, 1:, :2] = 2 if some else IGNORE
    logits, counted = seeded(2, 3, 4, 4).requires_grad_(), masks != IGNORE
    total, count = task_loss(None, nn.Identity(), logits, masks.byte(), "segment")
    total.backward()
    assert torch.equal(logits.grad.abs().sum(1) > 0, counted) and count == counted.sum()
    wanted = -logits.detach().log_softmax(1)[:, 2][counted].sum()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


# ---- Kept heads, predictions

def test_steps_0_without_a_head_for_these_classes_is_refused(files, tuned, tmp_path):
    weights = "--weights", tuned["segment"], files / "teacher.safetensors"
    said = refusal(tune, files, tmp_path / "out", "segment", "--steps", 0, *weights)
    assert "--steps 0" in said and not (tmp_path / "out").exists()


def test_a_kept_head_is_where_training_begins(files, tuned, tmp_path, steps):
    file = tuned["segment"]
    said = tune(files, tmp_path, "segment", "--weights", file, f"{file}:linear")
    assert said.count("is kept") == 2 and [phase for phase, *_ in steps] == 2 * (
        3 * ["head"] + 3 * ["all"])
    assert same(steps[0][2], head_of(file, "segment")) and same(steps[0][2], steps[6][2])


def test_a_kept_head_to_classify_does_the_same_behind_standardised_features(files, tuned, tmp_path):
    tune(files, tmp_path, "classify", "--freeze", *FROZEN, "--weights", tuned["classify"])
    heads = [head_of(folder / "0-classify.safetensors", "classify").state_dict()
             for folder in (tuned["classify"].parent, tmp_path)]
    torch.testing.assert_close(*heads, atol=1e-5, rtol=1e-4)


@FREEZE
def test_steps_0_scores_a_kept_head_of_its_kind_at_its_size(files, tmp_path, freeze):
    """So do FILE:OPERATOR, for an operator without parameters, and --predict. The checkpoint's
    score is found again, and its tensors do not move."""
    teacher, file = files / "teacher.safetensors", tmp_path / "out/0-segment.safetensors"
    again = "--task", "segment", "--data", files / "segment", "--steps", 0, *freeze, "--weights"
    tune(files, tmp_path / "out", "segment", "--head", "mask", *freeze, "--weights",
         f"{teacher}:linear", "--size", 16)
    assert "no step was left" in call(finetune, *again, file, f"{file}:softmax", "--dtype",
                                      "float32", "--out", tmp_path / "two")
    (first,), rows = rows_of(tmp_path / "out"), rows_of(tmp_path / "two")
    assert all(row["kept_head"] and row["head_kind"] == "mask" for row in rows)
    assert not first["kept_head"]
    assert not moved(*(read_weights(one["checkpoint"])[0] for one in (first, rows[0])))
    assert rows[0]["size"] == 16 and rows[1]["attention"] == "softmax"
    assert rows[0]["stage"] == load_vit(rows[0]["checkpoint"]).header["stage"] == "none+finetune"
    assert rows[0]["frozen"] == bool(freeze)
    assert rows[0]["score"] == pytest.approx(first["score"], abs=1 if freeze else 1e-9)
    call(finetune, "--weights", file, "--predict", files / "segment/val/images", "--out",
         tmp_path / "predicted")
    assert len(list((tmp_path / "predicted/masks").iterdir())) == 5
    assert "a new head, its own has another operator" in tune(
        files, tmp_path / "conv", "segment", "--freeze", "--weights", f"{file}:linear_conv")


def test_head_and_size_of_a_tuned_teacher_go_along_with_its_student(files, tmp_path):
    tuned, one, two = (tmp_path / name for name in ("zero/0-classify.safetensors", "one", "two"))
    brief(finetune, files, tuned.parent, "--size", 16)
    flags = "--batch-size", 4, "--dtype", "float32", "--steps"
    photos = "--teacher", tuned, "--data", files / "photos", *flags, 1
    call(align_attention, *photos, "--attention", "linear_conv", "--out", one)
    assert load_vit(one / "student.safetensors").arch.aligned == 2
    call(align_features, *photos, "--student", one / "student.safetensors", "--out", two)
    call(align_features, *photos, "--out", tmp_path / "alone")
    assert load_vit(tmp_path / "alone/student.safetensors").header["stage"] == "features"
    again = "--student", two / "student.safetensors", "--out", tmp_path / "again"
    call(align_attention, *photos, *again)
    stage = load_vit(tmp_path / "again/student.safetensors").header["stage"]
    assert stage == "attention+features+attention"
    task = "--weights", two / "student.safetensors", "--data", files / "classify", *flags
    call(finetune, *task, 1, "--from-scratch", "--out", tmp_path / "scratch")
    assert rows_of(tmp_path / "scratch")[0]["size"] == 16
    call(finetune, *task, 0, "--freeze", "--out", tmp_path / "three")
    (row,) = rows_of(tmp_path / "three")
    assert row["size"] == 16 and row["kept_head"] and row["stage"] == "attention+features"
    assert same(head_of(row["checkpoint"], "classify"), head_of(tuned, "classify"))


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_is_that_of_the_teacher_named_last_but_no_mask_head(files, tmp_path, chain, kind):
    """Frozen checkpoints have their teacher's backbone, so that its students fit them, too. A mask
    head has softmax of its own."""
    tune(files, tmp_path, "segment", "--freeze", "--head", kind, "--steps", 1)
    student = chain / "one/student.safetensors"
    teacher, ours, _ = load_pair(tmp_path / "0-segment.safetensors", student)
    assert teacher.head and ours.header["stage"] == "attention"
    assert ours.head == (teacher.head if kind == "linear" else {})
    assert ours.header.get("classes") == (["0", "7"] if kind == "linear" else None)


def test_predict_labels_as_evaluate_does(files, tuned, tmp_path):
    """A line for each photo; the share of right ones is the score that the run wrote."""
    file, (row,) = tuned["classify"], rows_of(tuned["classify"].parent)
    printed = call(finetune, "--weights", file, "--predict", files / "classify/val", "--dtype",
                   "float32", "--out", tmp_path / "none")
    lines = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    assert [Path(path) for path, *_ in lines] == sorted((files / "classify/val").rglob("*.jpg"))
    right = [Path(path).parent.name == label for path, label, _ in lines]
    assert row["score"] == pytest.approx(100 * sum(right) / len(right))
    assert {label for _, label, _ in lines} == {"blue", "red"}
    assert all(0.5 <= float(share) <= 1 for *_, share in lines)
    assert not (tmp_path / "none").exists()             # nothing to write but the lines


def test_predict_names_what_it_cannot_do_and_does_the_rest(files, tuned, tmp_path, capfd):
    """A broken photo of a folder is no error; one that was named is, at the end."""
    bad, good = tmp_path / "photos/a.jpg", tmp_path / "photos/z.jpg"
    bad.parent.mkdir()
    bad.write_bytes(b"no photo")
    good.write_bytes((files / "classify/val/red/0.jpg").read_bytes())
    words = ["--weights", str(tuned["classify"]), "--predict"]
    finetune.main([*words, str(bad.parent)])
    out, err = capfd.readouterr()
    assert f"left out: {bad}" in err and f"{good}\t" in out
    said = refusal(finetune.main, [*words, str(bad), str(good)])
    assert f"not done: {bad}" in said and f"{good}\t" in capfd.readouterr().out


def test_predict_ends_where_a_mask_cannot_be_written(files, tuned, tmp_path, monkeypatch):
    """As on a full disk, which is no fault of the photos."""
    monkeypatch.setattr(finetune, "write_whole", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        call(finetune, "--weights", tuned["segment"], "--predict", files / "segment/val/images",
             "--out", tmp_path / "out")


def test_predict_writes_the_masks_that_are_scored_in_their_colours(files, tuned, tmp_path):
    """Masks of ids and of the photos' own sizes; the score is an independent count's."""
    photos, masks, guess, truth = files / "segment/val/images", tmp_path / "out/masks", [], []
    flags = "--weights", tuned["segment"], "--size", 16, "--dtype", "float32"
    tune(files, tmp_path / "scored", "segment", *flags, "--steps", 0)
    printed = call(finetune, *flags, "--predict", photos, "--out", tmp_path / "out")
    for i in range(5):
        assert f"\t{masks / str(i)}.jpg.png" in printed
        with Image.open(masks / f"{i}.jpg.png") as mask:
            assert mask.getpalette()[21:24] == (PALETTE[7] * 255).byte().tolist()
            assert mask.size == Image.open(photos / f"{i}.jpg").size
            guess += np.array(mask).flatten().tolist()
        truth += np.array(Image.open(photos.parent / f"masks/{i}.png")).flatten().tolist()
    pairs, iou = [pair for pair in zip(truth, guess) if pair[0] != 255], []
    for id in (0, 7):
        both = sum(pair == (id, id) for pair in pairs)
        iou.append(both / sum(id in pair for pair in pairs))
    score = rows_of(tmp_path / "scored")[0]["score"]
    assert score == pytest.approx(50 * sum(iou), abs=0.01) and min(iou) > 0
