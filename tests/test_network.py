"""The network against torchvision, timm, published formulas and a real ViT; the demo's images."""
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.models.vision_transformer import VisionTransformer

import model
from conftest import TINY, error, randomise, refusal, seeded
from demo import shapes
from model import (FAMILIES, KNOWN, LICENCES, Architecture, Attention, ViT, known,
                   linear_reference, load_vit, rotate, save_vit)

WIDTH_64 = dict(width=64, depth=2, heads=1, hidden=256)
KINDS = {replace(arch, **WIDTH_64, mean=None, std=None, patch=16, grid=(4, 4)): name
         for name, arch in reversed(KNOWN.items()) if name != "demo"}   # a name for each network


def test_whole_vit_equals_torchvision():
    other = randomise(VisionTransformer(24, 4, num_layers=3, num_heads=3, hidden_dim=96,
                                        mlp_dim=192))
    with torch.no_grad():                               # tokens as small as trained: eps counts
        for p in (other.class_token, other.encoder.pos_embedding, *other.conv_proj.parameters()):
            p.mul_(0.03)
    vit = ViT(Architecture(width=96, depth=3, heads=3, hidden=192, patch=4, grid=(6, 6)))
    table, cls, weight, bias, *blocks_and_norm = vit.state_dict()       # names, in our order
    names = [cls, weight, bias, table, *blocks_and_norm, "head.weight", "head.bias"]     # in theirs
    tensors = dict(zip(names, other.state_dict().values(), strict=True))
    vit.load_state_dict({name: tensors[name] for name in vit.state_dict()})
    images = seeded(2, 3, 24, 24)
    tokens = [other.class_token.expand(2, -1, -1), other._process_input(images)]
    assert error(vit(images), other.encoder(torch.cat(tokens, dim=1))) <= 1e-5


@pytest.mark.parametrize("grid", [(16, 16), (18, 28), (50, 37), (1, 3), (37, 36)])
@pytest.mark.parametrize("rule", ("dinov2", "timm"))
def test_positions_are_those_of_interpolate_also_in_bfloat16(rule, grid):
    vit = randomise(ViT(replace(TINY, grid=(37, 36), position=rule, depth=0)))
    image = vit.pos_embed[:, 1:].unflatten(1, (37, 36)).permute(0, 3, 1, 2)     # (1, C, 37, 36)
    more = dict(size=grid, antialias=True)              # timm's
    if rule == "dinov2" and grid != (37, 36):           # its own code's scale
        more = dict(scale_factor=((grid[0] + 0.1) / 37, (grid[1] + 0.1) / 36))
    want = F.interpolate(image, mode="bicubic", **more).flatten(2).mT
    cls, found = vit.positions(grid)
    assert torch.equal(cls, vit.pos_embed[:, :1]) and error(found, want) <= 1e-6
    half = vit.bfloat16().positions(grid)[1]            # no bicubic for it on a CPU
    assert half.dtype == torch.bfloat16 and error(half, want) <= 1e-2


def test_the_grid_is_rows_then_columns_and_tokens_go_row_by_row():
    vit, images = randomise(ViT(replace(TINY, depth=0))), torch.zeros(1, 3, 8, 20)
    images[:, :, 4:, 16:] = 1                           # last patch of the second row of five
    changed = (vit(images) != vit(torch.zeros_like(images))).any(-1)
    assert changed.nonzero().tolist() == [[0, 1 + 9]] and vit.grid_of(8, 20) == (2, 5)
    for height, width in ((13, 12), (12, 13), (3, 12), (0, 12)):
        assert f"{height} x {width}" in refusal(vit, torch.zeros(1, 3, height, width))


def test_tokens_are_cls_then_registers_without_a_position_then_patches():
    vit = randomise(ViT(replace(TINY, registers=4, grid=(2, 3))))
    tokens, grid = vit.embed(torch.zeros(2, 3, 8, 12))
    assert torch.equal(tokens[:, :1], (vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1))
    assert torch.equal(tokens[:, 1:5], vit.reg_token.expand(2, -1, -1))
    assert torch.allclose(tokens[:, 5:], vit.patch_embed.proj.bias + vit.pos_embed[:, 1:])
    assert grid == (2, 3) and vit.arch.prefix == 5 and vit.arch.pixels == (8, 12)


def test_pixels_are_normalised_by_channel():
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    found = ViT(replace(TINY, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))).half().normalize(white)
    assert torch.equal(found.flatten(), torch.tensor([0.9 / 1, 0.8 / 2, 0.7 / 4]).half())


