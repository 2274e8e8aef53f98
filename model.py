"""A Vision Transformer (ViT) whose softmax attention can be exchanged for linear attention.

ViT-AdaLA (arXiv 2603.16063) turns a pretrained softmax ViT, O(N^2) in its tokens, into a linear-attention ViT, O(N):
`align_attention.py` (stage 1), `align_features.py` (stage 2) and `finetune.py` (stage 3), read and run in that order.
This file holds what the stages must agree on: attention operators, network, weight files, photos. The method is read by the
end of class ViT; what follows finds, reads and writes files, and says no in one sentence to those that it cannot use.

    vit = load_vit("vit_small_patch14_dinov2")       # a known name (downloads), a .safetensors or a .pth file
    student = linearize(vit, "linear")               # the same weights, another attention
    tokens = student(vit.normalize(images_uint8))    # (B, 3, H, W) -> (B, 1+R+N, C)

Glossary, the same letters in every file; the paper's symbol, where it has one, in brackets
    B  images in a batch                    C  width of a token [d]
    N  tokens, [N]; patches alone where     H  attention heads
       prefix tokens are counted apart      D  width of a head, C / H
    R  register tokens                      phi  feature map of linear attention [phi]
    grid  (rows, columns) of patches        prefix  CLS and register tokens, which have no place in the grid
"""
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import urllib.request
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from urllib.parse import urljoin

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torchvision import datasets, tv_tensors
from torchvision.transforms.v2.functional import to_image

try:                                          # torchvision's decoder is the faster one (results/load-speed.csv), but deprecated
    from torchvision.io import decode_image
except ImportError:                           # a torchvision that has dropped it: Pillow reads every format
    decode_image = None
warnings.filterwarnings("ignore", "The image decoding and encoding")


class InputError(Exception):
    """Something the user gave cannot be used. The message is one sentence: the file, flag or tensor; expected; found."""


# ---------------------------------------------------------------------------------------------------------------------
# Attention operators: (q, k, v), each (B, H, N, D) -> (B, H, N, D), same dtype. One signature, side by side.

def softmax_attention(q, k, v):
    """out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j with PyTorch's fused kernel: O(N^2) time, O(N) memory."""
    return F.scaled_dot_product_attention(q, k, v)


def softmax_reference(q, k, v):
    """The same, written out: O(N^2) time and memory. The oracle of the tests."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5              # (B,H,N,D) @ (B,H,D,N) -> (B,H,N,N)
    return scores.softmax(-1) @ v                                       # (B,H,N,N) @ (B,H,N,D) -> (B,H,N,D)


class EluPlusOne(torch.autograd.Function):
    """phi(x) = 1 + ELU(x) > 0 (Katharopoulos et al. 2020). Adding 1 to F.elu would round to 0 in bfloat16 below x = -6.

    Its slope is min(phi(x), 1). Written out, forward and backward of linear attention take 0.6 to 0.7 of the time that
    autograd needs (CPU, results/operator.csv).
    """

    @staticmethod
    def forward(ctx, x):
        y = x.clamp(max=0).exp_().add_(x.relu())                        # in place: less memory to go through
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].clamp(max=1)


elu_plus_one = EluPlusOne.apply


CHUNK = 1024                                  # tokens; what a chunk needs stays in a CPU's cache: results/operator.csv


def linear_attention(q, k, v, phi=elu_plus_one):
    """out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j): vanilla linear attention, O(N) time and memory.

    The brackets move: phi(q) (phi(k)^T v) never forms the N x N map. Paper: phi, its scale and eps are not published;
    here: 1 + ELU, no scale, no eps, because dividing phi(q) *before* the product is safe in every dtype at any N:
    sums over N tokens, which leave float16's range at N = 785, are taken in float32. float64 stays float64.
    """
    with torch.autocast(v.device.type, enabled=False):                  # the dtypes below are chosen, not inherited
        dtype = v.dtype
        work = torch.float32 if dtype == torch.float16 else dtype       # float16: only GPUs without bfloat16 need it
        wide = torch.promote_types(work, torch.float32)
        eager_cpu = v.device.type == "cpu" and not torch.compiler.is_compiling()
        n = CHUNK if eager_cpu else v.shape[-2]                         # one chunk: compiled as fast, and a small graph
        kv, k_sum, out = 0, 0, []
        for k_n, v_n in zip(k.split(n, dim=-2), v.split(n, dim=-2)):
            k_n = phi(k_n.to(work))
            kv = kv + (k_n.mT @ v_n.to(work)).to(wide)                  # (B,H,D,n) @ (B,H,n,D) -> (B,H,D,D)
            k_sum = k_sum + k_n.sum(-2, keepdim=True, dtype=wide)       # (B,H,1,D)
        for q_n in q.split(n, dim=-2):
            q_n = phi(q_n.to(work))
            total = (q_n * k_sum).sum(-1, keepdim=True)                 # (B,H,n,1), the normaliser of each query
            total = total.masked_fill(total < torch.finfo(wide).tiny, 1)    # relu: no feature active gives 0, not NaN
            out.append(((q_n / total).to(work) @ kv.to(work)).transpose(1, 2))      # (B,H,n,D) @ (B,H,D,D) -> (B,n,H,D)
        return torch.cat(out, dim=1).transpose(1, 2).to(dtype)          # laid out as the network goes on: heads side by side


ATTENTION = {
    "softmax": softmax_attention,
    "softmax_reference": softmax_reference,
    "linear": linear_attention,
    "relu": partial(linear_attention, phi=torch.relu),
}
OPERATORS = (*ATTENTION, "hedgehog")                                    # what --attention takes


class Hedgehog(nn.Module):
    """LoLCATS' learned feature map, per head: phi(x) = cat(softmax(W x), softmax(-W x)), W starting at identity."""

    def __init__(self, heads, head_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))   # (H, D, D)

    def forward(self, x):
        """(B, H, N, D) -> (B, H, N, 2D), positive."""
        x = x @ self.weight.transpose(-2, -1)                           # (B,H,N,D) @ (H,D,D) -> (B,H,N,D)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The network. Names of modules and tensors are timm's, which equal DINOv2's but for the register tokens.

