"""Stages 1 and 2, and what stage 3 shares with them, on tiny random ViTs and photos.

A property is checked where it is decided (block_alignment, feature_alignment, Draws, ...), and on
what main() does and leaves behind. Bad input is test_inputs.py's, stopping test_runs.py's.
"""
import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from functorch.compile import make_boxed_func
from PIL import Image
from torch._dynamo.backends.common import aot_autograd

import align_attention
import align_features
import finetune
from align_attention import attention_maps, block_alignment, draw_attention, embed
from align_attention import exponential_start, relative_error, trained_parameters
from align_features import LOSS, compare, feature_alignment, picture, whitening
from conftest import (ARCH, SIZE, STAGES, Mine, brief, error, header, log_of, middle, moved,
                      random_images, random_vit, refusal, report_of, same, seeded, student_of)
from model import (Draws, InputError, linear_reference, linearize, load_pair, load_vit, loaders,
                   note_unread, read_weights, save_vit, softmax_reference, unlabelled)

ALL = pytest.mark.parametrize("stage", STAGES)
FIRST = pytest.mark.parametrize("stage", (align_attention, align_features))
HEADS = ("classify", "segment", "frozen") if finetune in STAGES else ()
QKV, PROJ = {"qkv.weight", "qkv.bias"}, {"proj.weight", "proj.bias"}
MAPS, EYE = {"operator.map_q", "operator.map_k"}, torch.eye(ARCH.width)
CPU = "cpu", torch.float32


def step(teacher, student, images, dtype=torch.float32, align=block_alignment, then=lambda loss: 0):
    """Stage 1's step as main() has it -> losses of the blocks (depth,)."""
    (x, grid), losses = embed(teacher, images, dtype), []
    for theirs, ours in zip(teacher.blocks, student.blocks):
        x, wrong, scale = align(theirs, ours, x, grid, dtype)
        then(wrong / scale)
        losses.append((wrong / scale).detach())
    return torch.stack(losses)


def held_out_images(files):
    train, held_out = unlabelled([str(files / "photos")])
    assert len(train) == 11 and len(held_out) == 2 and not set(train) & set(held_out)
    return torch.stack([middle(path) for path in held_out])


def held_out_error(files, student):
    """Stage 1's table again, for any student."""
    losses = step(load_vit(files / "teacher.safetensors"), student, held_out_images(files))
    return pytest.approx(losses.sqrt().tolist(), rel=1e-5)


