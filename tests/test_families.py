"""Pretrained ViTs by name: the same tokens as timm's, the same facts as timm's list, and files that cannot be mistaken.

timm is needed for the comparisons alone; without it they are skipped. No network: downloads come from a local server.
"""
import contextlib
import hashlib
import http.server
import io
import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import align_attention
import align_features
import finetune
import model
from conftest import error, randomise, refusal, same
from model import (ATTENTION, FAMILIES, KNOWN, Architecture, InputError, Known, ViT, elu_plus_one, linear_attention, linearize, load_pair,
                   load_vit, rotate, save_vit, skeleton)

try:
    import timm
except ImportError:
    timm = None

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted({known.name for known in KNOWN.values()} - {"demo"})     # with tag
MODELS = list(dict.fromkeys(name.split(".")[0] for name in NAMES))      # without
TINY = Architecture(width=64, depth=2, heads=2, hidden=96, patch=8, grid=(4, 4))
needs_timm = pytest.mark.skipif(timm is None, reason="comparison with timm: pip install timm")


def images_of(height, width, n=1):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(height))


def know(monkeypatch, name="tiny", arch=TINY, tag="test"):
    for key in (name, f"{name}.{tag}"):
        monkeypatch.setitem(KNOWN, key, Known(arch, f"{name}.{tag}", "mit"))


# ---------------------------------------------------------------------------------------------------------------------
# Against timm

def timm_and_ours(name, tmp_path, monkeypatch, **more):
    """timm's model with random weights, and ours of that name, loaded from its file."""
    other = randomise(timm.create_model(name, pretrained=False, dynamic_img_size=True, **more))
    save_file(other.state_dict(), tmp_path / "timm.safetensors")
    know(monkeypatch, name, replace(KNOWN[name].arch, **more))
    return other, load_vit(name, weights=tmp_path / "timm.safetensors")


def tokens_agree(other, vit, sizes):
    for height, width in sizes:
        images = images_of(height, width)
        with torch.no_grad():
            found, truth = vit(images), other.forward_features(images)
        assert found.shape == truth.shape and error(found, truth) <= 1e-5, (height, width)


@needs_timm
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_timms(name, tmp_path, monkeypatch):
    """Two blocks of the real width, at native size and two others, one not square (DINOv2's own rule differs off the native size)."""
    other, vit = timm_and_ours(name, tmp_path, monkeypatch, depth=2)
    patch = vit.arch.patch
    others = [] if vit.arch.position == "dinov2" else [(9 * patch, 9 * patch), (5 * patch, 11 * patch)]
    tokens_agree(other, vit, [vit.arch.pixels, *others])


@needs_timm
@pytest.mark.parametrize("name", ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3",
                                  "vit_base_patch32_clip_quickgelu_224", "vit_base_patch16_siglip_224", "vit_tiny_patch16_224",
                                  "deit3_small_patch16_224"))
def test_tokens_are_timms_at_full_depth(name, tmp_path, monkeypatch):
    other, vit = timm_and_ours(name, tmp_path, monkeypatch)
    tokens_agree(other, vit, [vit.arch.pixels])


@needs_timm
@pytest.mark.parametrize("name", [name for name in MODELS if "clip" in name])
def test_quickgelu_is_where_timm_has_it(name, tmp_path, monkeypatch):
    """And the two differ by far more than the tests above allow."""
    other, vit = timm_and_ours(name, tmp_path, monkeypatch, depth=2)
    for block in vit.blocks:
        block.mlp.act = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[block.mlp.act]
    images = images_of(*vit.arch.pixels)
    with torch.no_grad():
        assert error(vit(images), other.forward_features(images)) > 1e-3


@needs_timm
@pytest.mark.parametrize("name", NAMES)
def test_facts_are_timms(name):
    known, cfg = KNOWN[name], timm.get_pretrained_cfg(name)
    assert name in timm.list_pretrained() and f"timm/{known.repository}" == cfg.hf_hub_id
    arch = known.arch
    assert (tuple(cfg.mean), tuple(cfg.std), cfg.interpolation) == (arch.mean, arch.std, arch.interpolation)
    assert cfg.input_size[1:] == arch.pixels
    assert known.licence == (cfg.license or "apache-2.0")


