"""Stages 1 and 2, and what stage 3 shares with them, on tiny random ViTs and photos.

Bad input is test_inputs.py's, stopping test_runs.py's. Operators and losses are those registered.
"""
import argparse
import math

import pytest
import torch
import torch.nn as nn
from torchvision.transforms import v2

import align_attention
import align_features
import finetune
import model
from align_attention import attention_maps, block_alignment, first_tokens, relative_error
from align_features import LOSS, RIDGES, compare, feature_alignment, whitening
from conftest import (ARCH, SIZE, STAGES, brief, call, log_of, moved, random_images, random_vit,
                      report_of, same, seeded, student_of)
from model import linearize, load_vit, read_weights
from support.photos import loaders, read_image, unlabelled

FIRST = pytest.mark.parametrize("stage", STAGES[:2])
FROZEN = "--lr", 1e-30                                  # a rate at which no weight moves
CPU = "cpu", torch.float32


def losses(teacher, student, images):
    """Stage 1's loss of each block, whose input is the teacher's stream."""
    (x, grid), found = first_tokens(teacher, images, torch.float32), []
    for theirs, ours in zip(teacher.blocks, student.blocks):
        _, error, scale = block_alignment(theirs, ours, x, grid)
        x = theirs(x, grid)
        found.append(error / scale)
    return torch.stack(found)


def parts_of(out):
    """The draws of a run's training part, and its held-out batches, as its report says."""
    args = argparse.Namespace(**report_of(out)["arguments"])
    train, held_out = loaders(args, *unlabelled(args.data), 0)
    return train.dataset, held_out


def tokens_of(vit, images):
    with torch.no_grad():
        return vit(vit.normalize(images))


def rows_of(out, key):
    """What the log says of this, step by step."""
    return [row[key] for row in log_of(out) if key in row]


# ---- Stage 1

def test_the_loss_is_the_error_after_the_projection_over_that_of_uniform_attention():
    """Written out in float64. The prefix together has PREFIX_WEIGHT of the patches' weight. Of a
    single token, which is uniform, the loss is finite."""
    teacher, student = random_vit().double(), random_vit(1, "linear").double()
    x, grid = first_tokens(teacher, random_images(), torch.float64)
    theirs, ours, h = teacher.blocks[0].attn, student.blocks[0].attn, teacher.blocks[0].norm1(x)
    q, k, v = theirs.project(h)
    target = theirs.proj(model.softmax_reference(q, k, v).transpose(1, 2).flatten(2))
    uniform = theirs.proj(v.mean(2).flatten(1))[:, None]
    output = ours.proj(ours.operator(*ours.project(h), grid).transpose(1, 2).flatten(2))
    weight = torch.ones(18, dtype=torch.float64)        # two tokens of prefix, 4 x 4 patches
    weight[:2] = align_attention.PREFIX_WEIGHT * 16 / 2
    _, error, scale = block_alignment(teacher.blocks[0], student.blocks[0], x, grid, torch.float64)
    for found, part in ((error, output), (scale, uniform)):
        wanted = ((part - target).square().sum((0, 2)) * weight).sum()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    _, error, scale = block_alignment(teacher.blocks[0], student.blocks[0], x[:, :1], (1, 1))
    assert scale > 0 and (error / scale).isfinite()


def test_blocks_see_the_teachers_stream_and_backward_by_block_is_that_of_the_sum(
        files, chain, tmp_path, monkeypatch):
    graded, clip, file = [], nn.utils.clip_grad_norm_, chain / "one/student.safetensors"
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, limit: (
        graded.append([p.grad.clone() for p in parameters]), clip(parameters, limit)))
    brief(align_attention, files, tmp_path, "--student", file, "--steps", 1)
    teacher, student = load_vit(files / "teacher.safetensors").requires_grad_(False), load_vit(file)
    by_block = align_attention.trained_parameters(student, ["qkv", "operator", "proj"])
    draws = parts_of(tmp_path)[0]
    total = losses(teacher, student, torch.stack([draws[i] for i in range(4)])).sum()
    assert [len(part) for part in graded] == [len(part) for part in by_block]   # clipped by block
    for have, true in zip(sum(graded, []), torch.autograd.grad(total, sum(by_block, []))):
        torch.testing.assert_close(have, true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attention, train", [
    ("linear", []), ("linear_conv", []), ("hedgehog", []), ("linear", ["qkv"]),
    ("linear_conv", ["operator", "proj"])])