def tokens_again(files, out, student):
    """The report's comparison of final tokens again, whitened by the run's own training draws."""
    args = argparse.Namespace(**report_of(out)["arguments"])
    teacher, (train, held_out) = load_vit(files / "teacher.safetensors"), unlabelled(args.data)
    train, held_out = loaders(args, train, held_out, 0)
    assert len(train.dataset) == 11 and len(held_out.dataset) == 2
    whiten = whitening(teacher, train.dataset, args.batch_size, *CPU)
    return pytest.approx(compare(teacher, student, held_out, whiten, *CPU), rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Stage 1

def test_block_loss_is_the_squared_error_over_that_of_the_mean_of_v():
    """Of block_alignment, written out with the N x N operators, in float64; CLS and registers
    together weigh a tenth of the patches."""
    teacher, student = random_vit().double(), random_vit(1, "linear").double()
    x, grid = embed(teacher, random_images(), torch.float64)
    ours, theirs, h = student.blocks[0].attn, teacher.blocks[0].attn, teacher.blocks[0].norm1(x)
    q, k, v = theirs.project(h)
    target, blind, output = (layer.proj(y.transpose(1, 2).flatten(2)) for layer, y in (
        (theirs, softmax_reference(q, k, v)), (theirs, v.mean(2, keepdim=True).expand_as(v)),
        (ours, linear_reference(*ours.project(h)))))
    _, wrong, scale = block_alignment(teacher.blocks[0], student.blocks[0], x, grid, torch.float64)
    prefix = teacher.arch.prefix
    weight = torch.tensor([0.1 * 16 / prefix] * prefix + [1] * 16, dtype=torch.float64)
    for got, part in ((wrong, output), (scale, blind)):
        expected = torch.einsum("bnc,bnc,n->", part - target, part - target, weight)
        assert got.item() == pytest.approx(expected.item(), rel=1e-9)
    assert not scale.requires_grad and wrong.dtype == torch.float64
    _, _, scale = block_alignment(teacher.blocks[0], student.blocks[0], x[:, :1], (1, 1))
    assert scale == 1e-12                               # one token: the mean of V is exact


def test_main_aligns_block_by_block(files, chain, tmp_path, monkeypatch):
    """Each block sees the teacher's stream, which nothing of the student enters; backward block by
    block is the gradient of the sum of the losses."""
    got, found, clip, file = [], [], nn.utils.clip_grad_norm_, chain / "one/student.safetensors"
    monkeypatch.setattr(align_attention, "block_alignment", lambda theirs, ours, x, *more: (
        torch.is_grad_enabled() and got.append((theirs, x)),
        block_alignment(theirs, ours, x, *more))[1])
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, limit: (
        found.append([p.grad.clone() for p in parameters]), clip(parameters, limit))[1])
    brief(align_attention, files, tmp_path / "out", "--student", file, "--steps", 1)
    teacher = load_vit(files / "teacher.safetensors").requires_grad_(False)
    x, student, total = got[0][1], load_vit(file), 0
    parameters = sum(trained_parameters(student, ["qkv", "proj"]), [])
    for (used, have), theirs, ours in zip(got, teacher.blocks, student.blocks, strict=True):
        assert same(used, theirs) and torch.equal(have, x) and not have.requires_grad
        carried, wrong, scale = block_alignment(theirs, ours, x, (4, 4))
        x, total = theirs(x, (4, 4)), total + wrong / scale
        assert torch.equal(carried, x) and len(x) == 4
    assert [len(block) for block in found] == [4, 4]                    # clipped block by block
    for have, true in zip(sum(found, []), torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(have, true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("attention, train, want", [
    ("linear", "", QKV | PROJ), ("linear", "qkv operator", QKV), ("hedgehog", "qkv", QKV),
    ("hedgehog", "operator", MAPS), ("linear", "proj", PROJ),
    ("linear_conv", "", QKV | PROJ | {"operator.conv.weight"}),
    ("mine", "", QKV | PROJ | {"operator.conv.weight", "operator.conv.bias"})])
def test_stage_1_moves_exactly_what_it_should(files, tmp_path, mine, attention, train, want):
    """What has a gradient, and which tensors of the written student differ from the start's."""
    names = {f"blocks.{i}.attn.{name}" for i in (0, 1) for name in want}
    flags = ["--train", *train.split()] if train else []
    torch.manual_seed(0)
    teacher, student, _ = load_pair(files / "teacher.safetensors", None, attention)
    exponential_start(student)
    brief(align_attention, files, tmp_path, "--attention", attention, *flags)
    assert moved(student.state_dict(), student_of(tmp_path).state_dict()) == names
    groups = flags[1:] or ["qkv", "operator", "proj"]
    assert [len(block) for block in trained_parameters(student, groups)] == [len(want)] * 2
    step(teacher.requires_grad_(False), student, random_images(), then=torch.Tensor.backward)
    graded = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert graded.keys() == names and all(gradient.any() for gradient in graded.values())


def test_an_operators_own_parameters_learn_five_times_as_fast(files, tmp_path):
    """AdamW's first step is its rate, where the gradient is not tiny."""
    teacher = load_vit(files / "teacher.safetensors").state_dict()
    brief(align_attention, files, tmp_path, "--attention", "linear_conv", "--steps", 1)
    change = {name: tensor.abs().max() if "conv" in name else (tensor - teacher[name]).abs().max()
              for name, tensor in student_of(tmp_path).state_dict().items() if ".attn." in name}
    rate, block = json.loads(open(tmp_path / "log.jsonl").readline())["lr"], "blocks.1.attn."
    assert change[f"{block}operator.conv.weight"] == pytest.approx(5 * rate, rel=1e-3)
    assert change[f"{block}qkv.weight"] == pytest.approx(rate, rel=1e-3)


def test_an_operator_of_ones_own_goes_through_all_stages(files, tmp_path, mine):
    """Registered by one line: trained, saved, loaded, trained on, fine-tuned, never forgotten."""
    one, two = (tmp_path / name / "student.safetensors" for name in ("one", "two"))
    brief(align_attention, files, one.parent, "--attention", "mine")
    brief(align_features, files, two.parent, "--student", one)
    start = load_vit(one).state_dict()
    assert moved(start, load_vit(two).state_dict()) == start.keys()     # all that stage 2 trains
    assert "no parameters" in refusal(trained_parameters, random_vit(0, "linear"), ["operator"])
    if finetune in STAGES:
        brief(finetune, files, tmp_path / "3", "--freeze", "--weights", two,
              f"{files}/teacher.safetensors:mine")
        tuned, swapped = (load_vit(tmp_path / f"3/{i}-classify.safetensors") for i in range(2))
        assert same(tuned, load_vit(two)) and isinstance(tuned.blocks[0].attn.operator, Mine)
        assert swapped.attention == "mine"


def test_memory_does_not_grow_with_depth(files, tmp_path):
    """Bytes that autograd keeps for the backward of main(), at their peak."""
    class Kept:
        live = peak = 0

        def __init__(self, tensor):
            self.tensor = tensor.detach()
            Kept.live += tensor.nbytes
            Kept.peak = max(Kept.peak, Kept.live)

        def __del__(self):
            Kept.live -= self.tensor.nbytes

    peaks = []
    for depth in (12, 24):
        Kept.peak, file = 0, tmp_path / f"{depth}.safetensors"
        save_vit(random_vit(depth=depth), file)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            brief(align_attention, files, tmp_path / str(depth), "--teacher", file, "--steps", 1)
        peaks.append(Kept.peak)
    assert 0 < peaks[1] <= 1.05 * peaks[0]


def test_stage_1_report_is_of_the_written_student(files, chain):
    out = chain / "one"
    report, rows, student = report_of(out), log_of(out), student_of(out)
    assert report["after"] == held_out_error(files, student) != report["before"]
    assert report["final"] == tokens_again(files, out, student)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["loss"] == pytest.approx(sum(row["blocks"]) / 2) for row in rows)
    assert rows[2]["held_out"] == pytest.approx(sum(report["after"]) / 2) != rows[1]["held_out"]
    teacher, student, batches = random_vit(), random_vit(1, "linear"), random_images(4).split(2)
    uneven = [batches[0], batches[1][:1]]       # all photos weigh alike, also of the last batch
    found = [relative_error(teacher, student, [(part, [""]) for part in parts], *CPU)
             for parts in (uneven, [torch.cat(uneven)])]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("attention, shift", [
    ("linear", -4), ("lower", -2.5), ("relu", 0), ("hedgehog", 0), ("softmax", 0)])
def test_stage_1_starts_at_the_teachers_weights(files, tmp_path, mine, attention, shift):
    """At a learning rate of (next to) nothing: but that queries and keys start lower, once."""
    swapped = linearize(load_vit(files / "teacher.safetensors"), attention)
    flags, one = ["--train", "qkv", "--lr", 1e-30], tmp_path / "one/student.safetensors"
    brief(align_attention, files, tmp_path / "one", "--attention", attention, *flags)
    assert report_of(tmp_path / "one")["before"] == held_out_error(files, swapped)
    for block in swapped.blocks:
        block.attn.qkv.bias.data[:2 * ARCH.width] += shift
    assert same(swapped, load_vit(one)) and load_vit(one).attention == attention
    assert report_of(tmp_path / "one")["after"] == held_out_error(files, swapped)
    brief(align_attention, files, tmp_path / "more", "--student", one, *flags)
    assert same(swapped, student_of(tmp_path / "more"))
    exponential_start(random_vit(attention=attention, qkv_bias=False))      # DINOv3: nothing to do


def test_attention_maps_are_the_rows_of_the_n_by_n_weights():
    """On the teacher's stream, in a late block, mean over heads."""
    images, queries = random_images(2), [0, 6, 15]
    for prefix, change in ((2, dict()), (0, dict(cls=False, cls_position=False, registers=0))):
        teacher = random_vit(depth=4, **change).requires_grad_(False)
        vits = [teacher, *(random_vit(1, name, depth=4, **change) for name in
                           ("softmax", "linear", "linear_conv"))]
        maps = attention_maps(teacher, vits, images, queries)
        x, grid = embed(teacher, images, torch.float32)
        for block in teacher.blocks[:3]:
            x = block(x, grid)
        for vit, found in zip(vits, maps, strict=True):
            q, k, _ = vit.blocks[3].attn.project(teacher.blocks[3].norm1(x))
            slow = softmax_reference if vit.attention == "softmax" else linear_reference
            rows = slow(q, k, torch.eye(q.shape[2]).expand(2, 2, -1, -1)).mean(1)   # (B, N, N)
            rows = rows[:, prefix:, prefix:][:, queries].transpose(0, 1)
            torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-6)
            assert prefix or torch.allclose(found.sum(-1), torch.ones(3, 2), atol=1e-5)


