"""The three stages on tiny random ViTs and photos, on the CPU: what each one trains, leaves alone, computes and writes.

A property is checked where it is decided (block_alignment, feature_alignment, evaluate, ...), and once more on the files
that main() leaves behind. Bad input is test_inputs.py's.
"""
import contextlib
import inspect
import io
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import align_attention
import align_features
import finetune
from model import Architecture, ViT, linearize, load_pair, load_vit, read_weights, save_vit, sha256, softmax_reference, unlabelled

ROOT = Path(__file__).resolve().parent.parent
ARCH = Architecture(width=64, depth=2, heads=2, hidden=128, patch=8, grid=(4, 4), registers=1, layerscale=True)
SIZE = 32                                     # pixels: the grid of ARCH
BRIEF = ["--size", SIZE, "--steps", 3, "--batch", 4]
HALVES = ("bfloat16", "float16")


def random_vit(seed=0, attention="softmax", **change):
    """A ViT whose tensors are all random and of such size that attention is far from uniform and no gradient is zero."""
    torch.manual_seed(seed)
    vit = ViT(replace(ARCH, **change), attention)
    with torch.no_grad():
        for name, tensor in vit.named_parameters():
            if ".map_" in name:
                continue                      # Hedgehog starts at identity
            spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.25
            scale = name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma"))
            tensor.copy_(scale + spread * torch.randn_like(tensor))
    return vit


def random_tokens(vit, n=3):
    """uint8 images -> (images, residual stream at the first block, grid)."""
    images = torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    with torch.no_grad():
        return images, *vit.embed(vit.normalize(images))