@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the tensors and the function of a ViT, but for its attention operator."""
    width: int                                # C
    depth: int                                # blocks
    heads: int                                # H
    hidden: int                               # width of the MLP's hidden layer
    patch: int                                # pixels
    grid: tuple                               # (rows, columns) of the position table
    cls: bool = True                          # has a CLS token
    cls_position: bool = True                 # the position table's first row belongs to CLS
    registers: int = 0                        # R
    layerscale: bool = False
    position: str = "timm"                    # a table resized by "timm"'s or "dinov2"'s rule, or "rotary": no table
    eps: float = 1e-6                         # of every LayerNorm
    mean: tuple = (0.485, 0.456, 0.406)       # of the pixels in [0, 1] that the weights were trained on: ImageNet's
    std: tuple = (0.229, 0.224, 0.225)
    act: str = "gelu"                         # of the MLP, one of ACTIVATIONS
    norm_pre: bool = False                    # a LayerNorm before the first block, and no bias in the patch embedding
    qkv_bias: bool = True
    interpolation: str = "bicubic"            # how photos were resized for the weights

    @property
    def pixels(self):
        """Native image size (height, width): the one that the weights were trained or last tuned at."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def prefix(self):
        """Number of tokens before the patches: CLS and registers."""
        return self.cls + self.registers