def test_attention_png_shows_teacher_before_and_after(files, tmp_path, monkeypatch):
    """A column a query, which is white, a row a map; and main() draws those of its ViTs."""
    drawn, main = [], partial(brief, align_attention, files, tmp_path)
    monkeypatch.setattr(align_attention, "draw_attention", lambda *args: drawn.extend(args))
    main()
    teacher, (maps, images, queries, grid, _) = load_vit(files / "teacher.safetensors"), drawn
    vits = teacher, linearize(teacher, "linear"), student_of(tmp_path)
    assert torch.equal(images, held_out_images(files)) and queries == [5, 10, 15] and grid == (4, 4)
    torch.testing.assert_close(maps, attention_maps(teacher, vits, images, queries))
    main("--size", 16)                                  # 2 x 2 patches: room for three queries, too
    maps = torch.full((3, 3, 2, 16), 0.01)
    maps[0, 1, 1, 2] = maps[1, 1, 1, 9] = maps[2, 1, 1, 12] = 1     # second photo, second query
    draw_attention(maps, images, queries, grid, tmp_path / "a.png")
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "a.png")))[2:, 2:].float()
    assert pixels.shape == (4 * 34, 6 * 34, 3)          # 2 pixels around each
    cells = pixels.unflatten(0, (4, 34)).unflatten(2, (6, 34))[:, :32, :, :32]
    cells = cells.unflatten(3, (4, 8)).unflatten(1, (4, 8)).mean((2, 5, 6))     # (4, 4, 6, 4)
    cells = cells.transpose(1, 2).flatten(2)            # row, column, patch
    for column, query in enumerate(queries * 2):
        assert cells[0, column].argmax() == query and cells[0, column, query] == 255
    for row, patch in enumerate((2, 9, 12), 1):
        first, second = cells[row, 4].topk(2).values
        assert cells[row, 4].argmax() == patch and first > 178 > 150 > second