def test_stage_1_moves_what_train_names_and_nothing_else(files, tmp_path, attention, train):
    flags = ["--train", *train] if train else []
    brief(align_attention, files, tmp_path, "--attention", attention, "--lr", 1e-3, *flags)
    start = linearize(load_vit(files / "teacher.safetensors"), attention)
    align_attention.exponential_start(start)
    wanted = {name for name, _ in start.named_parameters()
              if ".attn." in name and name.split(".")[3] in (train or align_attention.GROUPS)}
    assert moved(start.state_dict(), student_of(tmp_path).state_dict()) == wanted


def test_a_fresh_student_starts_lower_and_a_trained_one_where_it_was(files, tmp_path):
    """Biases of queries and keys, by 4; the report's "before" is without that, and the same bits
    for "linear_conv", whose convolution starts at zero, and for "linear"."""
    out, flags = tmp_path / "one", ["--train", "qkv", *FROZEN]
    brief(align_attention, files, out, "--attention", "linear_conv", *flags)
    teacher = load_vit(files / "teacher.safetensors")
    swapped, linear = linearize(teacher, "linear_conv"), linearize(teacher, "linear")
    assert report_of(out)["before"] == relative_error(teacher, linear, parts_of(out)[1], *CPU)
    for block in swapped.blocks:
        block.attn.qkv.bias.data[:2 * ARCH.width] -= 4
    assert same(swapped, student_of(out))
    student = out / "student.safetensors"
    brief(align_attention, files, tmp_path / "two", "--student", student, *flags)
    assert same(swapped, student_of(tmp_path / "two"))
    align_attention.exponential_start(random_vit(qkv_bias=False))       # DINOv3: nothing to do


@FIRST
def test_a_run_that_goes_on_knows_how_it_began(files, chain, tmp_path, monkeypatch, stage):
    """The teacher, too, is as it began: read again, it gives the same report."""
    folder = chain / ("one" if stage is align_attention else "two")
    flags = ["--student", chain / "one/student.safetensors"] if stage is align_features else []
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(stage, "save_vit", lambda *args, **facts: 1 / 0)
        brief(stage, files, tmp_path, *flags)
    assert "goes on from step 3 of 3" in brief(stage, files, tmp_path, *flags)
    assert same(student_of(folder), student_of(tmp_path)) and [*tmp_path.glob("*.png")]
    assert all(report_of(folder).get(key) == report_of(tmp_path).get(key)
               for key in ("before", "after", "constant", "ridge"))


def test_the_report_of_stage_1_is_of_the_written_student(files, chain):
    out, teacher = chain / "one", load_vit(files / "teacher.safetensors")
    middle = v2.Compose([v2.Resize(SIZE, interpolation=3), v2.CenterCrop(SIZE)])
    held_out = unlabelled([str(files / "photos")])[1]
    images = torch.stack([middle(read_image(path, SIZE)) for path in held_out])
    wanted = losses(teacher, student_of(out), images).sqrt().tolist()
    assert report_of(out)["after"] == pytest.approx(wanted, rel=1e-5)
    assert report_of(out)["after"] != report_of(out)["before"]
    blocks = [sum(blocks) / 2 for blocks in rows_of(out, "blocks")]
    assert len(blocks) == 3 and rows_of(out, "loss") == pytest.approx(blocks)
    assert rows_of(out, "held_out")[-1] == pytest.approx(sum(wanted) / 2, rel=1e-5)


def test_attention_maps_are_rows_of_the_n_by_n_weights():
    """On the teacher's stream, in a late block, mean over heads."""
    images, queries, teacher = random_images(2), [0, 6, 15], random_vit(depth=4)
    vits = [teacher, random_vit(1, "linear", depth=4), random_vit(1, "linear_conv", depth=4)]
    maps = attention_maps(teacher, vits, images, queries)
    x, grid = first_tokens(teacher, images, torch.float32)
    for block in teacher.blocks[:3]:
        x = block(x, grid)
    for vit, found in zip(vits, maps, strict=True):
        q, k, _ = vit.blocks[3].attn.project(teacher.blocks[3].norm1(x))
        slow = model.softmax_reference if vit is teacher else model.linear_reference
        weights = slow(q, k, torch.eye(18).expand(2, 2, -1, -1)).mean(1)    # (B, N, N)
        weights = weights[:, 2:, 2:][:, queries].transpose(0, 1)
        torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-6)


