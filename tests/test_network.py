"""The network against torchvision, timm, published formulas and a real ViT; splits; demo."""
import math
import runpy
from dataclasses import replace
from functools import reduce

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models.vision_transformer import VisionTransformer

import demo.shapes as shapes
import model
from conftest import SIZE, TINY, error, random_vit, randomise, refusal, same, seeded, varying
from model import (ATTENTION, KNOWN, Architecture, Attention, ViT, linear_attention,
                   linear_reference, linearize, load_vit, rotate, save_vit, softmax_attention)

NAMES = list(KNOWN)[1:]                                 # name.tag, without the demo
SMALL = dict(width=32, depth=2, heads=2, hidden=48, mean=(0.5,) * 3, std=(0.5,) * 3)
SHRUNK = {replace(KNOWN[name], **SMALL, patch=8, grid=(4, 4)): name for name in KNOWN}
SMALLEST = {replace(KNOWN[name], **SMALL): name                         # by family, patch and grid
            for name in sorted(NAMES, key=lambda name: -KNOWN[name].width)}


TORCHVISION = {                                         # a part of its names -> of timm's
    "encoder.layers.encoder_layer_": "blocks.", "ln_1": "norm1", "ln_2": "norm2",
    "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj", "encoder.pos_embedding": "pos_embed",
    "encoder.ln": "norm", "conv_proj": "patch_embed.proj", "class_token": "cls_token"}


@pytest.mark.parametrize("width, heads, patch, side",
                         [(128, 2, 16, 4), (192, 3, 8, 7), (96, 3, 4, 6), (80, 5, 14, 3)])
def test_whole_vit_equals_torchvision(width, heads, patch, side):
    other = randomise(VisionTransformer(side * patch, patch, 3, heads, width, 2 * width))
    with torch.no_grad():                               # tokens as small as trained: eps counts
        for p in (other.class_token, other.encoder.pos_embedding, *other.conv_proj.parameters()):
            p.mul_(0.03)
    rename = lambda name: reduce(lambda name, pair: name.replace(*pair), TORCHVISION.items(), name)
    other.heads = torch.nn.Identity()
    vit = ViT(Architecture(width, 3, heads, 2 * width, patch, (side, side)))
    vit.load_state_dict({rename(name): t for name, t in other.state_dict().items()})
    images = seeded(2, 3, side * patch, side * patch)
    tokens = [other.class_token.expand(2, -1, -1), other._process_input(images)]
    assert error(vit(images), other.encoder(torch.cat(tokens, dim=1))) <= 1e-5


def cubic(n_in, n_out, scale, antialias):
    """Bicubic interpolation along an axis (Keys 1981) as a matrix; edges repeated or cut off."""
    a, wide = (-0.5, max(1, 1 / scale)) if antialias else (-0.75, 1)
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        x = (i + 0.5) / scale - 0.5                     # where output i lies among the inputs
        for j in range(math.floor(x - 2 * wide), math.ceil(x + 2 * wide) + 1):
            t = abs(x - j) / wide
            near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((t - 5) * t + 8) * t * a - 4 * a
            if not antialias or 0 <= j < n_in:
                matrix[i, min(max(j, 0), n_in - 1)] += near if t <= 1 else far if t < 2 else 0
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("grid", [(16, 16), (18, 28), (50, 37), (1, 3), (37, 36)])
@pytest.mark.parametrize("rule", ("dinov2", "timm"))
def test_positions_follow_the_published_formula(rule, grid):
    vit = randomise(ViT(replace(TINY, grid=(37, 36), position=rule, depth=0)))
    table = vit.pos_embed[0, 1:].view(37, 36, 64).double()
    offset = 0.1 * (rule == "dinov2")                   # in the scale, not only in the size
    down, across = (cubic(m, n, (n + offset) / m, antialias=rule == "timm")
                    for m, n in zip((37, 36), grid))
    want = torch.einsum("ir,js,rsc->ijc", down, across, table).reshape(1, -1, 64)
    cls, found = vit.positions(grid)
    if grid == vit.arch.grid:                           # the native grid keeps its positions
        want = vit.pos_embed[:, 1:]
    assert torch.equal(cls, vit.pos_embed[:, :1])
    assert error(found, want) <= 1e-5 * (grid != vit.arch.grid)         # float32 coordinates
    vit = ViT(replace(TINY, width=2, grid=(37, 37), position=rule, depth=0))
    for n in range(1, 100):                             # a scale could round to one row too few
        assert vit.positions((n, 100 - n))[1].shape == (1, n * (100 - n), 2)