# --------------------------------------------------------------------------------------------------
# Stage 2

def test_feature_losses_by_hand():
    """Of every final token of both: CLS, registers and patches, of which only ours are trained."""
    seen, teacher, student = [], random_vit().requires_grad_(False), random_vit(1, "linear")
    feature_alignment(teacher, student, random_images(), lambda *both: seen.extend(both) or both[0])
    for vit, tokens in zip((student, teacher), seen, strict=True):
        assert torch.equal(tokens, vit(teacher.normalize(random_images())))
        assert tokens.shape == (3, 18, ARCH.width) and tokens.requires_grad == (vit is student)
    have, want = torch.tensor([[[1., 2.], [3., 4.]]]), torch.tensor([[[1., 4.], [0., 4.]]])
    assert LOSS["mse"](have, want, None).item() == pytest.approx((4 + 9) / 4)
    cosine, length = ((1 + 8) / math.sqrt(5 * 17) + 4 / 5) / 2, ((2 - 0.5) + (3 - 0.5)) / 4
    assert LOSS["cosine"](have, want, None).item() == pytest.approx(1 - cosine + 0.1 * length)
    whiten = torch.tensor([[2., 1.], [1., 3.]])         # (0, -2) -> (-2, -6), (3, 0) -> (6, 3)
    assert LOSS["whitened"](have, want, whiten).item() == pytest.approx((4 + 36 + 36 + 9) / 4)