# ---- Stage 2

def test_the_losses_by_hand_are_of_all_final_tokens():
    have, want = torch.tensor([[[1., 2.], [3., 4.]]]), torch.tensor([[[1., 4.], [0., 4.]]])
    assert LOSS["mse"](have, want, None).item() == pytest.approx((4 + 9) / 4)
    whiten = torch.tensor([[2., 1.], [1., 3.]])         # (0, -2) -> (-2, -6), (3, 0) -> (6, 3)
    assert LOSS["whitened"](have, want, whiten).item() == pytest.approx((4 + 36 + 36 + 9) / 4)
    seen, teacher, student = [], random_vit(), random_vit(1, "linear")
    feature_alignment(teacher, student, random_images(), lambda *both: seen.extend(both) or both[0])
    for vit, tokens in zip((student, teacher), seen, strict=True):
        torch.testing.assert_close(tokens.detach(), tokens_of(vit, random_images()))
        assert tokens.requires_grad == (vit is student)


@pytest.mark.parametrize("loss", LOSS)
def test_stage_2_trains_every_weight_by_its_loss(files, chain, tmp_path, monkeypatch, loss):
    """From where the student was. The log ends with what the report says."""
    file, real = chain / "one/student.safetensors", LOSS[loss]
    monkeypatch.setitem(LOSS, loss, lambda *args, **more: real(*args, **more) + 1000)
    flags, start = ["--student", file, "--loss", loss], load_vit(file).state_dict()
    brief(align_features, files, tmp_path, *flags)
    assert moved(start, student_of(tmp_path).state_dict()) == start.keys()
    assert rows_of(tmp_path, "loss")[0] > 1000
    last = rows_of(tmp_path, "held_out")[-1]            # the whole held-out part is one batch
    assert last == pytest.approx(report_of(tmp_path)["after"]["whitened_error"])
    brief(align_features, files, tmp_path, *flags, *FROZEN)
    assert not moved(start, student_of(tmp_path).state_dict())


def test_whitening_is_the_root_of_the_inverse_covariance_and_ridge_with_mean_square_1():
    """The ridge of few photos is larger than that of many."""
    teacher, images = random_vit(), random_images(40)
    found = whitening(teacher, images, 30, *CPU)    # of the first 30
    tokens, one = tokens_of(teacher, images[:30]).double(), torch.eye(ARCH.width).double()
    cov, whiten = tokens.flatten(0, 1).T.cov(correction=0), found["whiten"].double()
    both = whiten @ (cov + found["ridge"] * cov.diagonal().mean() * one) @ whiten
    torch.testing.assert_close(both, both[0, 0] * one, rtol=0, atol=1e-3)
    assert (whiten @ cov @ whiten).diagonal().mean().item() == pytest.approx(1, rel=1e-4)
    patch = tokens[:, 2:].mean((0, 1)).expand(16, -1)
    constant = torch.cat([tokens[:, :2].mean(0), patch])
    torch.testing.assert_close(found["constant"].double(), constant, rtol=1e-4, atol=1e-5)
    many = whitening(teacher, random_images(400), 400, *CPU)
    assert found["ridge"] > many["ridge"] == RIDGES[0]


def test_compare_by_hand():
    """Cosines of CLS and patches (registers are neither); errors over the constant's."""
    teacher, images = random_vit().eval(), random_images(4)
    whiten, want = torch.eye(ARCH.width) * seeded(ARCH.width).exp(), tokens_of(teacher, images)
    constant, noise = seeded(18, ARCH.width), 0.1 * seeded(*want.shape)

    def measure(tokens):
        return list(compare(teacher, lambda _: tokens, [images], whiten, constant, *CPU).values())

    assert measure(want) == pytest.approx([1, 1, 0, 0], abs=1e-6)
    ratio = (noise.norm() / (want - constant).norm()).item()
    white = ((noise @ whiten).norm() / ((want - constant) @ whiten).norm()).item()
    assert measure(want + noise)[2:] == pytest.approx([ratio, white], rel=1e-4)
    for token, cosines in {0: [-1, 1], 1: [1, 1], 2: [1, 1 - 2 / 16]}.items():
        turned = want.index_copy(1, torch.tensor([token]), -want[:, [token]])
        assert measure(turned)[:2] == pytest.approx(cosines, abs=1e-4)
    bare = random_vit(cls=False, cls_position=False).eval()
    assert compare(bare, bare, [images], whiten, constant[0], *CPU)["cls_cosine"] is None