@needs_timm
@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_timms(name):
    with torch.device("meta"):
        other = timm.create_model(name, pretrained=False)
    arch = KNOWN[name].arch
    theirs = {key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): tensor.shape for key, tensor in other.state_dict().items()
              if not key.startswith(("head", "fc_norm", "attn_pool"))}
    assert theirs == {key: tensor.shape for key, tensor in skeleton(arch).state_dict().items()}
    assert {module.eps for key, module in other.named_modules() if isinstance(module, torch.nn.LayerNorm)
            and not key.startswith(("fc_norm", "attn_pool"))} == {arch.eps}
    assert other.blocks[0].attn.num_heads == arch.heads


def test_a_name_without_tag_is_the_first_of_its_row():
    for template, sizes, tags, pixels, has in reversed(FAMILIES):
        for size in sizes.split():
            name = template.format(size)
            first = next(row[2].split()[0] for row in FAMILIES if name in (row[0].format(s) for s in row[1].split()))
            assert KNOWN[name].name == f"{name}.{first}"


def test_the_families_of_the_paper_are_there():
    for name in ("vit_large_patch14_dinov2", "vit_large_patch14_clip_quickgelu_224.openai", "vit_large_patch16_siglip_384",
                 "vit_large_patch16_224.augreg_in21k_ft_in1k", "vit_base_patch16_clip_224.laion2b", "vit_large_patch16_dinov3.lvd1689m",
                 "deit_tiny_patch16_224", "deit3_large_patch16_384", "vit_base_patch32_clip_quickgelu_224"):
        assert name in KNOWN


# ---------------------------------------------------------------------------------------------------------------------
# Our student inside timm

def inside_timm(other, grid):
    """Replace the attention of every timm block by timm's own projections and our operator, rotary positions included."""
    def forward(self, x, *args, **kwargs):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if grid:
            q, k = rotate(q, grid), rotate(k, grid)
        return self.proj(linear_attention(q, k, v).transpose(1, 2).flatten(2))

    for block in other.blocks:
        block.attn.forward = forward.__get__(block.attn)


@needs_timm
@pytest.mark.parametrize("name", ("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_tiny_patch16_224",
                                  "vit_base_patch32_clip_quickgelu_224", "vit_base_patch16_siglip_224", "deit3_small_patch16_224"))
def test_our_student_runs_inside_timm(name, tmp_path, monkeypatch):
    """Plain linear attention adds no tensor: strict loading, and our tokens from timm's code."""
    known = KNOWN[name]
    student = linearize(randomise(ViT(replace(known.arch, depth=2))))
    save_vit(student, tmp_path / "student.safetensors")
    other = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", depth=2).eval()
    other.load_state_dict(load_file(tmp_path / "student.safetensors"), strict=True)
    inside_timm(other, known.arch.grid if known.arch.position == "rotary" else None)
    tokens_agree(other, student, [known.arch.pixels])
    assert same(load_vit(tmp_path / "student.safetensors"), student)


@needs_timm
def test_the_example_of_readme(tmp_path, monkeypatch):
    example, = (code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "import timm" in code)
    student = linearize(randomise(ViT(KNOWN["vit_small_patch14_dinov2"].arch)))
    save_vit(student, tmp_path / "runs/features/student.safetensors")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(example, scope)
    tokens_agree(scope["vit"], student, [(518, 518)])


# ---------------------------------------------------------------------------------------------------------------------
# Files: official layouts, names and shapes

def test_official_dinov2_with_registers_adds_clss_position(tmp_path, monkeypatch):
    """Its files hold register_tokens, and a position for CLS, which timm's have added to CLS already."""
    know(monkeypatch, arch=replace(TINY, registers=4, layerscale=True, cls_position=False))
    official = randomise(ViT(replace(TINY, registers=4, layerscale=True, cls_position=True)))
    tensors = official.state_dict() | {"mask_token": torch.ones(1, 64)}
    tensors["register_tokens"] = tensors.pop("reg_token")
    torch.save(tensors, tmp_path / "official.pth")
    for spec in (tmp_path / "official.pth", f"tiny={tmp_path / 'official.pth'}"):
        vit = load_vit(spec)
        assert not vit.arch.cls_position
        for height, width in ((32, 32), (24, 48)):
            assert error(vit(images_of(height, width)), official(images_of(height, width))) <= 1e-6