@pytest.mark.parametrize("batch_size", (32, 50))
def test_whitening_is_of_128_draws(batch_size):
    """whiten (cov + 0.03 mean eigenvalue) whiten = identity; of CLS, registers and patches."""
    teacher, images = random_vit(), random_images(140)
    whiten = whitening(teacher, [(image, "") for image in images], batch_size, *CPU).double()
    tokens = teacher(teacher.normalize(images[:128])).detach().double().flatten(0, 1)
    cov = (tokens - tokens.mean(0)).T @ (tokens - tokens.mean(0)) / (len(tokens) - 1)
    cov += 0.03 * cov.diagonal().mean() * EYE
    torch.testing.assert_close(whiten @ cov @ whiten, EYE.double(), rtol=0, atol=1e-3)


def test_stage_2_starts_where_stage_1_ended(files, chain, tmp_path):
    """A learning rate of (next to) nothing leaves it there, whatever --loss, which is heeded."""
    one, losses = chain / "one/student.safetensors", [log_of(chain / "two")[0]["loss"]]
    for loss in LOSS:
        brief(align_features, files, tmp_path, "--student", one, "--loss", loss, "--lr", 1e-30)
        assert same(load_vit(one), student_of(tmp_path))
        losses.append(log_of(tmp_path)[0]["loss"])
    assert losses.index(losses[list(LOSS).index("whitened") + 1]) == 0 and len(set(losses)) == 3


def test_compare_knows_the_same_the_constant_cls_and_patches():
    """The first token counts as CLS, registers as neither; no number where there is no CLS."""
    teacher, images = random_vit().eval(), random_images(4)
    batches, tall = [(part, [""]) for part in images.split(2)], EYE * seeded(ARCH.width).exp()
    score = lambda student, teacher=teacher, batches=batches: tuple(
        compare(teacher, student, batches, tall, "cpu", torch.float32).values())
    assert score(linearize(teacher, "softmax")) == pytest.approx((1, 1, 0, 0), abs=1e-6)
    want = teacher(teacher.normalize(images)).detach()
    mean = want.mean((0, 1)).expand_as(want)
    cls, patches, *errors = score(lambda normal: mean, batches=[(images, "")])
    assert errors == pytest.approx([1, 1], rel=1e-5) and cls < 0.99 and patches < 0.99
    noise = 0.1 * seeded(*want.shape)
    *_, plain, white = score(lambda normal: want + noise, batches=[(images, "")])
    assert plain == pytest.approx((noise.norm() / (want - mean).norm()).item(), rel=1e-4)
    assert white == pytest.approx(((noise @ tall).norm() / ((want - mean) @ tall).norm()).item())
    for first, alike in {0: (-1, 1), 1: (1, 1), 2: (1, 1 - 2 / 16)}.items():
        sign = torch.ones(18, 1).index_fill(0, torch.tensor(first), -1)
        *found, wrong, _ = score(lambda normal: teacher(normal) * sign)
        assert found == pytest.approx(alike, abs=1e-4) and wrong > 0.1
    bare = random_vit(cls=False, cls_position=False).eval()
    assert score(bare, bare)[0] is None


def test_stage_2_report_is_of_the_written_student(files, chain):
    rows, report = log_of(chain / "two"), report_of(chain / "two")
    for key, folder in (("before", "one"), ("after", "two")):
        assert report[key] == tokens_again(files, chain / "two", student_of(chain / folder))
    assert [row["step"] for row in rows] == [1, 2, 3]
    white = report["after"]["whitened_error"]
    assert rows[2]["held_out"] == pytest.approx(white) != rows[1]["held_out"]
    assert Image.open(chain / "two/features.png").size == (2 * 34 + 2, 3 * 34 + 2)  # two photos