def test_recompute_gives_the_same_bits(files, chain, tmp_path, monkeypatch):
    calls, real = [], model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *a, **b: calls.append(a) or real(*a, **b))
    student = chain / "one/student.safetensors"
    brief(align_features, files, tmp_path, "--student", student, "--recompute")
    assert len(calls) == 3 * ARCH.depth
    assert same(student_of(tmp_path), student_of(chain / "two"))


# ---- Both, and all three

@FIRST
def test_the_loss_goes_down(files, tmp_path, stage):
    """On two folders, one photo of each held out; the rate goes up, and then down. The operator
    learns at the size of its run."""
    said = brief(stage, files, tmp_path, "--data", files / "photos/album0", files / "photos/album1",
                 "--steps", 30, "--batch-size", 8, "--lr", 5e-3, "--size", 16)
    found, rates = rows_of(tmp_path, "loss"), rows_of(tmp_path, "lr")
    assert "on 6 images" in said and sum(found[-5:]) < 0.8 * sum(found[:5])
    assert rates[0] < max(rates) <= 5e-3 and rates[-1] < 0.1 * max(rates)
    assert student_of(tmp_path).arch.aligned == 2


def trained(stage, files, out, *flags):
    """Two steps of a stage from its teacher; to segment in stage 3 -> the tensors it writes."""
    own = {align_attention: ["--attention", "linear_conv"],
           align_features: ["--attention", "hedgehog"],
           finetune: ["--task", "segment", "--data", files / "segment", "--from-scratch"]}
    brief(stage, files, out, *own[stage], "--steps", 2, *flags)
    return read_weights(next(out.glob("*.safetensors")))[0]


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_equals_eager(files, tmp_path, monkeypatch, stage):
    """Traced whole (fullgraph), forward and backward, with a resized position table."""
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **more: (
        compiled.append(function.__name__), real(function, **more, backend="aot_eager"))[1])
    eager = trained(stage, files, tmp_path / "eager", "--no-compile", "--size", 40)
    found = trained(stage, files, tmp_path / "compiled", "--compile", "--size", 40)
    assert {*compiled} & {"block_alignment", "feature_alignment", "task_loss"}
    for name in eager:
        torch.testing.assert_close(found[name], eager[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_float16_trains_float32_weights_by_unscaled_gradients(files, tmp_path, monkeypatch, stage):
    norms, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_",
                        lambda params, limit: norms.append(clip(params, limit).item()))
    trained(stage, files, tmp_path / "whole")
    tensors = trained(stage, files, tmp_path / "half", "--dtype", "float16")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    pairs = [pair for pair in zip(norms[:2], norms[len(norms) // 2:]) if math.isfinite(pair[1])]
    assert pairs                        # GradScaler starts high: some leave float16's range
    assert all(half == pytest.approx(whole, rel=0.05) for whole, half in pairs)
    whole, half = (rows_of(tmp_path / out, "loss")[0] for out in ("whole", "half"))
    assert half == pytest.approx(whole, rel=0.02) and half != whole


def test_stage_1_reaches_a_cosine_of_085_in_80_steps_on_real_weights(shared, tmp_path):
    """CLS and patches, on photos it was not trained on; and the loss does not rise on its way."""
    teacher = f"vit_small_patch14_dinov2={shared / 'weights/vits14_saliency.safetensors'}"
    for part, every in (("train", 7), ("val", 31)):
        (tmp_path / "data" / part).mkdir(parents=True)
        for path in sorted((shared / "data/imagenette160" / part).rglob("*.*"))[::every]:
            (tmp_path / "data" / part / path.name).symlink_to(path)
    call(align_attention, "--teacher", teacher, "--data", tmp_path / "data", "--attention",
         "linear_conv", "--size", 56, "--steps", 80, "--every", 80, "--batch-size", 8, "--dtype",
         "float32", "--out", tmp_path / "out")
    found = compare(load_vit(teacher), student_of(tmp_path / "out"), parts_of(tmp_path / "out")[1],
                    torch.eye(384), torch.zeros(17, 384), *CPU)
    assert found["cls_cosine"] >= 0.85 and found["patch_cosine"] >= 0.85
    rows = rows_of(tmp_path / "out", "loss")
    assert max(sum(rows[i:i + 5]) / 5 for i in range(76)) < 1.1 * rows[0]