def call(stage, *argv):
    """main() of a stage in this process -> what it printed. Flags may be given as numbers and paths."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        stage.main([str(word) for word in argv])
    return out.getvalue()


def moved(before, after):
    """Names of the tensors of two state dicts (of the same names) that are not bit for bit the same."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def header(path):
    return read_weights(path)[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """teacher.safetensors, photos/ (unlabelled), classify/ and segment/ as finetune.py expects them. Only to be read."""
    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    save_vit(random_vit(), folder / "teacher.safetensors")

    def photo(path, rows, columns, tint=(1, 1, 1), bright=None):
        pixels = random.integers(0, 160, (rows, columns, 3)) * np.array(tint)
        if bright:
            pixels[bright] += 95
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)

    for i in range(12):                       # of both orientations and formats, in folders of folders
        photo(folder / "photos" / f"album{i % 3}" / f"{i}.{('jpg', 'png')[i % 2]}", *((40, 48) if i % 4 else (48, 40)))
    Image.fromarray(random.integers(0, 256, (40, 48), dtype=np.uint8)).save(folder / "photos" / "grey.png")
    for part, n in (("train", 8), ("val", 5)):
        for i in range(n):
            photo(folder / "classify" / part / "blue" / f"{i}.jpg", 40, 48, (0.2, 0.4, 1))
            photo(folder / "classify" / part / "red" / f"{i}.jpg", 40, 48, (1, 0.4, 0.2))
            rows, columns = (40, 48) if part == "train" else (SIZE, SIZE)
            left = random.integers(0, columns // 2)
            area = slice(8, 8 + rows // 2), slice(left, left + columns // 2)
            photo(folder / "segment" / part / "images" / f"{i}.jpg", rows, columns, bright=area)
            mask = np.zeros((rows, columns), dtype=np.uint8)
            mask[area], mask[:2] = 1, finetune.IGNORE
            (folder / "segment" / part / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder / "segment" / part / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def chain(files, tmp_path_factory):
    """Stage 1, then stage 2 on its student: (folder of both, what stage 1 printed, what stage 2 printed)."""
    out = tmp_path_factory.mktemp("chain")
    shutil.copy(files / "teacher.safetensors", out)
    first = call(align_attention, "--weights", out / "teacher.safetensors", "--data", files / "photos", *BRIEF, "--out", out / "one")
    second = call(align_features, "--weights", out / "one/student.safetensors", "--data", files / "photos", *BRIEF, "--out", out / "two")
    return out, first, second


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1

@pytest.mark.parametrize("match", ("before", "after"))
def test_block_loss_is_zero_for_softmax_itself(match):
    teacher = random_vit()
    _, x, grid = random_tokens(teacher)
    for ours, theirs in zip(linearize(teacher, "softmax").blocks, teacher.blocks):
        x, loss = align_attention.block_alignment(theirs, ours, x, grid, match)
        assert loss == 0


@pytest.mark.parametrize("match", ("before", "after"))
def test_block_loss_is_one_for_the_mean_of_v(match):
    """Without query and key every token weighs the same in linear attention."""
    teacher = random_vit()
    student, width = linearize(teacher, "linear"), ARCH.width
    _, x, grid = random_tokens(teacher)
    for ours, theirs in zip(student.blocks, teacher.blocks):
        with torch.no_grad():
            ours.attn.qkv.weight[:2 * width] = 0
            ours.attn.qkv.bias[:2 * width] = 0
        x, loss = align_attention.block_alignment(theirs, ours, x, grid, match)
        assert loss.item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("match", ("before", "after"))
def test_block_loss_is_the_ratio_of_squared_errors(match):
    """Between 0 and 1 too: written out with the N x N operators, in float64."""
    teacher = random_vit().double()
    student = linearize(random_vit(seed=1).double(), "linear").double()
    _, x, grid = random_tokens(random_vit())
    ours, theirs, x = student.blocks[0].attn, teacher.blocks[0].attn, x.double()
    h = teacher.blocks[0].norm1(x)
    q, k, v = theirs.project(h)
    target, blind = softmax_reference(q, k, v), v.mean(2, keepdim=True).expand_as(v)
    q, k, v = ours.project(h)
    weights = (1 + F.elu(q)) @ (1 + F.elu(k)).transpose(-2, -1)
    output = weights / weights.sum(-1, keepdim=True) @ v
    target, blind, output = (y.transpose(1, 2).flatten(2) for y in (target, blind, output))
    if match == "after":
        target, blind, output = theirs.proj(target), theirs.proj(blind), ours.proj(output)
    expected = (output - target).square().sum() / (blind - target).square().sum()
    _, loss = align_attention.block_alignment(teacher.blocks[0], student.blocks[0], x, grid, match)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_teacher_carries_the_residual_stream():
    """Every block of the student sees what the teacher's block sees, and nothing that the student did before."""
    teacher, student, seen = random_vit(), linearize(random_vit(seed=1), "linear"), []
    images, x, grid = random_tokens(teacher)

    def align(theirs, ours, x, grid, match, dtype):
        seen.append(x)
        return align_attention.block_alignment(theirs, ours, x, grid, match, dtype)

    losses = align_attention.alignment_step(teacher, student, images, "after", align=align)
    with torch.no_grad():
        for block, have in zip(teacher.blocks, seen, strict=True):
            assert torch.equal(have, x) and not have.requires_grad
            x = block(x, grid)
        carried, _ = align_attention.block_alignment(teacher.blocks[-1], student.blocks[-1], seen[-1], grid, "after")
        assert torch.equal(carried, x)
    assert len(seen) == ARCH.depth and losses.shape == (ARCH.depth,) and not losses.requires_grad


@pytest.mark.parametrize("attention, train, want", [
    ("linear", "qkv", ("attn.qkv.weight", "attn.qkv.bias")),
    ("hedgehog", "qkv", ("attn.qkv.weight", "attn.qkv.bias")),
    ("hedgehog", "maps", ("attn.map_q.weight", "attn.map_k.weight")),
])
@pytest.mark.parametrize("match", ("before", "after"))
def test_stage_1_moves_exactly_what_it_should(files, tmp_path, attention, train, want, match):
    """Which parameters get a gradient, and which tensors of the written student differ from the teacher's file."""
    teacher_file = files / "teacher.safetensors"
    teacher, before = load_vit(teacher_file).requires_grad_(False), sha256(teacher_file)
    names = {f"blocks.{i}.{name}" for i in range(ARCH.depth) for name in want}

    student = linearize(teacher, attention)
    by_block = align_attention.trained_parameters(student, train)
    align_attention.alignment_step(teacher, student, random_tokens(teacher)[0], match, backward=torch.Tensor.backward)
    assert {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()} == names
    assert all(p.grad is None for name, p in student.named_parameters() if name not in names)
    assert all(p.grad is None for p in teacher.parameters())
    assert [len(block) for block in by_block] == [len(want)] * ARCH.depth

    call(align_attention, "--weights", teacher_file, "--data", files / "photos", "--attention", attention, "--train", train,
         "--match", match, *BRIEF, "--out", tmp_path)
    start = linearize(load_vit(teacher_file), attention).state_dict()
    assert moved(start, load_vit(tmp_path / "student.safetensors").state_dict()) == names
    assert sha256(teacher_file) == before


def test_backward_block_by_block_is_the_gradient_of_the_sum():
    teacher, gradients = random_vit().requires_grad_(False), []
    images, x, grid = random_tokens(teacher)
    for whole in (False, True):
        student = linearize(teacher, "linear")
        align_attention.trained_parameters(student, "qkv")
        if whole:
            stream, total = x, 0
            for theirs, ours in zip(teacher.blocks, student.blocks):
                stream, loss = align_attention.block_alignment(theirs, ours, stream, grid, "after")
                total = total + loss
            total.backward()
        else:
            align_attention.alignment_step(teacher, student, images, "after", backward=torch.Tensor.backward)
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * ARCH.depth
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=0, msg=name)


def held_for_backward(depth, at_once):
    """Peak bytes that autograd keeps for backward during one step of stage 1; at_once: as the stage calls it."""
    teacher = random_vit(depth=depth).requires_grad_(False)
    student, images, live, peak, losses = linearize(teacher, "linear"), random_tokens(teacher)[0], 0, 0, []
    align_attention.trained_parameters(student, "qkv")

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def release(size):
        nonlocal live
        live -= size

    def pack(tensor):
        nonlocal live, peak
        kept, size = Kept(tensor.detach()), tensor.nbytes
        live, peak = live + size, max(peak, live + size)
        weakref.finalize(kept, release, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        align_attention.alignment_step(teacher, student, images, "after", backward=torch.Tensor.backward if at_once else losses.append)
        if not at_once:
            sum(losses).backward()
    assert all(p.grad is not None for p in student.blocks[-1].attn.qkv.parameters())
    return peak


def test_memory_does_not_grow_with_depth():
    assert held_for_backward(24, at_once=True) <= 1.05 * held_for_backward(12, at_once=True)


def test_memory_measure_sees_growth():
    """The same measure, if backward came at the end: this is what the test above would catch."""
    assert held_for_backward(24, at_once=False) >= 1.9 * held_for_backward(12, at_once=False)
    assert held_for_backward(12, at_once=False) >= 6 * held_for_backward(12, at_once=True)


def held_out_error(files, student):
    """Stage 1's table again, from a student's file: root of each block's loss on the photos held out."""
    train, held_out = unlabelled([str(files / "photos")])
    assert len(train) == 11 and len(held_out) == 2 and not set(train) & set(held_out)
    images = torch.stack(list(align_attention.Photos(held_out, SIZE, augment=False)))
    with torch.no_grad():
        return align_attention.alignment_step(load_vit(files / "teacher.safetensors"), load_vit(student), images, "after").sqrt().tolist()


def test_stage_1_report_is_of_the_written_student(files, chain):
    out = chain[0] / "one"
    report = json.loads((out / "report.json").read_text())
    assert report["after"] == pytest.approx(held_out_error(files, out / "student.safetensors"), rel=1e-5)
    assert report["before"] != report["after"]
    assert {"stage", "teacher", "training", "before", "after", "seconds"} <= report.keys()
    rows = log_of(out)
    assert [row["step"] for row in rows] == [1, 2, 3] and all(len(row["blocks"]) == ARCH.depth for row in rows)
    assert all(row["loss"] == pytest.approx(sum(row["blocks"]) / ARCH.depth) for row in rows)


@pytest.mark.parametrize("attention", ("linear", "relu", "hedgehog"))
def test_stage_1_starts_at_the_teachers_weights(files, tmp_path, attention):
    """At a learning rate of (next to) nothing: the teacher's tensors, but that queries and keys of "linear" start lower."""
    flags = ["--data", files / "photos", *BRIEF, "--lr", 1e-30]
    call(align_attention, "--weights", files / "teacher.safetensors", "--attention", attention, *flags, "--out", tmp_path / "one")
    teacher, student = linearize(load_vit(files / "teacher.safetensors"), attention), load_vit(tmp_path / "one/student.safetensors")
    shift = getattr(align_attention, "START", 0.0) if attention == "linear" else 0.0
    with torch.no_grad():
        for block in teacher.blocks:
            block.attn.qkv.bias[:2 * ARCH.width] += shift
    assert not moved(teacher.state_dict(), student.state_dict())
    report = json.loads((tmp_path / "one/report.json").read_text())
    assert report["after"] == pytest.approx(held_out_error(files, tmp_path / "one/student.safetensors"), rel=1e-5)
    save_vit(linearize(load_vit(files / "teacher.safetensors"), attention), tmp_path / "swapped.safetensors")
    assert report["before"] == pytest.approx(held_out_error(files, tmp_path / "swapped.safetensors"), rel=1e-5)   # the plain swap

    call(align_attention, "--weights", tmp_path / "one/student.safetensors", *flags, "--out", tmp_path / "more")   # and once only
    assert not moved(student.state_dict(), load_vit(tmp_path / "more/student.safetensors").state_dict())


def test_stage_1_heeds_attention_and_match(files, tmp_path):
    """The operator and the place of the comparison are what the flags say: the first loss differs."""
    first = {}
    for attention in ("linear", "hedgehog", "softmax"):
        for match in ("before", "after"):
            call(align_attention, "--weights", files / "teacher.safetensors", "--data", files / "photos", "--attention", attention,
                 "--match", match, *BRIEF, "--steps", 1, "--out", tmp_path)
            first[attention, match] = log_of(tmp_path)[0]["loss"]
            assert header(tmp_path / "student.safetensors")["attention"] == attention
    assert first["softmax", "before"] == first["softmax", "after"] == 0
    assert len(set(first.values())) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2

@pytest.mark.parametrize("loss", ("mse", "cosine"))
def test_feature_loss_is_zero_for_the_teacher_itself(loss):
    teacher = random_vit().eval()
    images = random_tokens(teacher)[0]
    same = align_features.feature_alignment(teacher, linearize(teacher, "softmax"), images, align_features.LOSS[loss])
    other = align_features.feature_alignment(teacher, linearize(teacher, "linear"), images, align_features.LOSS[loss])
    assert same.item() == pytest.approx(0, abs=1e-6) and other > 0.01


def test_mse_is_the_mean_of_squares():
    have, want = torch.tensor([[[1., 2.], [3., 4.]]]), torch.tensor([[[1., 4.], [0., 4.]]])
    assert align_features.mse(have, want).item() == pytest.approx((4 + 9) / 4)


@pytest.mark.parametrize("loss", ("mse", "cosine"))
def test_every_final_token_is_supervised(loss):
    """CLS, register and each patch, in every image."""
    teacher = random_vit().requires_grad_(False)
    images, x, _ = random_tokens(teacher)
    tokens = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    align_features.feature_alignment(teacher, lambda images: tokens, images, align_features.LOSS[loss]).backward()
    strength = tokens.grad.norm(dim=-1)                                 # (B, 1+R+N)
    assert strength.shape == (3, 2 + 16) and (strength > 0.02 * strength.max()).all()


@pytest.mark.parametrize("loss", ("mse", "cosine"))
def test_stage_2_moves_every_parameter(files, tmp_path, loss):
    teacher_file = files / "teacher.safetensors"
    before = sha256(teacher_file)
    call(align_features, "--weights", teacher_file, "--data", files / "photos", "--loss", loss, *BRIEF, "--out", tmp_path)
    start = linearize(load_vit(teacher_file), "linear").state_dict()
    assert moved(start, load_vit(tmp_path / "student.safetensors").state_dict()) == start.keys()
    assert sha256(teacher_file) == before


def test_compare_knows_the_same_and_the_constant():
    teacher = random_vit().eval()
    images = random_tokens(teacher, n=4)[0]
    same = align_features.compare(teacher, linearize(teacher, "softmax"), [images[:2], images[2:]], torch.float32, "cpu")
    assert same["cls_cosine"] == pytest.approx(1, abs=1e-6) and same["patch_cosine"] == pytest.approx(1, abs=1e-6)
    assert same["relative_error"] == 0
    constant = lambda normal: teacher(normal).mean((0, 1)).expand(len(normal), 2 + 16, ARCH.width)
    blind = align_features.compare(teacher, constant, [images], torch.float32, "cpu")
    assert blind["relative_error"] == pytest.approx(1, rel=1e-5)
    assert blind["cls_cosine"] < 0.99 and blind["patch_cosine"] < 0.99


def test_compare_tells_cls_from_patches():
    """The first token counts as CLS, registers as neither; without a CLS token there is no number for it."""
    teacher = random_vit().eval()
    images = random_tokens(teacher)[0]

    def flipped(normal, first):
        tokens = teacher(normal).clone()
        tokens[:, first] *= -1
        return tokens
    found = {first: align_features.compare(teacher, lambda n: flipped(n, first), [images], torch.float32, "cpu") for first in (0, 1, 2)}
    cosines = {first: (round(f["cls_cosine"], 4), round(f["patch_cosine"], 4)) for first, f in found.items()}
    assert cosines == {0: (-1, 1), 1: (1, 1), 2: (1, 1 - 2 / 16)}
    assert all(f["relative_error"] > 0.1 for f in found.values())
    bare = random_vit(cls=False, cls_position=False).eval()
    assert align_features.compare(bare, bare, [images], torch.float32, "cpu")["cls_cosine"] is None


def test_stage_2_report_is_of_the_written_student(files, chain):
    out = chain[0] / "two"
    report = json.loads((out / "report.json").read_text())
    assert {"stage", "teacher", "training", "before", "after", "seconds"} <= report.keys()
    assert report["before"].keys() == report["after"].keys() == {"cls_cosine", "patch_cosine", "relative_error"}
    _, held_out = unlabelled([str(files / "photos")])
    images = torch.stack(list(align_features.Photos(held_out, SIZE, augment=False)))
    teacher = load_vit(files / "teacher.safetensors")
    for key, folder in (("before", "one"), ("after", "two")):
        student = load_vit(chain[0] / folder / "student.safetensors")
        assert report[key] == pytest.approx(align_features.compare(teacher, student, [images], torch.float32, "cpu"), rel=1e-4)
    assert [row["step"] for row in log_of(out)] == [1, 2, 3]


def test_picture_has_a_row_each_for_photo_teacher_and_student(tmp_path):
    teacher = random_vit()
    images = random_tokens(teacher)[0]
    align_features.picture(teacher, linearize(teacher, "softmax"), images, tmp_path / "features.png")
    with Image.open(tmp_path / "features.png") as image:
        pixels = np.asarray(image)
    line = SIZE + 2                                                     # save_image leaves 2 pixels around each
    assert image.format == "PNG" and pixels.shape == (3 * line + 2, 3 * line + 2, 3)
    photo, theirs, ours = (pixels[2 + i * line:2 + i * line + SIZE, 2:2 + SIZE] for i in range(3))
    assert np.array_equal(photo, images[0].permute(1, 2, 0)) and np.array_equal(ours, theirs)
    assert len(np.unique(theirs.reshape(-1, 3), axis=0)) > 4            # not one colour
    assert np.array_equal(theirs[::8, ::8].repeat(8, 0).repeat(8, 1), theirs)   # one colour a patch


def test_stage_2_writes_its_picture(chain):
    with Image.open(chain[0] / "two/features.png") as image:
        assert image.size == (2 * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2)  # two photos held out


# ---------------------------------------------------------------------------------------------------------------------
# Both, and the chain of the three

@pytest.mark.parametrize("stage, lr", [(align_attention, 5e-3), (align_features, 2e-3)], ids=("attention", "features"))
def test_loss_goes_down(files, tmp_path, stage, lr):
    call(stage, "--weights", files / "teacher.safetensors", "--data", files / "photos/album0", files / "photos/album1",
         "--size", SIZE, "--steps", 30, "--batch", 8, "--lr", lr, "--out", tmp_path)
    losses, rates = ([row[key] for row in log_of(tmp_path)] for key in ("loss", "lr"))
    assert len(losses) == 30 and sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert max(rates) == pytest.approx(lr, rel=0.1) and rates[0] < 0.5 * lr and rates[-1] < 0.02 * lr   # warm-up and decay


@pytest.mark.parametrize("stage", (align_attention, align_features, finetune), ids=("attention", "features", "finetune"))
def test_a_run_can_be_repeated(files, tmp_path, stage):
    """The same files and seed: the same tensors and losses, bit for bit. Another seed: others."""
    data = files / ("classify" if stage is finetune else "photos")
    name = "0-classify.safetensors" if stage is finetune else "student.safetensors"
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        call(stage, "--weights", files / "teacher.safetensors", "--data", data, *BRIEF, "--seed", seed, "--out", tmp_path / out)
    first, again, other = (read_weights(tmp_path / out / name)[0] for out in "abc")
    assert not moved(first, again) and moved(first, other)
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert log_of(tmp_path / "a") != log_of(tmp_path / "c")


@pytest.mark.parametrize("steps", (1, 2, 9, 10))
@pytest.mark.parametrize("stage", (align_attention, align_features, finetune), ids=("attention", "features", "finetune"))
def test_any_number_of_steps(files, tmp_path, stage, steps):
    """Also those in which the warm-up, a tenth of the schedule, is shorter than a step or just one."""
    call(stage, "--weights", files / "teacher.safetensors", "--data", files / ("classify" if stage is finetune else "photos"),
         "--size", SIZE, "--steps", steps, "--batch", 2, "--out", tmp_path)
    assert len(log_of(tmp_path)) == steps


def test_stages_inherit_from_headers(files, chain):
    """Stage 2 finds its teacher by itself, and each file says what is behind it."""
    out, _, printed = chain
    one, two = header(out / "one/student.safetensors"), header(out / "two/student.safetensors")
    assert one["attention"] == two["attention"] == "linear"
    assert (one["stage"], two["stage"]) == ("attention", "attention+features")
    for facts, folder in ((one, "one"), (two, "two")):
        assert facts["teacher"]["sha256"] == sha256(out / "teacher.safetensors")
        assert (out / folder / facts["teacher"]["file"]).resolve() == (out / "teacher.safetensors").resolve()
        assert facts["training"]["steps"] == 3 and facts["training"]["size"] == SIZE
    assert "inherited" in printed and str(out / "teacher.safetensors") in printed
    assert json.loads((out / "one/report.json").read_text())["stage"] == "attention"
    assert json.loads((out / "two/report.json").read_text())["stage"] == "attention+features"


def test_stage_2_starts_where_stage_1_ended(files, chain, tmp_path):
    """A learning rate of (next to) nothing leaves stage 1's student as it was."""
    call(align_features, "--weights", chain[0] / "one/student.safetensors", "--data", files / "photos", *BRIEF, "--lr", 1e-30, "--out", tmp_path)
    assert not moved(load_vit(chain[0] / "one/student.safetensors").state_dict(), load_vit(tmp_path / "student.safetensors").state_dict())


def test_stage_2_alone_says_so(files, tmp_path):
    call(align_features, "--weights", files / "teacher.safetensors", "--data", files / "photos", *BRIEF, "--out", tmp_path)
    assert header(tmp_path / "student.safetensors")["stage"] == "features"


def test_more_of_stage_2_is_still_both_stages(files, chain, tmp_path):
    call(align_features, "--weights", chain[0] / "two/student.safetensors", "--data", files / "photos", *BRIEF, "--out", tmp_path)
    assert header(tmp_path / "student.safetensors")["stage"] == "attention+features"


def test_teacher_and_student_can_move_together(chain, tmp_path, monkeypatch):
    """The header's path starts at the student's folder, not at the folder where the run was started."""
    shutil.copytree(chain[0], tmp_path / "elsewhere")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    teacher, student, origin = load_pair("../elsewhere/one/student.safetensors")
    assert teacher.attention == "softmax" and student.attention == "linear"
    assert Path(origin["file"]).resolve() == (tmp_path / "elsewhere/teacher.safetensors").resolve()


def test_copied_class_stays_the_same():
    assert inspect.getsource(align_attention.Photos) == inspect.getsource(align_features.Photos)


def test_photos_are_upright_rgb_squares(tmp_path):
    """All of a photo's middle when held out; a random part of it in training."""
    turned = Image.Exif()
    turned[0x0112] = 6                                                  # the camera was held on its side
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[:20] = 200                                                   # the upper half, which belongs to the right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=turned)
    image = align_attention.Photos([tmp_path / "a.jpg"], SIZE, augment=False)[0]
    assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.uint8
    assert image[:, :, :12].float().mean() < 50 < 150 < image[:, :, 20:].float().mean()
    torch.manual_seed(0)
    photos = align_attention.Photos([tmp_path / "a.jpg"], SIZE, augment=True)
    draws = [photos[0] for _ in range(8)]
    assert all(draw.shape == image.shape for draw in draws) and len({draw.numpy().tobytes() for draw in draws}) > 1
    left = {bool(draw[:, :, :8].float().mean() > draw[:, :, -8:].float().mean()) for draw in draws}
    assert left == {True, False}                                        # mirrored, some of them


# ---------------------------------------------------------------------------------------------------------------------
# Half precision

@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stage", ("attention", "features", "classify", "segment", "frozen"))
def test_half_precision_trains_the_same(files, tmp_path, monkeypatch, stage, dtype):
    """Finite losses, tensors that moved, and gradients that are clipped at their true size (unscaled, when float16)."""
    norms, real = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, limit: norms.append(real(params, limit).item()))
    module = {"attention": align_attention, "features": align_features}.get(stage, finetune)
    argv = ["--weights", files / "teacher.safetensors", *BRIEF]
    if module is finetune:
        task = "classify" if stage == "frozen" else stage
        argv += ["--task", task, "--data", files / task, *["--freeze"] * (stage == "frozen")]
    else:
        argv += ["--data", files / "photos"]
    states, losses, first = {}, {}, {}
    for name in ("float32", dtype):
        norms.clear()
        call(module, *argv, "--dtype", name, "--out", tmp_path / name)
        first[name] = list(norms[:2])         # of the first step: two blocks, head and backbone, or two steps
        losses[name] = [row["loss"] for row in log_of(tmp_path / name)]
        states[name] = read_weights(next((tmp_path / name).glob("*.safetensors")))[0]
    assert all(math.isfinite(loss) for loss in losses[dtype]) and len(losses[dtype]) == 3
    assert all(tensor.dtype == torch.float32 for tensor in states[dtype].values())
    # a dozen roundings stand between the images and a loss; a gradient that is still scaled would be 2^16 times too long
    tolerance = 16 * torch.finfo(getattr(torch, dtype)).eps
    assert losses[dtype][0] == pytest.approx(losses["float32"][0], rel=tolerance)
    finite = [(have, want) for have, want in zip(first[dtype], first["float32"]) if math.isfinite(have)]
    assert finite                             # GradScaler starts high: one may have left float16's range, the step is skipped
    for have, want in finite:
        assert have == pytest.approx(want, rel=2 * tolerance)
    start = load_vit(files / "teacher.safetensors").state_dict()
    backbone = {name: tensor for name, tensor in states[dtype].items() if not name.startswith("head.")}
    assert bool(moved(start, backbone)) == (stage != "frozen")
    assert moved(states["float32"], states[dtype])                      # and autocast was on


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_gradients_of_stage_1_are_those_of_float32(dtype):
    """Scaled, taken block by block and unscaled again: wrong by a few roundings, and nothing lost to underflow."""
    teacher, gradients, dtype = random_vit().requires_grad_(False), {}, getattr(torch, dtype)
    images = random_tokens(teacher)[0]
    for kind in (torch.float32, dtype):
        student = linearize(teacher, "linear")
        parameters = sum(align_attention.trained_parameters(student, "qkv"), [])
        scaler = torch.amp.GradScaler("cpu", enabled=kind == torch.float16)
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        align_attention.alignment_step(teacher, student, images, "after", kind, backward=lambda loss: scaler.scale(loss).backward())
        scaler.unscale_(optimizer)
        gradients[kind] = [p.grad for p in parameters]
    for have, want in zip(gradients[dtype], gradients[torch.float32], strict=True):
        assert 0 < ((have - want).norm() / want.norm()).item() < 4 * torch.finfo(dtype).eps


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3

@pytest.mark.parametrize("freeze", (False, True), ids=("tuned", "frozen"))
@pytest.mark.parametrize("task", ("classify", "segment"))
def test_finetune(files, tmp_path, monkeypatch, task, freeze):
    """What moved, what the files say, and that the score belongs to the written checkpoint."""
    started, real = [], finetune.make_head

    def make_head(*args):
        head = real(*args)
        started.append({name: tensor.clone() for name, tensor in head.state_dict().items()})
        return head

    monkeypatch.setattr(finetune, "make_head", make_head)
    printed = call(finetune, "--task", task, "--data", files / task, "--weights", files / "teacher.safetensors", *BRIEF,
                   *["--freeze"] * freeze, "--out", tmp_path, "--seed", 3)
    row, = json.loads((tmp_path / "metrics.json").read_text())
    want = dict(weights=str(files / "teacher.safetensors"), attention="softmax", stage="pretrained", task=task, frozen=freeze, seed=3,
                head={"classify": "Linear", "segment": "Segmenter"}[task], metric={"classify": "top-1", "segment": "mIoU"}[task],
                held_out={"classify": 10, "segment": 5}[task], size=SIZE, steps=3, batch=4)
    assert {key: row[key] for key in want} == want
    assert row["classes"] == {"classify": ["blue", "red"], "segment": ["0", "1"]}[task] and list(row["per_class"]) == row["classes"]
    assert f"{row['score']:.2f}" in printed and 0 <= row["score"] <= 100

    checkpoint = tmp_path / f"0-{task}.safetensors"
    assert Path(row["checkpoint"]) == checkpoint
    tensors, facts = read_weights(checkpoint)
    assert {key: facts[key] for key in ("task", "classes", "size", "frozen")} == {key: row[key] for key in ("task", "classes", "size", "frozen")}
    backbone = load_vit(checkpoint)                                     # a checkpoint is a backbone like any other
    start = load_vit(files / "teacher.safetensors").state_dict()
    assert moved(start, backbone.state_dict()) == (set() if freeze else start.keys())
    head = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("head.")}
    assert moved(started[0], head) == head.keys() and head.keys() == ({"weight", "bias"} if task == "classify" else
                                                                     {"norm.weight", "norm.bias", "classify.weight", "classify.bias"})
    module = real(backbone.arch, task, 2)
    module.load_state_dict(head)
    _, source, _ = finetune.load_data(str(files / task), task)
    batches = torch.utils.data.DataLoader(finetune.Labelled(source, task, SIZE, augment=False), 4)
    score, _, _ = finetune.evaluate(backbone, module, batches, task, False, 2, "cpu", contextlib.nullcontext)
    assert row["score"] == pytest.approx(score, abs=0 if not freeze else 1)   # frozen: its features were kept in float16
    if task == "segment":
        with Image.open(tmp_path / "segment.png") as image:             # photo, truth, prediction of four or five photos
            assert image.size == (4 * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2)


def test_finetune_rows(files, chain, tmp_path):
    """Several of --weights, each in its own row and in order; FILE:linear is swapped and nothing else."""
    folder = chain[0]
    weights = [str(folder / name) for name in ("teacher.safetensors", "teacher.safetensors:linear", "one/student.safetensors", "two/student.safetensors")]
    printed = call(finetune, "--data", files / "classify", "--freeze", *BRIEF, "--weights", *weights, "--out", tmp_path)
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["weights"] for row in rows] == weights
    assert [row["attention"] for row in rows] == ["softmax", "linear", "linear", "linear"]
    assert [row["stage"] for row in rows] == ["pretrained", "none", "attention", "attention+features"]
    assert [Path(row["checkpoint"]).name for row in rows] == [f"{i}-classify.safetensors" for i in range(4)]
    assert [line.split()[-1] for line in printed.splitlines() if " linear " in line or " softmax " in line] == weights
    for row in rows:
        vit = load_vit(row["checkpoint"])
        source = row["weights"].removesuffix(":linear")
        assert vit.attention == row["attention"] and not moved(load_vit(source).state_dict(), vit.state_dict())
    assert {row["weights"] for row in log_of(tmp_path)} == set(weights) and len(log_of(tmp_path)) == 12