def test_picture_has_a_row_each_for_photo_teacher_and_student(tmp_path):
    teacher, images, line = random_vit(), random_images(), SIZE + 2     # 2 pixels around each
    picture(teacher, linearize(teacher, "softmax"), images, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (3 * line + 2, 3 * line + 2, 3)
    photo, theirs, ours = (pixels[2 + i * line:, 2:][:SIZE, :SIZE] for i in range(3))
    assert np.array_equal(photo, images[0].permute(1, 2, 0)) and np.array_equal(ours, theirs)
    assert len(np.unique(theirs.reshape(-1, 3), axis=0)) > 4            # not one colour
    assert np.array_equal(theirs[::8, ::8].repeat(8, 0).repeat(8, 1), theirs)   # one a patch


# --------------------------------------------------------------------------------------------------
# All three

@pytest.mark.parametrize("stage, lr", [(align_attention, 5e-3), (align_features, 2e-3)])
def test_loss_goes_down(files, tmp_path, stage, lr):
    """With warm-up and decay; on two folders of --data, a photo of each held out."""
    said = brief(stage, files, tmp_path, "--data", files / "photos/album0", files / "photos/album1",
                 "--steps", 30, "--batch-size", 8, "--lr", lr)
    losses, rates = ([row[key] for row in log_of(tmp_path)] for key in ("loss", "lr"))
    assert "on 6 images" in said and sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert max(rates) == pytest.approx(lr, rel=0.1)
    assert len(rates) == 30 and rates[0] < 0.5 * lr and rates[-1] < 0.02 * lr


def test_headers(files, chain, tmp_path):
    """Stages, what they trained with, the teacher's fingerprint, no path: so files can move."""
    shutil.copytree(chain, tmp_path / "new")
    teacher, one, two = (tmp_path / f"new/{name}.safetensors" for name in
                         ("teacher", "one/student", "two/student"))
    other = load_vit(teacher)
    digest = hashlib.sha256(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in
                                     sorted(other.state_dict().items()))).hexdigest()
    brief(align_features, files, tmp_path / "alone")
    brief(align_features, files, tmp_path / "more", "--teacher", teacher, "--student", two)
    for folder, stage in {chain / "one": "attention", chain / "two": "attention+features",
                          tmp_path / "alone": "features",
                          tmp_path / "more": "attention+features"}.items():
        facts, report = header(folder / "student.safetensors"), report_of(folder)
        assert facts["stage"] == report["stage"] == stage and facts["attention"] == "linear"
        assert facts["teacher"] == report["teacher"] == digest and report["seconds"] > 0
        assert (facts["training"]["steps"], facts["training"]["size"]) == (3, SIZE)
    other.norm.bias.data[0] += 1                        # the last tensors count, too
    save_vit(other, tmp_path / "other.safetensors")
    for stage in (align_attention, align_features):
        said = refusal(brief, stage, files, tmp_path / "no", "--student", one, "--teacher",
                       tmp_path / "other.safetensors")
        assert str(one) in said and "other.safetensors" in said
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("stage", ("attention", "features", *HEADS))
def test_half_precision_trains_the_same(files, tmp_path, monkeypatch, stage, dtype):
    """Finite losses, tensors that moved, gradients clipped at their true size (unscaled)."""
    norms, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_",
                        lambda params, limit: norms.append(clip(params, limit).item()))
    module = {"attention": align_attention, "features": align_features}.get(stage, finetune)
    flags = {"segment": ["--task", stage, "--data", files / stage], "frozen": ["--freeze"]}
    states, losses, first = [], [], []
    for name in ("float32", str(dtype)[6:]):
        norms.clear()
        brief(module, files, tmp_path / name, *flags.get(stage, []), "--dtype", name)
        losses.append([row["loss"] for row in log_of(tmp_path / name)])
        states.append(read_weights(next((tmp_path / name).glob("*.safetensors")))[0])
        first.append(norms[:2])         # of step 1: two blocks, head and backbone, or two steps
    tolerance = 16 * torch.finfo(dtype).eps
    assert losses[1][0] == pytest.approx(losses[0][0], rel=tolerance)
    assert len(losses[1]) == 3 and all(map(math.isfinite, losses[1]))
    pairs = [pair for pair in zip(*first) if math.isfinite(sum(pair))]
    assert pairs                        # GradScaler starts high: one may have left float16's range
    for true, have in pairs:            # one that is still scaled would be 2^16 times too long
        assert have == pytest.approx(true, rel=2 * tolerance)
    assert all(t.dtype == torch.float32 for t in states[1].values()) and moved(*states)
    start = load_vit(files / "teacher.safetensors").state_dict()
    assert bool(moved(start, {name: states[1][name] for name in start})) == (stage != "frozen")