def test_the_grid_is_rows_then_columns_and_tokens_are_cls_then_registers_then_patches():
    vit, images = randomise(ViT(replace(TINY, depth=0))), torch.zeros(1, 3, 8, 20)
    images[:, :, 4:, 16:] = 1                           # last patch of the second row of five
    bright = vit.patch_embed(images) - vit.patch_embed(torch.zeros_like(images))
    assert bright.norm(dim=-1).nonzero().tolist() == [[0, 9]] and vit.grid(8, 20) == (2, 5)
    for height, width in ((13, 12), (12, 13), (3, 12), (0, 12)):
        assert f"{height} x {width}" in refusal(vit, torch.zeros(1, 3, height, width))
    images = torch.arange(210).view(2, 3, 5, 7).to(torch.uint8)
    found = ViT(replace(TINY, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))).normalize(images)
    for i, (mean, std) in enumerate(((0.1, 1), (0.2, 2), (0.3, 4))):
        assert torch.allclose(found[:, i], (images[:, i].float() / 255 - mean) / std, atol=1e-6)
    vit = randomise(ViT(replace(TINY, registers=4)))
    tokens, grid = vit.embed(torch.zeros(2, 3, 12, 12))
    assert torch.equal(tokens[:, :1], (vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1))
    assert torch.equal(tokens[:, 1:5], vit.reg_token.expand(2, -1, -1))         # no position
    assert torch.allclose(tokens[:, 5:], vit.patch_embed.proj.bias + vit.pos_embed[:, 1:])
    assert grid == (3, 3) and vit.arch.prefix == 5
    for name, p in ViT(replace(TINY, layerscale=True)).named_parameters():      # from scratch
        start = p == (not name.endswith("bias"))        # norms and LayerScale start at 1
        assert start.all() if p.ndim == 1 else 0.012 < p.std() < 0.028, name


def test_rotation_keeps_lengths_and_prefix_and_logits_depend_on_the_offset_alone():
    """The same query and key everywhere: q . k is one number for each offset between them."""
    turned = rotate(q := seeded(1, 2, 5 + 24, 16, dtype=torch.float64), (4, 6))
    assert torch.allclose(q.norm(dim=-1), turned.norm(dim=-1), rtol=1e-6)
    assert torch.equal(q[..., :5, :], turned[..., :5, :])
    assert not torch.isclose(q, turned)[..., 5:, :].all(-1).any()
    assert all(rotate(q.to(t), (4, 6)).dtype == t for t in (torch.bfloat16, torch.float16))
    q, k = seeded(2, 1, 1, 1, 16, dtype=torch.float64).expand(-1, -1, -1, 24, -1)
    logits = (rotate(q, (4, 6)) @ rotate(k, (4, 6)).mT)[0, 0].view(4, 6, 4, 6)
    found = {}
    for a, b, c, d in torch.cartesian_prod(*map(torch.arange, logits.shape)).tolist():
        found.setdefault((c - a, d - b), []).append(logits[a, b, c, d].item())
    assert all(max(values) - min(values) < 1e-5 for values in found.values())
    assert len({round(values[0], 5) for values in found.values()}) == len(found) == 7 * 11
    attention = Attention(replace(TINY, position="rotary", heads=2), "linear").double()
    q, k, v = seeded(3, 1, 2, 2 + 12, 32, dtype=torch.float64)
    want = linear_reference(rotate(q, (3, 4)), rotate(k, (3, 4)), v).transpose(1, 2).flatten(2)
    assert error(attention.attend(q, k, v, (3, 4)), want) <= 1e-10


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="comparison with timm: pip install timm")


@torch.no_grad()
def tokens_agree(other, vit, *sizes):
    for height, width in sizes:
        images = seeded(1, 3, height, width, seed=height)
        found, truth = vit(images), other.forward_features(images)
        assert found.shape == truth.shape and error(found, truth) <= 1e-5, (height, width)