def test_finetune_rows_differ_in_nothing_but_the_weights(files, tmp_path):
    """The same seed means the same start of the head and the same crops: twice the same file is twice the same row."""
    same = str(files / "teacher.safetensors")
    call(finetune, "--data", files / "classify", *BRIEF, "--weights", same, f"{same}:softmax", same, "--out", tmp_path)
    first, second, third = (read_weights(tmp_path / f"{i}-classify.safetensors")[0] for i in range(3))
    assert not moved(first, second) and not moved(first, third)


@pytest.mark.parametrize("freeze", (False, True), ids=("tuned", "frozen"))
def test_finetune_starts_each_head_alike(files, tmp_path, monkeypatch, freeze):
    """Rows of a table are compared with each other, so another attention must not mean another head to start from."""
    started, real = [], finetune.make_head

    def make_head(*args):
        head = real(*args)
        started.append({name: tensor.clone() for name, tensor in head.state_dict().items()})
        return head

    monkeypatch.setattr(finetune, "make_head", make_head)
    same = str(files / "teacher.safetensors")
    call(finetune, "--data", files / "classify", *BRIEF, *["--freeze"] * freeze, "--weights", same, f"{same}:linear", "--out", tmp_path)
    assert len(started) == 2 and not moved(*started)


def test_finetune_from_scratch_keeps_only_the_architecture(files, tmp_path):
    file = files / "teacher.safetensors"
    call(finetune, "--data", files / "classify", "--from-scratch", "--weights", file, f"{file}:linear", *BRIEF, "--lr", 1e-30, "--out", tmp_path)
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert [(row["stage"], row["attention"]) for row in rows] == [("scratch", "softmax"), ("scratch", "linear")]
    start = load_vit(file)
    for row in rows:
        vit = load_vit(row["checkpoint"])
        assert vit.arch == start.arch and moved(start.state_dict(), vit.state_dict()) == start.state_dict().keys()