@pytest.mark.parametrize("attention, dtype", [
    ("linear", torch.float32), ("linear", torch.bfloat16), ("linear_conv", torch.float16),
    ("hedgehog", torch.float32)], ids=str)
def test_compiled_steps_equal_eager_ones(attention, dtype):
    """What each stage compiles on a GPU, traced whole (fullgraph); one graph serves all blocks.

    Half precision: nothing is lost to underflow, and a compiled backward is not under autocast,
    which would take in float16 what linear attention multiplies in float32, for the range.
    """
    torch._dynamo.reset()
    teacher, student = random_vit().requires_grad_(False), random_vit(1, attention)
    images, head = random_images(), finetune.make_head(ARCH, "segment", 3)
    masks, steps = images[:, 0] % 3, [block_alignment, feature_alignment, finetune.task_loss]
    steps, graphs = steps[:len(STAGES)], []

    def note(graph, inputs):
        graphs.append({node.meta["val"].dtype for node in graph.graph.nodes
                       if node.target == torch.ops.aten.bmm.default})
        return make_boxed_func(graph)

    def gradients(align, features, loss=None, dtype=dtype):
        student.zero_grad()
        losses = step(teacher, student, images, dtype, align, torch.Tensor.backward)
        first = [p.grad.clone() for p in student.parameters() if p.grad is not None]
        total = features(teacher, student, images, partial(LOSS["whitened"], whiten=EYE), dtype)
        if loss:
            summed, count = loss(student, head, images, masks, "segment", False, dtype)
            total = total + summed / count
        total.backward()
        return [losses, *first, total.detach(), *(p.grad.clone() for p in student.parameters())]

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=note)
    compiled = gradients(*(torch.compile(one, fullgraph=True, backend=backend) for one in steps))
    assert len(graphs) == len(steps) and (graphs[0] == {torch.float32} or dtype != torch.float16)
    for exact, found, traced in zip(gradients(*steps, dtype=torch.float32), gradients(*steps),
                                    compiled, strict=True):
        assert error(found, exact) < 16 * torch.finfo(dtype).eps
        assert torch.allclose(found, traced, rtol=1e-4, atol=1e-5 * found.abs().max()) or (
            dtype != torch.float32          # rounded elsewhere, not more
            and (traced - exact).norm() <= 2 * (found - exact).norm())


@ALL
def test_demo_defaults_are_printed_and_a_flag_wins(capsys, stage):
    """Even one that equals a default for --data."""
    args, said = stage.parse([]), capsys.readouterr().out
    own = stage.parse(["--data", "photos", "--weights" if stage is finetune else "--teacher", "a"])
    for key, value in stage.DEMO.items():
        assert getattr(args, key) == value and f"--{key.replace('_', '-')} {value}" in said
    for key, value in stage.DEFAULTS.items():
        assert getattr(own, key) == value
        assert getattr(stage.parse([f"--{key.replace('_', '-')}", str(value)]), key) == value
    if stage is align_features:
        assert args.student and f"--student {args.student}" in said and own.student is None
        assert stage.parse(["--attention", "linear"]).student is None
    if stage is finetune:
        assert args.freeze and args.weights == finetune.ABLATION and " ".join(args.weights) in said
        assert not own.freeze and not stage.parse(["--weights", "a"]).freeze