@pytest.mark.parametrize("name", SMALLEST.values())
def test_tokens_are_timms_and_our_student_runs_inside_timm(timm, name, tmp_path, monkeypatch):
    """Two blocks of the real width; but for DINOv2, whose rule is not timm's, at three sizes."""
    name, arch = name.partition(".")[0], replace(KNOWN[name], depth=2)
    monkeypatch.setitem(KNOWN, "ours.test", arch)
    other = randomise(timm.create_model(name, depth=2, dynamic_img_size=True))
    save_file(other.state_dict(), tmp_path / "timm.safetensors")
    vit = load_vit(f"ours={tmp_path / 'timm.safetensors'}")
    more = [(n * arch.patch, m * arch.patch) for n, m in ((9, 9), (5, 11))]
    tokens_agree(other, vit, arch.pixels, *more[:2 * (arch.position != "dinov2")])

    def forward(self, x, *args, **kwargs):              # timm's projections, our operator
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if arch.position == "rotary":
            q, k = rotate(q, arch.grid), rotate(k, arch.grid)
        return self.proj(linear_attention(q, k, v).transpose(1, 2).flatten(2))

    save_vit(student := linearize(vit), tmp_path / "student.safetensors")
    other = timm.create_model(name, depth=2, num_classes=0, global_pool="").eval()
    other.load_state_dict(load_file(tmp_path / "student.safetensors"), strict=True)
    for block in other.blocks:
        block.attn.forward = forward.__get__(block.attn)
    tokens_agree(other, student, arch.pixels)
    assert same(load_vit(tmp_path / "student.safetensors"), student)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_and_facts_are_timms(timm, name, tmp_path, monkeypatch):
    arch, aside = KNOWN[name], ("head", "fc_norm", "attn_pool")
    with torch.device("meta"):
        other, ours = timm.create_model(name), ViT(arch)
    theirs = {key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): tensor.shape
              for key, tensor in other.state_dict().items() if not key.startswith(aside)}
    assert theirs == {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert {module.eps for key, module in other.named_modules()
            if isinstance(module, torch.nn.LayerNorm) and not key.startswith(aside)} == {arch.eps}
    assert other.blocks[0].attn.num_heads == arch.heads
    cfg = timm.get_pretrained_cfg(name)
    licence = model.LICENCES.get(name.partition(".")[2], "apache-2.0")
    assert name in timm.list_pretrained() and licence == (cfg.license or "apache-2.0")
    assert (tuple(cfg.mean), tuple(cfg.std)) == (arch.mean, arch.std)
    assert cfg.interpolation == "bicubic" and cfg.input_size[1:] == arch.pixels
    monkeypatch.setattr(model, "HUB", "nowhere")        # no address at all: the message has it
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    assert f"nowhere/{cfg.hf_hub_id}/resolve/main/model.saf" in refusal(model.download, name)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("arch", SHRUNK, ids=SHRUNK.values())
def test_every_family_is_linearized_saved_and_exported(arch, attention, tmp_path):
    save_vit(vit := linearize(randomise(ViT(arch)), attention), tmp_path / "a.safetensors")
    assert same(load_vit(tmp_path / "a.safetensors"), vit)
    for height, width in ((32, 32), (16, 48)):
        tokens = vit(images := seeded(2, 3, height, width))
        assert tokens.shape == (2, arch.prefix + height * width // 64, 32)
        assert tokens.isfinite().all()
    if attention == "linear" or arch.position == "rotary":
        exported = torch.export.export(vit, (images,)).module()
        assert error(exported(images), tokens) <= 1e-6


def test_the_listing(capsys):
    runpy.run_path(model.__file__, run_name="__main__")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert list(rows) == ["name", *NAMES]
    C = 768                             # ViT-B/16: patches, CLS, positions, blocks, last norm
    count = 3 * 16 ** 2 * C + C + C + 197 * C + 12 * (12 * C * C + 13 * C) + 2 * C
    assert rows["vit_base_patch16_224.dino"] == [f"{count / 1e6:.1f}", "16", "224", "apache-2.0"]
    assert rows["vit_small_patch16_dinov3.lvd1689m"][1:] == ["16", "256", "dinov3-license"]


@pytest.fixture(scope="module")
def real(shared):
    """A real ViT-S/14, and what the official DINOv2 modules gave on it, float32 kept as float16."""
    vit = load_vit(f"vit_small_patch14_dinov2={shared / 'weights/vits14_saliency.safetensors'}")
    golden = load_file(shared / "golden/vits14_official_tokens.safetensors")
    return vit.requires_grad_(False), golden


def test_tokens_and_blocks_equal_the_official_ones(real):
    vit, golden = real
    for name in ("square224", "wide252x392", "native518"):
        tokens = vit(vit.normalize(golden[f"{name}.pixels"]))
        assert error(tokens, golden[f"{name}.tokens"]) <= 1e-3, name    # float16 itself: 2e-4
    x, grid = vit.embed(vit.normalize(golden["square224.pixels"]))
    for i, block in enumerate(vit.blocks[:6]):
        x = block(x, grid)
        assert i % 5 or error(x, golden[f"square224.block{i}"]) <= 1e-3, f"block {i}"


def test_operators_at_real_queries_keys_and_values(real):
    vit, golden = real
    x, grid = vit.embed(vit.normalize(golden["wide252x392.pixels"]))    # 18 x 28 patches
    lost = {"linear": [], "relu": []}
    for i, block in enumerate(vit.blocks):
        q, k, v = block.attn.project(block.norm1(x))
        x, mean = block(x, grid), v.mean(-2, keepdim=True)
        truth = softmax_attention(q, k, v) - mean
        for name in lost:
            lost[name].append(error(ATTENTION[name](vit.arch)(q, k, v, grid) - mean, truth))
        for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 5e-3)):
            half = [t.to(dtype) for t in (q, k, v)]
            out, exact = linear_attention(*half), linear_attention(*(t.double() for t in half))
            assert out.isfinite().all() and (out.std(-2) > 0).all()
            assert error(varying(out, half[2]), varying(exact, half[2])) <= limit, f"block {i}"
    assert all(sum(x > 0.8 for x in each) > len(each) / 2 for each in lost.values()), lost