class Scores(torch.nn.Module):
    """A head whose logits are its input."""

    def forward(self, x):
        return x


def one_hot(guess, classes):
    return F.one_hot(torch.as_tensor(guess), classes).float().movedim(-1, 1) * 5


def test_miou_by_hand():
    """255 counts nowhere; a class that neither occurs nor is guessed is left out; one guessed in vain scores 0."""
    truth = torch.tensor([[[0, 0, 1, 255], [0, 1, 1, 255]], [[0, 0, 0, 0], [255, 255, 1, 1]]], dtype=torch.uint8)
    guess = [[[0, 1, 1, 1], [0, 1, 0, 2]], [[0, 0, 0, 2], [1, 1, 1, 1]]]
    # class 0: 5 right, 7 there, 6 guessed -> 5 / 8.  1: 4 right, 5 there, 5 guessed -> 4 / 6.  2: 0 of 1.  3: nowhere
    batches = [(one_hot(guess, 4)[:1], truth[:1]), (one_hot(guess, 4)[1:], truth[1:])]
    score, by_class, first = finetune.evaluate(None, Scores(), batches, "segment", True, 4, "cpu", contextlib.nullcontext)
    assert by_class[:3] == pytest.approx([62.5, 100 * 4 / 6, 0]) and math.isnan(by_class[3])
    assert score == pytest.approx((62.5 + 100 * 4 / 6 + 0) / 3)
    assert first.tolist() == guess[:1]