def test_draws_are_a_function_of_seed_and_place_alone():
    """Epochs are permutations; the next of the same one takes an unreadable photo's place."""
    def draws(seed, order=range(20), bad=()):
        def read(item):
            if item in bad:
                raise InputError(f"{item}")
            return item
        source = Draws(range(10), read, lambda item: (item, torch.rand(1).item()), seed)
        return {i: source[i] for i in order}

    state, good, other = torch.get_rng_state(), draws(3), draws(4)
    assert torch.equal(torch.get_rng_state(), state)            # crops leave other randomness alone
    torch.manual_seed(9)
    assert draws(3, [7, 19, 2, 7, *range(20)]) == good          # a worker takes any of them
    first, second, third = ([part[i][0][0] for i in range(j, j + 10)]
                            for part, j in ((good, 0), (good, 10), (other, 0)))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(10))
    assert first != second and first != third
    assert len({drawn[0][1] for part in (good, other) for drawn in part.values()}) == 40
    assert [draws(None, [i])[i][0][0] for i in range(10)] == list(range(10))
    lost, instead = [first[4], first[5], first[9]], {4: 6, 5: 6, 9: 0}
    names = {4: f"{lost[0]}\n{lost[1]}", 5: str(lost[1]), 9: str(lost[2])}
    assert draws(3, range(10), lost) == {
        i: ((first[instead.get(i, i)], good[i][0][1]), names.get(i, "")) for i in range(10)}
    assert "none of 10 photos" in refusal(draws, 3, [0], range(10))


@FIRST
def test_unreadable_photos_are_named_once_and_must_be_few(files, tmp_path, capsys, stage):
    unread = []
    for messages in (["", "a\nb", "b", ""], ["b\na"]):
        note_unread(messages, unread, 200)
    assert sorted(unread) == ["a", "b"] and capsys.readouterr().out.count("left out: ") == 2
    assert "3 of 200" in refusal(note_unread, ["c"], unread, 200)
    shutil.copytree(files / "photos", tmp_path / "photos")
    flags = tmp_path / "out", "--data", tmp_path / "photos", "--batch-size", 8      # two epochs
    (tmp_path / "photos/album1/4.jpg").write_bytes(b"no photo")
    said, unread = brief(stage, files, *flags), report_of(tmp_path / "out")["unread"]
    assert said.count(f"left out: {tmp_path / 'photos/album1/4.jpg'}") == len(unread) == 1
    (tmp_path / "photos/album1/7.png").write_bytes(b"no photo")
    assert "2 of 13 photos" in refusal(brief, stage, files, *flags)


@ALL
def test_photos_are_squares(tmp_path, files, drawn, stage):
    """All of a photo's middle when held out; a random part, mirrored or not, in training."""
    pixels, made = np.zeros((60, 40), dtype=np.uint8), drawn(stage)
    pixels[:, 20:] = 200
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "data" / place).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / place / "a.jpg")
    brief(stage, files, tmp_path / "out", "--data", tmp_path / "data")
    train, (held_out, _) = ([draws[i][0] for i in range(n)] for draws, n in zip(made, (12, 2)))
    held_out = held_out[0] if stage is finetune else held_out
    train = [item[0] if stage is finetune else item for item in train]
    assert torch.equal(held_out, middle(tmp_path / "data/val/a/a.jpg"))
    assert {(*image.shape, image.dtype) for image in train} == {(3, SIZE, SIZE, torch.uint8)}
    assert len({image.numpy().tobytes() for image in train}) > 9
    mirrored = {bool(image[:, :, :8].sum() > image[:, :, -8:].sum()) for image in train}
    assert mirrored == {True, False}


def test_imports_do_nothing(tmp_path):
    code = "import sys; sys.path.insert(0, {!r})\nimport align_features, finetune, align_attention"
    done = subprocess.run([sys.executable, "-c", code.format(finetune.__file__.rpartition("/")[0])],
                          cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, b"", [])


def test_blocks_that_keep_softmax_learn_nothing(files, tmp_path):
    """In stage 1; the others learn as ever. A number that leaves no block is refused."""
    flags = "--attention", "hedgehog", "--train", "operator", "--keep-softmax"
    brief(align_attention, files, tmp_path / "one", *flags, 1)
    teacher, student = load_vit(files / "teacher.safetensors"), student_of(tmp_path / "one")
    start = linearize(teacher, "hedgehog", keep_softmax=1)
    assert student.keep_softmax == 1 and same(linearize(student, "hedgehog", 1), student)
    assert moved(start.state_dict(), student.state_dict()) == {
        f"blocks.0.attn.operator.map_{x}" for x in "qk"}
    assert report_of(tmp_path / "one")["after"][1] == 0
    for number in (-1, 2):
        assert "expected 0 to 1" in refusal(brief, align_attention, files, tmp_path, *flags, number)