def rotate(x, grid):
    """Rotary positions of DINOv3 (arXiv 2508.10104): turn pairs of features of every patch token by its place on the grid.

    x: queries or keys (B, H, prefix + N, D) -> the same shape; CLS and registers have no place and are not turned.
    Linear attention sees the turned q and k, as softmax does, so O(N) and positive weights that sum to 1 stay. That
    q . k depends on the offset of two patches alone does not: stage 1 must learn around it.
    """
    rows, columns = (((torch.arange(n, device=x.device) + 0.5) / n) * 2 - 1 for n in grid)    # centres, -1 to 1
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).view(-1, 2, 1)  # (N, 2, 1)
    quarter = x.shape[-1] // 4
    period = 100 ** (torch.arange(quarter, device=x.device) / quarter)
    angle = (2 * math.pi * place / period).flatten(1).repeat(1, 2)      # (N, 2, D/4) -> (N, D/2) -> (N, D)
    prefix, patches = x.tensor_split([x.shape[-2] - len(angle)], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    turned = patches * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()
    return torch.cat([prefix, turned.to(x.dtype)], dim=-2)


class Attention(nn.Module):
    """Multi-head self-attention in three steps, so that a stage can look between them."""

    def __init__(self, arch, attention):
        super().__init__()
        self.heads, self.attention, self.rotary = arch.heads, attention, arch.position == "rotary"
        self.qkv = nn.Linear(arch.width, 3 * arch.width, bias=arch.qkv_bias)
        self.proj = nn.Linear(arch.width, arch.width)
        if attention == "hedgehog":
            self.map_q = Hedgehog(arch.heads, arch.width // arch.heads)
            self.map_k = Hedgehog(arch.heads, arch.width // arch.heads)

    def project(self, x):
        """(B, N, C) -> q, k, v, each (B, H, N, D)."""
        B, N, C = x.shape
        return self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q, k, v, grid):
        """q, k, v (B, H, N, D) -> (B, N, C), heads side by side.

        The last rows * columns tokens lie on the grid. Rotary positions look at it; a convolution on V would.
        """
        if self.rotary:
            q, k = rotate(q, grid), rotate(k, grid)
        if self.attention == "hedgehog":
            x = linear_attention(self.map_q(q), self.map_k(k), v, phi=nn.Identity())
        else:
            x = ATTENTION[self.attention](q, k, v)
        return x.transpose(1, 2).flatten(2)                             # (B,H,N,D) -> (B,N,H,D) -> (B,N,C)

    def forward(self, x, grid):
        return self.proj(self.attend(*self.project(x), grid))


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}    # OpenAI's CLIP has the second


class Mlp(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.act = arch.act
        self.fc1 = nn.Linear(arch.width, arch.hidden)
        self.fc2 = nn.Linear(arch.hidden, arch.width)

    def forward(self, x):
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class Block(nn.Module):
    def __init__(self, arch, attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.width, eps=arch.eps)
        self.attn = Attention(arch, attention)
        self.ls1 = LayerScale(arch.width) if arch.layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(arch.width, eps=arch.eps)
        self.mlp = Mlp(arch)
        self.ls2 = LayerScale(arch.width) if arch.layerscale else nn.Identity()

    def forward(self, x, grid):
        """x (B, prefix + N, C), grid (rows, columns) with rows * columns = N -> the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x), grid))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.proj = nn.Conv2d(3, arch.width, kernel_size=arch.patch, stride=arch.patch, bias=not arch.norm_pre)

    def forward(self, images):
        """(B, 3, H, W) -> (B, N, C), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Pre-norm Vision Transformer of every family in FAMILIES.

    `attention` is one of OPERATORS. `facts` is what the header of its weight file says of its origin.
    """

    def __init__(self, arch, attention="softmax"):
        super().__init__()
        if attention not in OPERATORS:
            raise InputError(f"attention '{attention}' is unknown: expected one of {', '.join(OPERATORS)}")
        self.arch, self.attention, self.facts = arch, attention, {}
        self.patch_embed = PatchEmbed(arch)
        if arch.position != "rotary":                                   # DINOv3 has no table
            self.pos_embed = nn.Parameter(torch.zeros(1, arch.grid[0] * arch.grid[1] + arch.cls_position, arch.width))
        if arch.cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        if arch.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, arch.registers, arch.width))
        self.norm_pre = nn.LayerNorm(arch.width, eps=arch.eps) if arch.norm_pre else nn.Identity()    # CLIP
        self.blocks = nn.ModuleList(Block(arch, attention) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.width, eps=arch.eps)
        for name, tensor in self.named_parameters():                    # the usual start, for training from scratch
            if name.endswith((".qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "_token", "pos_embed")):
                nn.init.trunc_normal_(tensor, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(tensor)

    def normalize(self, images):
        """uint8 images (B, 3, H, W) -> float32, as the weights expect them. Runs where the images are."""
        mean = torch.tensor(self.arch.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.arch.std, device=images.device).view(3, 1, 1)
        return (images / 255 - mean) / std

    def positions(self, grid):
        """The position table for a grid: CLS's row (1, 0 or 1, C) and the patches' (1, N, C)."""
        arch = self.arch
        cls, table = self.pos_embed.tensor_split([int(arch.cls_position)], dim=1)
        if grid != tuple(arch.grid):
            table = table.unflatten(1, arch.grid).permute(0, 3, 1, 2)   # (1, P, C) -> (1, C, rows, columns)
            if arch.position == "dinov2":     # DINOv2 without registers: the official rule, scale from (n + 0.1) / rows
                scale = [(n + 0.1) / m for n, m in zip(grid, arch.grid)]
                table = F.interpolate(table, scale_factor=scale, mode="bicubic")
            else:                             # every other family: timm's rule
                table = F.interpolate(table, size=grid, mode="bicubic", antialias=True)
            table = table.flatten(2).transpose(1, 2)                    # (1, C, rows, columns) -> (1, N, C)
        return cls, table

    def grid(self, height, width):
        """Image height and width in pixels -> (rows, columns) of patches."""
        patch = self.arch.patch
        if height < patch or width < patch or height % patch or width % patch:
            raise InputError(f"image size {height} x {width} is not a multiple of the patch, {patch} pixels")
        return height // patch, width // patch

    def embed(self, images):
        """Normalised images (B, 3, H, W), H and W multiples of the patch -> tokens (B, 1+R+N, C), grid."""
        B, _, height, width = images.shape
        grid, x = self.grid(height, width), self.patch_embed(images)
        tokens = ([self.cls_token] if self.arch.cls else []) + ([self.reg_token] if self.arch.registers else [])
        if self.arch.position != "rotary":
            cls_position, table = self.positions(grid)
            x = x + table
            if self.arch.cls_position:
                tokens[0] = tokens[0] + cls_position                    # registers never have a position
        x = torch.cat([*(token.expand(B, -1, -1) for token in tokens), x], dim=1)
        return self.norm_pre(x), grid

    def forward(self, images):
        """Normalised images (B, 3, H, W) -> tokens (B, 1+R+N, C) after the final norm: CLS, registers, patches."""
        x, grid = self.embed(images)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: known names, reading, converting, saving.

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
SIZES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}    # width, depth; heads of 64
HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
CLIP = dict(norm_pre=True, eps=1e-5, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
QUICK = CLIP | dict(act="quick_gelu")
DINOV3 = dict(position="rotary", layerscale=True, registers=4, cls_position=False, qkv_bias=False, eps=1e-5)
LICENCES = {"lvd1689m": "dinov3-license", "laion400m_e32": "mit"}      # by tag; all others: apache-2.0
FAMILIES = (                                  # timm's name, tags (a name without one means the first), pixels, what it has
    ("vit_{}_patch14_dinov2", "small base large", "lvd142m", 518, dict(layerscale=True, position="dinov2")),
    ("vit_{}_patch14_reg4_dinov2", "small base large", "lvd142m", 518, dict(layerscale=True, registers=4, cls_position=False)),
    ("vit_{}_patch16_dinov3", "small base large", "lvd1689m", 256, DINOV3),
    ("vit_{}_patch16_clip_quickgelu_224", "base", "openai", 224, QUICK),
    ("vit_{}_patch32_clip_quickgelu_224", "base", "openai laion400m_e32", 224, QUICK),
    ("vit_{}_patch14_clip_quickgelu_224", "large", "openai", 224, QUICK),
    ("vit_{}_patch16_clip_224", "base", "laion2b openai", 224, CLIP),
    ("vit_{}_patch32_clip_224", "base", "laion2b openai", 224, CLIP),
    ("vit_{}_patch14_clip_224", "large", "laion2b", 224, CLIP | HALF),
    ("vit_{}_patch14_clip_224", "large", "openai", 224, CLIP),
    ("vit_{}_patch16_siglip_224", "base", "webli v2_webli", 224, HALF | dict(cls=False, cls_position=False)),
    ("vit_{}_patch16_siglip_256", "base large", "webli v2_webli", 256, HALF | dict(cls=False, cls_position=False)),
    ("vit_{}_patch16_siglip_384", "base large", "webli v2_webli", 384, HALF | dict(cls=False, cls_position=False)),
    ("vit_{}_patch16_siglip_512", "base", "webli v2_webli", 512, HALF | dict(cls=False, cls_position=False)),
    ("vit_{}_patch16_224", "base", "augreg2_in21k_ft_in1k", 224, HALF),
    ("vit_{}_patch16_224", "tiny small base large", "augreg_in21k_ft_in1k augreg_in21k", 224, HALF),
    ("vit_{}_patch16_384", "tiny small base large", "augreg_in21k_ft_in1k", 384, HALF),
    ("vit_{}_patch16_224", "small base", "dino", 224, dict()),
    ("vit_{}_patch8_224", "small base", "dino", 224, dict()),
    ("deit_{}_patch16_224", "tiny small base", "fb_in1k", 224, dict()),
    ("deit3_{}_patch16_224", "small base large", "fb_in1k fb_in22k_ft_in1k", 224, dict(layerscale=True, cls_position=False)),
    ("deit3_{}_patch16_384", "small base large", "fb_in1k fb_in22k_ft_in1k", 384, dict(layerscale=True, cls_position=False)),
)


@dataclass(frozen=True)
class Known:
    """A pretrained ViT that load_vit knows by name."""
    arch: Architecture
    name: str                                 # timm's, with its tag
    licence: str                              # of the weights, as timm states it

    @property
    def repository(self):
        """timm's, on the hub. Its QuickGELU models take their weights from the plain model's."""
        return self.name.replace("_quickgelu", "")


def known_vits():
    """FAMILIES spelled out: {timm's name, with its tag and without: Known}."""
    table = {"demo": Known(Architecture(96, 6, 3, 384, patch=8, grid=(8, 8)), "demo", "mit")}     # see demo/README.md
    for template, sizes, tags, pixels, has in FAMILIES:
        for name, tag in product(map(template.format, sizes.split()), tags.split()):
            (width, depth), patch = SIZES[name.split("_")[1]], int(name.split("_patch")[1].split("_")[0])
            arch = Architecture(width, depth, width // 64, 4 * width, patch, (pixels // patch,) * 2, **has)
            table[f"{name}.{tag}"] = Known(arch, f"{name}.{tag}", LICENCES.get(tag, "apache-2.0"))
            table.setdefault(name, table[f"{name}.{tag}"])
    return table


KNOWN = known_vits()


class HubsReply(urllib.request.HTTPRedirectHandler):
    """Follows no redirect to another host: the hub's own reply, not its store's, has the file's length and hash."""

    def http_error_302(self, request, reply, code, message, headers):
        there = urljoin(request.full_url, headers.get("Location", ""))
        return super().http_error_302(request, reply, code, message, headers) if there.startswith(HUB) else reply

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def download(known):
    """The file of a known ViT, fetched on first use into torch.hub's folder and checked against the hub's length and hash."""
    url = f"{HUB}/timm/{known.repository}/resolve/main/model.safetensors"
    path = Path(torch.hub.get_dir(), "checkpoints", f"{known.repository}.safetensors")
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ask = urllib.request.Request(url, method="HEAD")
        reply = urllib.request.build_opener(HubsReply).open(ask, timeout=30)
        digest = reply.headers.get("X-Linked-ETag", "").strip('"')      # the sha256 of a large file
        size = int(reply.headers.get("X-Linked-Size" if reply.status >= 300 else "Content-Length") or 0)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest if len(digest) == 64 else None)
        if size and path.stat().st_size != size:
            raise InputError(f"expected {size} bytes, found {path.stat().st_size}")
        read_weights(path)
    except (OSError, RuntimeError, ValueError, InputError) as error:    # a cut download must not stay in the cache
        path.unlink(missing_ok=True)
        raise InputError(f"{known.name} could not be downloaded from {url} ({error}): "
                         f"get that file by other means and put it at {path}") from None
    print(f"{known.name}: downloaded to {path}, {'sha256 as the hub says' if len(digest) == 64 else 'the hub sent no sha256'}")
    return path


def resolve(weights):
    """FILE, NAME or NAME=FILE -> (path of the weight file, the Architecture that the name says or None)."""
    name, _, file = str(weights).partition("=")
    if file and name in KNOWN:
        return Path(file), KNOWN[name].arch
    if Path(weights).is_file():
        return Path(weights), None
    if name not in KNOWN or name == "demo":                             # the demo's file is in demo/, not on the hub
        raise InputError(f"{weights} is neither a weight file nor a known name: expected a .safetensors, .pth or .pt file, "
                         "NAME=FILE, or a name that `python model.py` lists")
    if "_clip_224.openai" in KNOWN[name].name:
        print(f"{name}: timm's model of this name has GELU, its weights were trained with QuickGELU: "
              f"{name.replace('clip', 'clip_quickgelu')} is exact")
    return download(KNOWN[name]), KNOWN[name].arch


def read_weights(path):
    """A .safetensors, .pth or .pt file -> (tensors {name: tensor}, header {key: value}, {} if it is not ours)."""
    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                header = (file.metadata() or {}).get("adala", "{}")
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such weight file") from None
    except Exception as error:                                          # junk makes the readers raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{path} cannot be read as a weight file, it is cut, damaged or of another kind: {reason}") from None
    for key in ("model", "state_dict", "teacher"):                      # DeiT, DINO and others wrap their tensors
        tensors = tensors[key] if isinstance(tensors, dict) and isinstance(tensors.get(key), dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in tensors.items()):
        raise InputError(f"{path} holds no dictionary of tensors by name, as a weight file should")
    return tensors, {}


@lru_cache
def skeleton(arch):
    """A ViT without memory behind its tensors: only their names and shapes."""
    with torch.device("meta"):
        return ViT(arch)


def architecture_of(tensors, path):
    """The one architecture in KNOWN that the names and shapes of tensors allow, for a file that does not say its own."""
    need = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")
    if missing := [name for name in need if name not in tensors]:
        raise InputError(f"{path} holds no Vision Transformer that is known here: it lacks {', '.join(missing)}")
    found = {(name, tensor.shape) for name, tensor in tensors.items()}
    odd = {known.name: len(found ^ {(name, tensor.shape) for name, tensor in skeleton(known.arch).state_dict().items()})
           for known in KNOWN.values() if known.arch.width == len(tensors["norm.weight"])}
    names = [name for name in odd if odd[name] == min(odd.values())]
    if not names:
        raise InputError(f"{path}: no known ViT has its width, {len(tensors['norm.weight'])}: only a file saved by us may differ")
    check_tensors(skeleton(KNOWN[names[0]].arch), tensors, path)
    if len({KNOWN[name].arch for name in names}) > 1:
        raise InputError(f"{path} does not say what it is, and its shapes fit several that differ in activation, eps, position "
                         f"rule or pixels: write NAME={path} with one of {', '.join(names)}")
    return KNOWN[names[0]].arch


def load_vit(spec, weights=None, attention=None, arch=None):
    """A pretrained ViT or a student of ours, on the CPU, float32, in eval mode.

    spec: a name in KNOWN (timm's, with or without tag; downloads on first use), a file, or NAME=FILE.
    weights: a file to read as the architecture that the name says; the same as NAME=FILE.
    attention: one of OPERATORS; None keeps what the file's header says, softmax where it says nothing.
    arch: the Architecture of a file that has neither header nor name; None finds it in the shapes, or refuses.
    Files: .safetensors, .pth, .pt, with timm's, DINO's, DINOv2's, DeiT's or our own tensor names.
    Raises InputError: no such file, not readable, ambiguous, or any tensor missing, unexpected or mis-shaped.
    """
    path, named = resolve(f"{spec}={weights}" if weights else spec)
    tensors, header = read_weights(path)
    aside = ("mask_token", "head", "fc_norm", "attn_pool")              # of other tasks, not of the backbone
    skipped = [name for name in tensors if name.startswith(aside)]
    if skipped and not header:
        print(f"{path}: skipped on purpose: {', '.join(skipped)}")
    tensors = {name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): tensor      # timm's DINOv3
               for name, tensor in tensors.items() if name not in skipped}
    if "register_tokens" in tensors:                                    # DINOv2's own files: timm adds CLS's position
        tensors["reg_token"] = tensors.pop("register_tokens")           # to CLS and keeps the patches' alone
        cls_position, tensors["pos_embed"] = tensors["pos_embed"].tensor_split([1], dim=1)
        tensors["cls_token"] = tensors["cls_token"] + cls_position
    try:
        said = header.get("architecture")
        if said is not None:
            said = Architecture(**{key: tuple(value) if isinstance(value, list) else value for key, value in said.items()})
        if said and named and said != named:
            raise InputError(f"{path} says that it is {said}, not {named} as its name does")
        arch, saved = said or named or arch or architecture_of(tensors, path), header.get("attention", "softmax")
        model = ViT(arch, saved)
    except InputError:
        raise
    except Exception as error:                                          # junk in a header makes nearly anything
        raise InputError(f"{path} has a header or tensor names of another version or program: {error}") from None
    check_tensors(model, tensors, path)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    if attention not in (None, saved):
        model = linearize(model, attention)
    model.facts = {key: value for key, value in header.items() if key not in ("architecture", "attention")}
    return model.eval()


def check_tensors(model, tensors, path):
    """Refuse a file whose tensors are not exactly the model's, naming (at most five of) those that differ."""
    want = model.state_dict()
    wrong = [f"missing: {name}" for name in want if name not in tensors]
    wrong += [f"unexpected: {name}" for name in tensors if name not in want]
    wrong += [f"mis-shaped: {name} {tuple(tensors[name].shape)} instead of {tuple(want[name].shape)}" for name in want
              if name in tensors and tensors[name].shape != want[name].shape]
    if wrong:
        more = f" and {len(wrong) - 5} more" * (len(wrong) > 5)
        raise InputError(f"{path} does not fit a ViT of width {model.arch.width}, depth {model.arch.depth}: "
                         f"{'; '.join(wrong[:5])}{more}")


def linearize(model, attention="linear"):
    """A student: a new ViT with every weight of `model` copied and the attention operator swapped.

    Plain operators add no tensor; "hedgehog" adds two feature maps a block, which start at identity.
    """
    student = ViT(model.arch, attention)
    fresh = {name: tensor for name, tensor in student.state_dict().items() if ".map_" in name}
    same = {name: tensor for name, tensor in model.state_dict().items() if ".map_" not in name or name in fresh}
    student.load_state_dict(fresh | same)
    return student.to(next(model.parameters()).device).train(model.training)


def save_vit(model, path, head=None, **facts):
    """Write a ViT (and a task head, as head.*) with its architecture, operator and facts as JSON in the header.

    The file appears whole or not at all: an interrupted save leaves the file that was there before.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.arch.position == "rotary":                                 # timm's names, so that timm reads our students
        tensors = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in tensors.items()}
    tensors |= {f"head.{name}": t.detach().cpu().contiguous() for name, t in (head.state_dict() if head else {}).items()}
    if "teacher" in facts and facts["teacher"]["file"] not in KNOWN:    # a path from the new file's folder: both can move
        beside = os.path.relpath(os.path.realpath(facts["teacher"]["file"]), path.parent.resolve())
        facts["teacher"] = facts["teacher"] | {"file": beside}
    header = {"architecture": asdict(model.arch), "attention": model.attention, **facts}
    partial_file = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file.write_bytes(save(tensors, metadata={"adala": json.dumps(header)}))   # save_file would set mode 600
        os.replace(partial_file, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} could not be written ({error}): what was there before is untouched") from None
    finally:
        partial_file.unlink(missing_ok=True)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_pair(weights, teacher=None, attention=None):
    """Stages 1 and 2: -> (frozen softmax teacher, student to train, origin: the teacher's file and hash for the header).

    weights: a softmax file, linearized with `attention` (None: "linear"), or a student, which keeps its operator.
    teacher: None takes the softmax file itself, or the file that the student's header names, if its hash is still the same.
    """
    student = load_vit(weights)
    recorded = student.facts.get("teacher")
    if student.attention.startswith("softmax"):
        teacher = teacher or weights
        student = linearize(student, attention or "linear")
    elif attention not in (None, student.attention):
        raise InputError(f"--attention {attention}, but {weights} is a student with {student.attention} attention already")
    elif teacher is None:
        if recorded is None:
            raise InputError(f"{weights} does not say which teacher it came from: give --teacher")
        beside = resolve(weights)[0].resolve().parent / recorded["file"]   # paths in a header start at the student's folder
        teacher = recorded["file"] if recorded["file"] in KNOWN else os.path.relpath(beside.resolve())
        print(f"teacher, inherited from {weights}: {teacher}")
        if (found := sha256(resolve(teacher)[0])) != recorded["sha256"]:
            raise InputError(f"{teacher} has changed since {weights} was aligned to it: expected a file with sha256 "
                             f"{recorded['sha256'][:12]}..., found {found[:12]}...")
    model = load_vit(teacher, arch=student.arch)
    if not model.attention.startswith("softmax"):
        raise InputError(f"{teacher} cannot teach: expected softmax attention, found {model.attention}")
    if model.arch != student.arch:
        raise InputError(f"{teacher} and {weights} differ in architecture: {model.arch} and {student.arch}")
    path = resolve(teacher)[0]
    return model, student, {"file": str(teacher if teacher in KNOWN else path), "sha256": sha256(path)}


# ---------------------------------------------------------------------------------------------------------------------
# Photos: which files, and the same ones held out in every stage.

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
SETS = {                                      # torchvision's self-downloading sets: (class, training and held-out part)
    "imagenette": (datasets.Imagenette, dict(split="train", size="320px"), dict(split="val", size="320px")),
    "flowers102": (datasets.Flowers102, dict(split="train"), dict(split="test")),
    "pets": (datasets.OxfordIIITPet, dict(split="trainval"), dict(split="test")),
    "voc2012": (datasets.VOCSegmentation, dict(image_set="train"), dict(image_set="val")),
}


def read_image(path, decode=True):
    """An image file -> uint8 (3, H, W), upright, RGB. decode=False only looks whether it is whole, and returns nothing."""
    try:
        if decode and decode_image and Path(path).suffix.lower() in (".jpg", ".jpeg"):
            return tv_tensors.Image(decode_image(str(path), "RGB", apply_exif_orientation=True))
        with Image.open(path) as image, open(path, "rb") as file:
            if decode:
                return to_image(ImageOps.exif_transpose(image).convert("RGB"))
            file.seek(-12, os.SEEK_END)
            end = file.read()
            if not (end.endswith(b"\xff\xd9") or end[4:8] == b"IEND"):  # the marks that close a JPEG and a PNG
                image.load()                                            # no mark: decode, a cut file raises
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image: {error}") from None


def find_images(folder):
    """Paths of all images below a folder, sorted; those in folders called `masks` are labels, not photos.

    Every file is opened here, so that a bad one ends a run before it starts and not in the middle.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*")
                   if path.suffix.lower() in SUFFIXES and "masks" not in path.relative_to(folder).parts)
    if not paths:
        raise InputError(f"{folder} holds no image: expected files that end in {', '.join(sorted(SUFFIXES))}")
    for path in paths:
        read_image(path, decode=False)
    return paths


def open_set(name, held_out, root="data"):
    """One of torchvision's sets, downloaded on first use below `root`. Items are (PIL image, label)."""
    kind, train, val = SETS[name]
    part = val if held_out else train
    try:
        try:
            return kind(root, download=False, **part)
        except RuntimeError:                                            # torchvision's word for "not there yet"
            return kind(root, download=True, **part)
    except ModuleNotFoundError as error:
        raise InputError(f"--data {name} needs a package that is not installed: pip install {error.name}") from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"--data {name} could not be downloaded to {root} ({error})") from None


def unlabelled(data):
    """Images for stages 1 and 2, which need no labels -> (training, held-out): lists of paths, or sets of (image, ...).

    data: "demo", a name in SETS, or folders of images of any depth. A folder with train/ and val/ holds out val/;
    of any other, every tenth image (at most 256).
    """
    if data == ["demo"]:
        from demo.shapes import Shapes
        return Shapes("train"), Shapes("val")
    train, held_out = [], []
    for folder in data:
        if folder in SETS:
            if len(data) > 1:
                raise InputError(f"--data {folder} cannot be mixed with others: expected one name, or folders only")
            return open_set(folder, False), open_set(folder, True)
        if Path(folder, "train").is_dir() and Path(folder, "val").is_dir():
            train += find_images(Path(folder, "train"))
            held_out += find_images(Path(folder, "val"))
        else:
            paths = find_images(folder)
            step = max(10, math.ceil(len(paths) / 256))
            held_out += paths[::step]
            train += [path for i, path in enumerate(paths) if i % step]
    if not train:
        raise InputError(f"{' '.join(data)} holds {len(held_out)} image: expected two or more, one of them is held out")
    return train, held_out


def device_and_dtype(name):
    """CUDA where there is one, and the dtype of autocast. "auto": bfloat16, float16 on GPUs without it, float32 on the CPU."""
    if not torch.cuda.is_available():
        return "cpu", torch.float32 if name == "auto" else getattr(torch, name)
    half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return "cuda", half if name == "auto" else getattr(torch, name)


def open_out(folder, model, copies=1):
    """Create an output folder, after everything else was checked and before training: is there room for the result?"""
    folder, need = Path(folder), 5 * copies * sum(p.numel() for p in model.parameters())   # float32 and a fourth for the rest
    free = shutil.disk_usage(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())).free
    if free < need:
        raise InputError(f"--out {folder} has {free / 2**20:.0f} MiB free, expected {need / 2**20:.0f} MiB for the result")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()                      # may we write there?
    except OSError as error:
        raise InputError(f"--out {folder} cannot be a folder to write to: {error}") from None
    return folder


def run(main):
    """A script's main(), with an InputError as one line on stderr and exit code 1 instead of a traceback."""
    try:
        main()
    except InputError as error:                                         # from a loader's worker: its traceback, the sentence last
        sys.exit(f"{Path(sys.argv[0]).name}: {str(error).strip().splitlines()[-1].removeprefix('model.InputError: ')}")
    except torch.OutOfMemoryError:
        sys.exit(f"{Path(sys.argv[0]).name}: out of GPU memory: try a lower --batch or --size")


if __name__ == "__main__":
    print(f"{'name (without its tag: the first of that name)':50s} M params  patch  pixels  tokens  licence")
    for name, known in KNOWN.items():
        if name == known.name != "demo":
            arch, count = known.arch, sum(p.numel() for p in skeleton(known.arch).parameters())
            print(f"{name:50s} {count / 1e6:8.1f} {arch.patch:6d} {arch.pixels[0]:7d} "
                  f"{arch.prefix + arch.grid[0] * arch.grid[1]:7d}  {known.licence}")