def test_miou_is_taken_at_the_size_of_the_masks():
    """Logits come on the grid of patches; one patch of a class is as many pixels of it."""
    logits = one_hot([[[0, 1]]], 2)                                     # (1, 2, 1, 2): left 0, right 1
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 4, dtype=torch.uint8)[None]
    score, _, first = finetune.evaluate(None, Scores(), [(logits, truth)], "segment", True, 2, "cpu", contextlib.nullcontext)
    assert score == 100 and torch.equal(first, truth.long())


def test_top_1_by_hand():
    """Of all photos, not the mean of the classes; label 255 is a label like any other."""
    batches = [(one_hot([0, 0, 1, 1], 300), torch.tensor([0, 0, 0, 1])), (one_hot([1, 255], 300), torch.tensor([2, 255]))]
    score, by_class, first = finetune.evaluate(None, Scores(), batches, "classify", True, 300, "cpu", contextlib.nullcontext)
    assert score == pytest.approx(100 * 4 / 6)
    assert by_class[:3] == pytest.approx([100 * 2 / 3, 100, 0]) and by_class[255] == 100 and first.tolist() == [0, 0, 1, 1]


def test_ignored_pixels_have_no_gradient():
    vit, head = random_vit().requires_grad_(False), Scores()
    masks = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    masks[:, 0], masks[1, 1] = finetune.IGNORE, 2
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = finetune.task_loss(vit, head, logits, masks.to(torch.uint8), "segment", True)
    loss.backward()
    counted = masks != finetune.IGNORE
    assert not logits.grad[:, :, 0].any() and logits.grad.abs().sum(1)[counted].all()
    kept = logits.detach().movedim(1, -1)[counted].log_softmax(-1)      # (pixels, K)
    assert loss.item() == pytest.approx(-kept.gather(1, masks[counted][:, None]).mean().item(), rel=1e-5)