@pytest.mark.parametrize("wrap", (None, "model", "teacher", "state_dict"))      # DINO and DINOv2, DeiT, and others
def test_official_pth_files(tmp_path, monkeypatch, capsys, wrap):
    know(monkeypatch, arch=replace(TINY, layerscale=True, position="dinov2"))
    vit = randomise(ViT(KNOWN["tiny"].arch))
    tensors = vit.state_dict() | {"mask_token": torch.ones(1, 64), "head.weight": torch.ones(9, 64), "head.bias": torch.ones(9)}
    torch.save({wrap: tensors, "epoch": 3} if wrap else tensors, tmp_path / "a.pth")
    for found in (load_vit(tmp_path / "a.pth"), load_vit("tiny", weights=tmp_path / "a.pth")):
        assert same(found, vit) and found.arch == KNOWN["tiny"].arch
    assert "skipped on purpose: mask_token, head.weight, head.bias" in capsys.readouterr().out


def test_tensors_of_other_tasks_are_skipped_and_named(tmp_path, monkeypatch, capsys):
    """SigLIP's pooling, AugReg's head and the norm before it; a student's own head needs no word."""
    know(monkeypatch)
    vit = randomise(ViT(TINY))
    aside = {name: torch.ones(3) for name in ("attn_pool.latent", "attn_pool.q.weight", "fc_norm.weight", "head.bias", "head_dist.weight")}
    save_file(vit.state_dict() | aside, tmp_path / "a.safetensors")
    assert same(load_vit("tiny", weights=tmp_path / "a.safetensors"), vit)
    said, = capsys.readouterr().out.splitlines()
    assert sorted(said.split("skipped on purpose: ")[1].split(", ")) == sorted(aside)
    save_vit(vit, tmp_path / "ours.safetensors", head=torch.nn.Linear(64, 3))
    assert same(load_vit(tmp_path / "ours.safetensors"), vit) and not capsys.readouterr().out