def test_linear_attention_gets_rotated_queries_and_keys_but_not_values():
    attention = Attention(replace(TINY, position="rotary", heads=2), "linear").double()
    q, k, v = seeded(3, 1, 2, 2 + 12, 32, dtype=torch.float64)
    want = linear_reference(rotate(q, (3, 4)), rotate(k, (3, 4)), v).transpose(1, 2).flatten(2)
    assert error(attention.attend(q, k, v, (3, 4)), want) <= 1e-10
    assert rotate(q.bfloat16(), (3, 4)).dtype == torch.bfloat16
    assert torch.equal(rotate(q, (3, 4))[:, :, :2], q[:, :, :2])        # the prefix is not turned


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="comparison with timm: pip install timm")


@pytest.mark.parametrize("name", KINDS.values())
def test_tokens_are_timms(timm, name, tmp_path, monkeypatch):
    """At width 64; but for DINOv2, whose rule is not timm's, at three sizes."""
    arch = replace(KNOWN[name], **WIDTH_64)
    monkeypatch.setitem(KNOWN, name, arch)
    narrow = dict(model_name=name.partition(".")[0], depth=2, embed_dim=64, num_heads=1)
    other = randomise(timm.create_model(**narrow, dynamic_img_size=True))
    save_file(other.state_dict(), tmp_path / "timm.safetensors")
    vit = load_vit(f"{name}={tmp_path / 'timm.safetensors'}")
    more = [(n * arch.patch, m * arch.patch) for n, m in ((9, 9), (5, 11))]
    for height, width in [arch.pixels, *more][:1 if arch.position == "dinov2" else 3]:
        images = seeded(1, 3, height, width, seed=height)
        found, truth = vit(images), other.forward_features(images)
        assert found.shape == truth.shape and error(found, truth) <= 1e-5, (height, width)


def test_our_student_runs_inside_timm(timm, tmp_path, monkeypatch):
    """By the lines of results/README.md."""
    page = (Path(model.__file__).parent / "results/README.md").read_text()
    student = randomise(ViT(KNOWN["vit_small_patch14_dinov2.lvd142m"], "linear"))
    save_vit(student, tmp_path / "runs/features/student.safetensors")
    monkeypatch.chdir(tmp_path)
    exec(page.partition("```python")[2].partition("```")[0], names := {})
    images = seeded(1, 3, *student.arch.pixels)
    assert error(student(images), names["vit"].forward_features(images)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_facts_are_timms(timm, family, monkeypatch):
    monkeypatch.setattr(model, "FAMILIES", {family: FAMILIES[family]})
    _, name, *_ = known()                               # the first name of this family
    arch, aside = KNOWN[name], ("head", "fc_norm", "attn_pool")
    with torch.device("meta"):
        other, ours = timm.create_model(name), ViT(arch)
    theirs = {key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): tensor.shape
              for key, tensor in other.state_dict().items() if not key.startswith(aside)}
    assert theirs == {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert {module.eps for key, module in other.named_modules()
            if isinstance(module, torch.nn.LayerNorm) and not key.startswith(aside)} == {arch.eps}
    assert other.blocks[0].attn.num_heads == arch.heads
    for name in list(known())[1:]:
        cfg, arch = timm.get_pretrained_cfg(name), KNOWN[name]
        licence = LICENCES.get(name.partition(".")[2], "apache-2.0")
        assert name in timm.list_pretrained() and licence == (cfg.license or "apache-2.0")
        assert (tuple(cfg.mean), tuple(cfg.std)) == (arch.mean, arch.std)
        assert cfg.interpolation == "bicubic" and cfg.input_size[1:] == arch.pixels
        assert cfg.hf_hub_id == f"timm/{name.replace('_quickgelu', '')}"


def test_the_listing_has_every_known_vit(capsys):
    runpy.run_path(model.__file__, run_name="__main__")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert list(rows) == ["name", *list(KNOWN)[1:]]
    assert rows["vit_base_patch16_224.dino"] == ["85.8", "16", "224", "apache-2.0"]


def test_tokens_of_a_real_vit_equal_the_official_ones(shared):
    """What the official DINOv2 modules gave in float32 is kept as float16."""
    vit = load_vit(f"vit_small_patch14_dinov2={shared / 'weights/vits14_saliency.safetensors'}")
    golden = load_file(shared / "golden/vits14_official_tokens.safetensors")
    for name in ("square224", "wide252x392", "native518"):
        with torch.no_grad():
            tokens = vit(vit.normalize(golden[f"{name}.pixels"]))
        assert error(tokens, golden[f"{name}.tokens"]) <= 1e-3          # float16 itself: 2e-4


def test_shapes_depend_on_the_seed_alone_and_the_mask_marks_the_label():
    images, labels, masks = first = shapes.draw(200, seed=3)
    torch.rand(1)                                       # the global generator must not matter
    assert all(map(torch.equal, first, shapes.draw(200, seed=3)))
    assert not torch.equal(images, shapes.draw(200, seed=4)[0])
    assert all(mask.unique().tolist() == [0, 1 + label] for label, mask in zip(labels, masks))
    assert labels.bincount(minlength=4).min() > 200 / 4 / 2             # guessing is no use