def test_a_batch_of_nothing_but_ignored_pixels_is_no_loss():
    """A small crop may hold none else: 0, with a gradient of 0, and not the 0 / 0 of a mean over nothing."""
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    masks = torch.full((1, 4, 4), finetune.IGNORE, dtype=torch.uint8)
    loss = finetune.task_loss(random_vit(), Scores(), logits, masks, "segment", True)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_metrics_are_json_where_a_class_does_not_occur(files, tmp_path):
    """NaN is no JSON. Class 4 of 0 to 5 is in no mask, and this short a training does not guess it."""
    shutil.copytree(files / "segment", tmp_path / "data")
    mask = np.zeros((40, 48), dtype=np.uint8)
    mask[0, 0] = 5
    Image.fromarray(mask).save(tmp_path / "data/train/masks/0.png")
    call(finetune, "--task", "segment", "--data", tmp_path / "data", "--weights", files / "teacher.safetensors", "--size", SIZE,
         "--steps", 20, "--batch", 4, "--lr", 1e-3, "--freeze", "--out", tmp_path / "out")
    row, = json.loads((tmp_path / "out/metrics.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert list(row["per_class"]) == list("012345") and row["per_class"]["4"] is None
    known = [iou for iou in row["per_class"].values() if iou is not None]
    assert row["score"] == pytest.approx(sum(known) / len(known)) and len(known) >= 2


def test_features_are_cls_and_mean_patch_or_the_grid():
    vit = random_vit().eval()
    images = random_tokens(vit)[0]
    tokens = vit(vit.normalize(images))
    both, grid = (finetune.features(vit, images, task) for task in ("classify", "segment"))
    torch.testing.assert_close(both, torch.cat([tokens[:, 0], tokens[:, 2:].mean(1)], 1))
    assert grid.shape == (3, 4, 4, ARCH.width) and torch.equal(grid[:, 1, 2], tokens[:, 2 + 1 * 4 + 2])
    assert finetune.make_head(vit.arch, "classify", 5)(both).shape == (3, 5)
    assert finetune.make_head(vit.arch, "segment", 5)(grid).shape == (3, 5, 4, 4)


def test_masks_follow_their_photos(tmp_path):
    """Cropped, mirrored and squeezed together: a photo that is its own mask stays so. 255 and classes are not blended."""
    pixels = np.zeros((40, 48), dtype=np.uint8)
    pixels[5:25, 6:20], pixels[30:] = 255, 100
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / "a.png")
    source, classes = finetune.pairs(tmp_path)
    assert classes == 101
    torch.manual_seed(0)
    for augment in (False, True, True, True, True):
        image, mask = finetune.Labelled(source, "segment", SIZE, augment)[0]
        assert image.shape == (3, SIZE, SIZE) and mask.shape == (SIZE, SIZE) and type(mask) is type(image) is torch.Tensor
        assert set(mask.unique().tolist()) <= {0, 100, 255}
        assert ((image[0].int() - mask.int()).abs() < 40).float().mean() > 0.85   # but for the edges, which only a photo blends


def test_upright_photo_has_upright_mask(tmp_path):
    """A photo with an orientation in its EXIF is turned when it is read; its mask was drawn on what people see."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    Image.fromarray(np.zeros((48, 40, 3), dtype=np.uint8)).save(tmp_path / "images/a.jpg", exif=turned)   # is seen as 40 x 48
    Image.fromarray(np.zeros((40, 48), dtype=np.uint8)).save(tmp_path / "masks/a.png")
    source, _ = finetune.pairs(tmp_path)
    image, mask = finetune.Labelled(source, "segment", SIZE, augment=False)[0]
    assert image.shape[1:] == mask.shape


def test_predict_labels_as_evaluate_does(files, tmp_path):
    """A line for each photo; the share of right ones is the score of the run that wrote the checkpoint."""
    call(finetune, "--data", files / "classify", "--weights", files / "teacher.safetensors", "--size", SIZE, "--steps", 5,
         "--batch", 4, "--lr", 3e-4, "--out", tmp_path / "run")
    row, = json.loads((tmp_path / "run/metrics.json").read_text())
    printed = call(finetune, "--weights", row["checkpoint"], "--predict", files / "classify/val", "--out", tmp_path / "none")
    lines = [line.split("\t") for line in printed.splitlines()]
    assert [Path(path) for path, _, _ in lines] == sorted((files / "classify/val").rglob("*.jpg"))
    guesses = [label for _, label, _ in lines]
    assert set(guesses) == {"blue", "red"}                              # or the comparison would say little
    right = [Path(path).parent.name == label for path, label, _ in lines]
    assert row["score"] == pytest.approx(100 * sum(right) / len(right))
    assert all(0.5 <= float(share) <= 1 for _, _, share in lines)

    tensors, facts = read_weights(row["checkpoint"])
    vit = load_vit(row["checkpoint"])
    head = finetune.make_head(vit.arch, "classify", 2)
    head.load_state_dict({name[5:]: tensor for name, tensor in tensors.items() if name.startswith("head.")})
    _, source, classes = finetune.load_data(str(files / "classify"), "classify")
    batch = torch.utils.data.DataLoader(finetune.Labelled(source, "classify", SIZE, augment=False), 64)
    _, _, first = finetune.evaluate(vit, head, batch, "classify", False, 2, "cpu", contextlib.nullcontext)
    assert guesses == [classes[i] for i in first]
    assert not (tmp_path / "none").exists()                             # nothing to write but the lines


def test_predict_writes_masks_as_evaluate_does(files, tmp_path):
    """A mask of the photo's own size; of a photo that has the checkpoint's size, exactly the one that was scored."""
    call(finetune, "--task", "segment", "--data", files / "segment", "--weights", files / "teacher.safetensors", "--size", SIZE,
         "--steps", 20, "--batch", 4, "--lr", 1e-3, "--out", tmp_path / "run")
    checkpoint = tmp_path / "run/0-segment.safetensors"
    for part, size in (("train", (48, 40)), ("val", (SIZE, SIZE))):
        call(finetune, "--weights", checkpoint, "--predict", files / "segment" / part, "--out", tmp_path / part)
        names = {path.with_suffix(".png").name for path in (files / "segment" / part / "images").iterdir()}
        written = sorted((tmp_path / part).rglob("*.png"))
        assert {path.relative_to(tmp_path / part) for path in written} == {Path("images", name) for name in names}
        for path in written:
            with Image.open(path) as mask:
                assert (mask.size, mask.mode) == (size, "L")
    tensors, _ = read_weights(checkpoint)
    vit, head = load_vit(checkpoint), finetune.make_head(ARCH, "segment", 2)
    head.load_state_dict({name[5:]: tensor for name, tensor in tensors.items() if name.startswith("head.")})
    _, source, _ = finetune.load_data(str(files / "segment"), "segment")
    batch = torch.utils.data.DataLoader(finetune.Labelled(source, "segment", SIZE, augment=False), 64)
    _, _, first = finetune.evaluate(vit, head, batch, "segment", False, 2, "cpu", contextlib.nullcontext)
    assert first.unique().tolist() == [0, 1]
    assert np.array_equal(first, np.stack([np.asarray(Image.open(path)) for path in written]))


# ---------------------------------------------------------------------------------------------------------------------

def test_import_has_no_side_effects(tmp_path):
    code = "import model, align_attention, align_features, finetune, demo.shapes"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", [])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("attention", ("linear", "hedgehog"))
def test_compiled_steps_equal_eager_ones(attention, dtype):
    """What each stage hands to torch.compile on a GPU, traced whole (fullgraph) here; the kernels are the eager ones."""
    torch._dynamo.reset()
    whole = dict(fullgraph=True, backend="aot_eager")
    teacher, student = random_vit().requires_grad_(False), random_vit(1, attention)
    images, _, _ = random_tokens(teacher)
    masks = torch.randint(0, 3, (len(images), SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    head = finetune.make_head(student.arch, "segment", 3)

    def gradients(align, features, loss, dtype=dtype):
        student.zero_grad()
        losses = align_attention.alignment_step(teacher, student, images, "after", dtype, align, backward=lambda loss: loss.backward())
        total = features(teacher, student, images, align_features.mse, dtype) + loss(student, head, images, masks, "segment", False, dtype)
        total.backward()
        return [losses, total.detach(), *(p.grad.clone() for p in student.parameters())]

    steps = (align_attention.block_alignment, align_features.feature_alignment, finetune.task_loss)
    truth, eager = gradients(*steps, dtype=torch.float32), gradients(*steps)
    for exact, found, compiled in zip(truth, eager, gradients(*(torch.compile(step, **whole) for step in steps))):
        assert torch.allclose(found, compiled, rtol=1e-4, atol=1e-5 * found.abs().max()) or (
            dtype != torch.float32 and (compiled - exact).norm() <= 2 * (found - exact).norm())     # rounded elsewhere, not more


def test_a_compiled_backward_is_not_under_autocast():
    """It would take the products that linear attention does in float32, for float16's range, in float16."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    teacher, student = random_vit().requires_grad_(False), random_vit(1, "linear")
    images, _, _ = random_tokens(teacher)
    products = []

    def note(graph, inputs):
        products.extend(node.meta["val"].dtype for node in graph.graph.nodes if node.target == torch.ops.aten.bmm.default)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=note)
    align = torch.compile(align_attention.block_alignment, fullgraph=True, backend=backend)
    align_attention.alignment_step(teacher, student, images, "after", torch.float16, align, backward=torch.Tensor.backward)
    assert set(products) == {torch.float32}