def test_every_tenth_photo_is_held_out_at_most_256_and_a_given_split_is_kept(tmp_path, monkeypatch):
    assert str(tmp_path) in refusal(model.unlabelled, [tmp_path])       # no photo
    (tmp_path / "a.png").touch()
    assert "one photo" in refusal(model.unlabelled, [str(tmp_path)])
    for n in (25, 2560, 2700, 2815, 2816, 100_000):
        monkeypatch.setattr(model, "find_images", lambda folder, n=n: list(range(n)))
        train, held_out = map(list, model.unlabelled([tmp_path]))
        assert sorted(train + held_out) == list(range(n)) and len(held_out) <= 256
        assert held_out == list(range(0, n, held_out[1]))
        assert held_out[1] == 10 if n <= 2560 else len(held_out) >= 128
    monkeypatch.setattr(model, "find_images", lambda folder: [folder.name])
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    assert [*map(list, model.unlabelled([tmp_path] * 2))] == [["train"] * 2, ["val"] * 2]


def test_shapes_depend_on_the_seed_and_only_the_target_has_the_colour_of_the_ring(monkeypatch):
    images, labels, masks = first = shapes.draw(200, seed=3)
    torch.rand(1)                                       # the global generator must not matter
    assert all(torch.equal(a, b) for a, b in zip(first, shapes.draw(200, seed=3)))
    assert not torch.equal(images, shapes.draw(200, seed=4)[0])
    assert images.shape == (200, 3, 64, 64) and images.dtype == masks.dtype == torch.uint8
    assert all(mask.unique().tolist() == [0, 1 + label] for label, mask in zip(labels, masks))
    assert labels.bincount(minlength=4).min() > 200 / 4 / 2             # guessing is no use
    monkeypatch.setattr(shapes.torch, "randn", lambda *shape, generator: torch.zeros(shape))
    images, _, masks = shapes.draw(50, seed=0)          # painted without noise
    cells = lambda x: torch.stack([c for row in x.split(16, -2) for c in row.split(16, -1)], -3)
    colours = (shapes.COLOURS * 255).round().view(6, 3, 1, 1, 1)
    painted = (cells(images.float()).unsqueeze(1) == colours).all(2)    # (n, 6, 16 cells, 16, 16)
    middles = painted[..., 7:9, 7:9].any(-1).any(-1)
    for cell, middle, mask in zip(painted.sum((-2, -1)) > 9, middles, cells(masks)):
        target, pair = mask.sum((-2, -1)) > 0, cell[cell.sum(1) == 2][0]
        assert cell.sum() == 6 and cell.any(1).sum() == 5       # six things, two of one colour:
        assert target.sum() == 1 and pair[target].all()         # the target, and the ring, which
        assert torch.equal(cell.any(0) & ~middle.any(0), pair & ~target)        # has a hole


def test_last_blocks_may_keep_softmax(tmp_path):
    """Asked for by number; saved and loaded; all weights but swapped operators' are the same."""
    teacher = random_vit().eval()
    student = linearize(teacher, "linear_conv", keep_softmax=1)
    kinds = [type(block.attn.operator).__name__ for block in student.blocks]
    assert kinds == ["LinearConv", "Operator"] and student.blocks[1].attn.operator.function is (
        teacher.blocks[1].attn.operator.function)
    save_vit(student, tmp_path / "a.safetensors")
    again, images = load_vit(tmp_path / "a.safetensors"), torch.rand(2, 3, SIZE, SIZE)
    assert again.keep_softmax == 1 and same(again, student)
    assert torch.equal(again(images), student(images))
    assert not torch.equal(again(images), linearize(teacher, "linear_conv")(images))
    assert torch.equal(linearize(teacher, "linear", keep_softmax=9)(images), teacher(images))