@pytest.mark.parametrize("name", ("vit_small_patch8_224.dino", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"))
def test_shapes_that_only_one_architecture_has_are_enough(tmp_path, name):
    tensors = {key: torch.zeros(tensor.shape, dtype=torch.float16) for key, tensor in skeleton(KNOWN[name].arch).state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert load_vit(tmp_path / "a.safetensors").arch == KNOWN[name].arch


@pytest.mark.parametrize("size, more", (("tiny", ()), ("small", ("dino",))))
def test_shapes_that_several_have_are_refused_with_their_names(tmp_path, size, more):
    """A plain ViT-Ti/16 or ViT-S/16: AugReg's pixels are not DeiT's and DINO's."""
    path, arch = tmp_path / "a.safetensors", KNOWN[f"deit_{size}_patch16_224"].arch
    save_file({key: torch.zeros(tensor.shape, dtype=torch.float16) for key, tensor in skeleton(arch).state_dict().items()}, path)
    message = refusal(load_vit, path)
    named = set(message.split(" with one of ")[1].split(", "))
    assert named == {f"deit_{size}_patch16_224.fb_in1k"} | {
        f"vit_{size}_patch16_224.{tag}" for tag in ("augreg_in21k_ft_in1k", "augreg_in21k", *more)}
    assert f"NAME={path}" in message
    for name in named:
        assert load_vit(f"{name}={path}").arch == load_vit(name, weights=path).arch == KNOWN[name].arch


def test_names_of_one_architecture_are_no_doubt(tmp_path, monkeypatch):
    know(monkeypatch, "tiny")
    know(monkeypatch, "same")
    save_file(randomise(ViT(TINY)).state_dict(), tmp_path / "a.safetensors")
    assert load_vit(tmp_path / "a.safetensors").arch == TINY
    know(monkeypatch, "other", replace(TINY, eps=1e-5))
    message = refusal(load_vit, tmp_path / "a.safetensors")
    assert all(f"{name}.test" in message for name in ("tiny", "same", "other"))


def test_a_file_that_says_otherwise_than_its_name_is_refused(tmp_path, monkeypatch):
    know(monkeypatch)
    know(monkeypatch, "quick", replace(TINY, act="quick_gelu"))
    save_vit(ViT(TINY), tmp_path / "a.safetensors")
    assert load_vit(f"tiny={tmp_path / 'a.safetensors'}").arch == TINY
    assert "a.safetensors says that it is" in refusal(load_vit, f"quick={tmp_path / 'a.safetensors'}")


def test_a_name_whose_file_does_not_fit_or_is_missing(tmp_path, monkeypatch):
    know(monkeypatch)
    save_file(ViT(replace(TINY, hidden=128)).state_dict(), tmp_path / "a.safetensors")
    assert "mlp.fc1.weight (128, 64) instead of (96, 64)" in refusal(load_vit, f"tiny={tmp_path / 'a.safetensors'}")
    assert "none.pth" in refusal(load_vit, f"tiny={tmp_path / 'none.pth'}")
    assert "tinny=" in refusal(load_vit, f"tinny={tmp_path / 'a.safetensors'}")


def test_a_pair_by_name_and_file(tmp_path, monkeypatch):
    """The student's header names the file, and the next stage needs no name: it has the student's architecture."""
    know(monkeypatch)
    know(monkeypatch, "other", replace(TINY, eps=1e-5))                 # so that the file alone would be refused
    path, vit = tmp_path / "a.safetensors", randomise(ViT(TINY))
    save_file(vit.state_dict(), path)
    teacher, student, origin = load_pair(f"tiny={path}")
    assert same(teacher, vit) and same(student, vit) and teacher.arch == student.arch == TINY
    assert origin == {"file": str(path), "sha256": model.sha256(path)}
    save_vit(student, tmp_path / "one/student.safetensors", teacher=origin)
    teacher, again, _ = load_pair(tmp_path / "one/student.safetensors")
    assert same(teacher, vit) and same(again, student)
    assert load_pair(tmp_path / "one/student.safetensors", teacher=f"tiny={path}")[2] == origin


def test_weights_trained_with_quickgelu_in_a_gelu_model_are_announced(monkeypatch, capsys):
    monkeypatch.setattr(model, "download", lambda known: Path(known.name))
    for name in NAMES:
        model.resolve(name)
        said = capsys.readouterr().out
        assert ("QuickGELU" in said) == (name.endswith("clip_224.openai"))
    model.resolve("vit_base_patch16_clip_224.openai")
    assert re.search(r"vit_base_patch16_clip_quickgelu_224.openai is exact", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------------
# Every family through linearize and the stages

SHRUNK = list(dict.fromkeys(replace(known.arch, width=32, depth=2, heads=2, hidden=48, patch=8, grid=(4, 4)) for known in KNOWN.values()))
shrunk = pytest.mark.parametrize("arch", SHRUNK, ids=lambda arch: "-".join(
    str(value) for field, value in vars(arch).items() if value != getattr(TINY, field) and field not in ("width", "hidden", "mean", "std")) or "plain")


def call(stage, *argv):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        stage.main([str(word) for word in argv])
    return out.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(4):
            image = Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8))
            (folder / part / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            image.save(folder / part / "ab"[i % 2] / f"{i}.png")
    return folder


@shrunk
@pytest.mark.parametrize("attention", ("linear", "hedgehog"))
def test_every_family_goes_through_the_stages(arch, attention, tmp_path, monkeypatch, photos):
    """From a file without our header, named; at its native size; to a checkpoint that loads again bit for bit."""
    know(monkeypatch, arch=arch)
    teacher = randomise(ViT(arch))
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    brief = ("--steps", 1, "--batch", 2, "--data", photos)
    call(align_attention, "--weights", f"tiny={tmp_path / 'teacher.safetensors'}", "--attention", attention, *brief, "--out", tmp_path / "one")
    call(align_features, "--weights", tmp_path / "one/student.safetensors", *brief, "--out", tmp_path / "two")
    call(finetune, "--weights", tmp_path / "two/student.safetensors", *brief, "--out", tmp_path / "three")
    one, two = (load_vit(tmp_path / f"{stage}/student.safetensors") for stage in ("one", "two"))
    assert (one.arch, one.attention) == (two.arch, two.attention) == (arch, attention)
    assert one.facts["training"]["size"] == 32
    teacher_qkv = {name: tensor for name, tensor in teacher.state_dict().items() if "qkv" in name}
    changed = {name for name, tensor in teacher.state_dict().items() if not torch.equal(tensor, one.state_dict()[name])}
    assert changed == set(teacher_qkv)                                  # stage 1 trains these and nothing else
    for path in tmp_path.glob("*/*.safetensors"):
        vit = load_vit(path)
        save_vit(vit, tmp_path / "again.safetensors")
        assert same(load_vit(tmp_path / "again.safetensors"), vit) and vit.arch == arch
    with torch.no_grad():
        for height, width in ((32, 32), (16, 48)):
            tokens = two(images_of(height, width))
            assert tokens.shape == (1, arch.prefix + height * width // 64, 32) and tokens.isfinite().all()


def test_every_stage_takes_a_name_with_a_file(tmp_path, monkeypatch, photos):
    """As its weights and as its teacher, where the file alone could be of two architectures."""
    know(monkeypatch)
    know(monkeypatch, "other", replace(TINY, eps=1e-5))
    path, one = tmp_path / "teacher.pth", tmp_path / "one/student.safetensors"
    torch.save({"teacher": randomise(ViT(TINY)).state_dict()}, path)
    brief = ("--steps", 1, "--batch", 2, "--data", photos, "--out")
    call(align_attention, "--weights", f"tiny={path}", *brief, one.parent)
    call(align_attention, "--weights", one, "--teacher", f"tiny={path}", *brief, tmp_path / "more")
    call(align_features, "--weights", f"tiny={path}", "--attention", "relu", *brief, tmp_path / "two")
    call(align_features, "--weights", one, "--teacher", f"tiny={path}", *brief, tmp_path / "three")
    for folder, attention in (("one", "linear"), ("more", "linear"), ("two", "relu"), ("three", "linear")):
        vit = load_vit(tmp_path / folder / "student.safetensors")
        assert (vit.arch, vit.attention, vit.facts["teacher"]["sha256"]) == (TINY, attention, model.sha256(path))
    call(finetune, "--weights", f"tiny={path}", f"tiny={path}:linear", *brief, tmp_path / "tuned")
    call(finetune, "--weights", f"other={path}", "tiny", "--from-scratch", *brief, tmp_path / "scratch")       # downloads nothing
    for folder, arch, attention, stage in (("tuned/0", TINY, "softmax", "pretrained"), ("tuned/1", TINY, "linear", "none"),
                                           ("scratch/0", KNOWN["other"].arch, "softmax", "scratch"), ("scratch/1", TINY, "softmax", "scratch")):
        vit = load_vit(tmp_path / f"{folder}-classify.safetensors")
        assert (vit.arch, vit.attention, vit.facts["stage"]) == (arch, attention, f"{stage}+finetune")
    rows = json.loads((tmp_path / "tuned/metrics.json").read_text())
    assert [row["weights"] for row in rows] == [f"tiny={path}", f"tiny={path}:linear"]
    for stage in (align_attention, align_features, finetune):
        assert "NAME=" in refusal(call, stage, "--weights", path, *brief, tmp_path / "none")
        assert not (tmp_path / "none").exists()


@shrunk
@pytest.mark.parametrize("attention", (*ATTENTION, "hedgehog"))
def test_export_equals_eager(arch, attention):
    vit, images = linearize(randomise(ViT(arch)), attention), images_of(32, 32, n=2)
    with torch.no_grad():
        assert error(torch.export.export(vit, (images,)).module()(images), vit(images)) <= 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions

def turned(grid, prefix=0, D=16, seed=0):
    """Queries and keys in float64 before and after `rotate`."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 2, prefix + grid[0] * grid[1], D, generator=generator, dtype=torch.float64)
    return q, k, rotate(q, grid), rotate(k, grid)


def test_rotation_keeps_lengths_and_prefix():
    q, _, turned_q, _ = turned((4, 6), prefix=5)                        # no patch in the middle, which is not turned
    assert torch.allclose(q.norm(dim=-1), turned_q.norm(dim=-1), rtol=1e-6)
    assert torch.equal(q[..., :5, :], turned_q[..., :5, :]) and not torch.isclose(q, turned_q)[..., 5:, :].all(-1).any()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert rotate(q.to(dtype), (4, 6)).dtype == dtype


def test_softmax_logits_depend_on_the_offset_alone():
    """The same query and key everywhere: q . k is one number for each (rows, columns) between them."""
    rows, columns = grid = (4, 6)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(-1, -1, -1, 24, -1)
    logits = (rotate(q, grid) @ rotate(k, grid).mT)[0, 0].view(rows, columns, rows, columns)
    by_offset = {}
    for a, b, c, d in np.ndindex(rows, columns, rows, columns):
        by_offset.setdefault((c - a, d - b), []).append(logits[a, b, c, d].item())
    assert all(np.ptp(values) < 1e-5 for values in by_offset.values())
    assert len({round(values[0], 5) for values in by_offset.values()}) == len(by_offset) == 7 * 11


def test_linear_attention_with_rotary_positions_equals_its_written_out_form():
    """Weights of rotated queries and keys are positive and sum to 1."""
    attention = model.Attention(replace(TINY, position="rotary", width=32), "linear").double()
    q, k, rotated_q, rotated_k = turned((3, 4), prefix=2)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = elu_plus_one(rotated_q) @ elu_plus_one(rotated_k).mT
    weights = weights / weights.sum(-1, keepdim=True)
    assert (weights > 0).all() and torch.allclose(weights.sum(-1), torch.ones(1, dtype=torch.float64))
    want = (weights @ v).transpose(1, 2).flatten(2)
    assert error(attention.attend(q, k, v, (3, 4)), want) <= 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# The listing

def test_the_listing():
    lines = subprocess.run([sys.executable, ROOT / "model.py"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert all(word in lines[0] for word in ("name", "params", "patch", "pixels", "tokens", "licence"))
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert sorted(rows) == NAMES and len(lines) == len(NAMES) + 1
    width, hidden = 768, 3072                 # ViT-B/16 by hand: patches, CLS, positions, 12 blocks, the last norm
    block = 4 * width + 4 * width * (width + 1) + 2 * width * hidden + hidden + width
    count = 3 * 16 ** 2 * width + width + width + 197 * width + 12 * block + 2 * width
    assert rows["vit_base_patch16_224.augreg_in21k"] == [f"{count / 1e6:.1f}", "16", "224", "197", "apache-2.0"]
    assert rows["vit_large_patch14_dinov2.lvd142m"][1:] == ["14", "518", "1370", "apache-2.0"]
    assert rows["vit_small_patch16_dinov3.lvd1689m"][1:] == ["16", "256", "261", "dinov3-license"]
    assert rows["vit_base_patch16_siglip_512.webli"][1:] == ["16", "512", "1024", "apache-2.0"]


# ---------------------------------------------------------------------------------------------------------------------
# Download

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local stand-in for the hub: its own reply has length and hash and points to a store on another host."""
    save_file(randomise(ViT(TINY)).state_dict(), tmp_path / "tiny.safetensors")

    class Hub(http.server.BaseHTTPRequestHandler):
        content = (tmp_path / "tiny.safetensors").read_bytes()
        promised = {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        claimed, renamed, status, asked = None, False, 200, []

        def answer(self):
            self.asked.append((self.command, self.headers["Host"].split(":")[0], self.path))
            if self.status != 200:
                self.send_error(self.status)
            elif self.path.startswith("/timm/tiny.test/") and self.renamed:         # on the same host, without a hash
                self.send_response(307)
                self.send_header("Location", self.path.replace("tiny", "renamed"))
                self.end_headers()
            elif self.path.endswith("/resolve/main/model.safetensors"):
                self.send_response(302)
                for key, value in self.promised.items():
                    self.send_header(key, value)
                self.send_header("Location", f"http://localhost:{self.server.server_port}/store")
                self.end_headers()
            else:
                self.send_response(200)
                self.send_header("ETag", '"of the store, not of the file"')
                self.send_header("Content-Length", str(self.claimed or len(self.content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(self.content)

        do_GET = do_HEAD = answer

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    Hub.stop = lambda: (server.shutdown(), server.server_close())
    Hub.cached = tmp_path / "hub/checkpoints/tiny.test.safetensors"
    folder = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    monkeypatch.setattr(model, "HUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    know(monkeypatch)
    yield Hub
    torch.hub.set_dir(folder)
    Hub.stop()


URL = "/timm/tiny.test/resolve/main/model.safetensors"


def test_a_known_name_is_downloaded_once(hub, capsys):
    vit = load_vit("tiny")
    assert same(load_vit("tiny"), vit) and same(vit, randomise(ViT(TINY)))
    assert hub.asked == [("HEAD", "127.0.0.1", URL), ("GET", "127.0.0.1", URL), ("GET", "localhost", "/store")]
    assert "sha256 as the hub says" in capsys.readouterr().out and hub.cached.read_bytes() == hub.content


def test_a_repository_that_was_renamed_is_followed(hub):
    hub.renamed = True
    assert same(load_vit("tiny"), randomise(ViT(TINY)))
    assert hub.asked[1][1:] == ("127.0.0.1", URL.replace("tiny", "renamed")) and hub.asked[-1][1:] == ("localhost", "/store")
    hub.cached.unlink()
    hub.promised = hub.promised | {"X-Linked-ETag": '"' + "0" * 64 + '"'}
    assert "hash" in refusal(load_vit, "tiny")


@pytest.mark.parametrize("wrong", ("hash", "bit", "cut", "cut on the way", "cut without hash", "longer", "not a file", "404", "401"))
def test_a_damaged_download_is_refused_and_not_kept(hub, wrong):
    whole = hub.content
    if wrong == "hash":
        hub.promised = hub.promised | {"X-Linked-ETag": '"' + "0" * 64 + '"'}
    elif wrong == "bit":
        hub.content = whole[:-1] + bytes([whole[-1] ^ 1])
    elif wrong == "longer":
        hub.promised, hub.content = {"X-Linked-Size": str(len(whole))}, whole + b" "
    elif wrong.isdigit():                                               # no such file, or behind a login
        hub.status = int(wrong)
    elif wrong == "not a file":
        hub.promised, hub.content = {}, b"<html>Sign in</html>"
    else:
        hub.claimed = len(whole) if wrong == "cut on the way" else None
        hub.content = whole[:-1000]
        hub.promised = {"X-Linked-Size": str(len(whole))} if wrong == "cut without hash" else hub.promised
    message = refusal(load_vit, "tiny")
    assert "tiny.test could not be downloaded" in message and model.HUB + URL in message and str(hub.cached) in message
    assert not any(hub.cached.parent.iterdir()) and (not wrong.isdigit() or f"Error {wrong}" in message)


def test_a_hub_without_a_hash_is_said(hub, capsys):
    hub.promised = {}
    assert same(load_vit("tiny"), randomise(ViT(TINY)))
    assert "the hub sent no sha256" in capsys.readouterr().out


def test_without_a_network_the_address_and_the_place_are_named(hub):
    hub.stop()
    message = refusal(load_vit, "tiny")
    assert model.HUB + URL in message and str(hub.cached) in message


def test_a_file_put_there_by_hand_is_used(hub):
    hub.stop()
    hub.cached.parent.mkdir(parents=True)
    hub.cached.write_bytes(hub.content)
    assert same(load_vit("tiny"), randomise(ViT(TINY)))


def test_a_student_of_a_downloaded_teacher_finds_it_by_name(hub, tmp_path):
    _, student, origin = load_pair("tiny")
    assert origin == {"file": "tiny", "sha256": hashlib.sha256(hub.content).hexdigest()}
    save_vit(student, tmp_path / "student.safetensors", teacher=origin)
    assert same(load_pair(tmp_path / "student.safetensors")[0], randomise(ViT(TINY)))
