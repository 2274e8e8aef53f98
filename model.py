"""A Vision Transformer (ViT) whose softmax attention can be exchanged for linear attention.

ViT-AdaLA (arXiv 2603.16063) turns a pretrained softmax ViT, O(N^2) in its tokens, into a
linear-attention ViT, O(N): `align_attention.py` (stage 1), `align_features.py` (stage 2) and
`finetune.py` (stage 3), read and run in that order. This file holds what they share: operators and
network, which end with class ViT and are the method; then weight files, photos, runs.

    teacher = load_vit("vit_small_patch14_dinov2")      # a name (downloads), our file, or NAME=FILE
    student = linearize(teacher, "linear")              # the same weights, another operator
    tokens = student(student.normalize(images))         # uint8 (B, 3, H, W) -> (B, 1+R+N, C)

Glossary, the same letters in every file; the paper's symbol, where it has one, in brackets
    B  images in a batch                     C  width of a token [d]
    N  tokens [N]; "prefix + N", "1+R+N":    H  attention heads
       there N counts the patches alone      D  width of a head, C / H
    R  register tokens                       phi  feature map of linear attention [phi]
    grid  (rows, columns) of patches         prefix  CLS and registers, which are not on the grid
"""
import argparse
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache, partial
from itertools import count, product
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load, save
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm


# --------------------------------------------------------------------------------------------------
# Attention: q, k, v, each (B, H, N, D) -> (B, H, N, D), same dtype. Each slow definition is
# followed by its fast form; the tests compare the two.

def softmax_reference(q, k, v):
    """out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j, written out: O(N^2) time and memory."""
    scores = q @ k.mT * q.shape[-1] ** -0.5             # (B,H,N,D) @ (B,H,D,N) -> (B,H,N,N)
    return scores.softmax(-1) @ v                       # (B,H,N,N) @ (B,H,N,D) -> (B,H,N,D)


def softmax_attention(q, k, v):
    """The same with PyTorch's fused kernel: O(N^2) time, O(N) memory."""
    return F.scaled_dot_product_attention(q, k, v)


class EluPlusOne(torch.autograd.Function):
    """phi(x) = 1 + ELU(x) > 0 (Katharopoulos et al. 2020), constant below -30, where 1e-13 is left:
    queries and keys far below 0 attend to all alike, the mean of V, and never divide 0 by 0.
    Adding 1 to F.elu would round to 0 in bfloat16 below -6. The slope, min(phi, 1), is written out:
    with autograd's, a training step takes 8 to 9 % longer (CPU, results/README.md).
    """

    @staticmethod
    def forward(ctx, x):
        y = x.clamp(-30, 0).exp_() + x.relu()           # add_: torch 2.11 compiles a gradient of 0
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].clamp(max=1)


elu_plus_one = EluPlusOne.apply


def linear_reference(q, k, v, phi=elu_plus_one):
    """out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j), written out: O(N^2)."""
    weights = phi(q) @ phi(k).mT                        # (B,H,N,D) @ (B,H,D,N) -> (B,H,N,N)
    return weights / weights.sum(-1, keepdim=True) @ v  # (B,H,N,N) @ (B,H,N,D) -> (B,H,N,D)


def linear_attention(q, k, v, phi=elu_plus_one):
    """The same with its brackets moved, phi(q) (phi(k)^T v): O(N) time and memory, no N x N map.

    phi must be positive. Paper: phi, its scale and eps are not published; here: 1 + ELU without
    either. phi(q) is divided by its normaliser before the product, so every dtype stays in range.
    Sums over tokens are in float32 (float16 overflows at N = 785), and so are float16's products.
    """
    with torch.autocast(v.device.type, enabled=False):  # these dtypes are chosen, not inherited
        wide = torch.promote_types(v.dtype, torch.float32)
        work = wide if v.dtype == torch.float16 else v.dtype
        # the products would copy strided operands anyway; copied first, every step is faster
        q, k = phi(q.to(work).contiguous()), phi(k.to(work).contiguous())
        kv = k.mT @ v.to(work)                          # (B,H,D,N) @ (B,H,N,D) -> (B,H,D,D)
        k_sum = k.sum(-2, keepdim=True, dtype=wide)     # (B,H,N,D) -> (B,H,1,D)
        total = q.to(wide) @ k_sum.mT                   # (B,H,N,D) @ (B,H,D,1) -> (B,H,N,1)
        return ((q / total).to(work) @ kv).to(v.dtype)  # (B,H,N,D) @ (B,H,D,D) -> (B,H,N,D)


class Operator(nn.Module):
    """How a block attends. A new one: a subclass with its own parameters, and a line in ATTENTION.

    function: (q, k, v) -> out, for an operator that is no more than that. bias_shift: what stage 1
    adds to query and key biases before it trains (align_attention.exponential_start).
    """

    def __init__(self, arch, function=None, bias_shift=0.0):
        super().__init__()
        self.function, self.bias_shift = function, bias_shift

    def forward(self, q, k, v, grid):
        """q, k, v (B, H, prefix + N, D) -> the same shape. The last rows * columns tokens are the
        patches, row by row; rotary positions, if any, are already in q and k."""
        return self.function(q, k, v)


class Hedgehog(Operator):
    """LoLCATS' learned map: phi(x) = cat(softmax(W x), softmax(-W x)), W starting at identity."""

    def __init__(self, arch):
        super().__init__(arch)
        eye = torch.eye(arch.width // arch.heads).repeat(arch.heads, 1, 1)
        self.map_q, self.map_k = nn.Parameter(eye), nn.Parameter(eye.clone())   # (H, D, D)

    def forward(self, q, k, v, grid):
        phi = lambda x: torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1).clamp(min=1e-12)
        return linear_attention(q @ self.map_q.mT, k @ self.map_k.mT, v, phi)   # phi: D -> 2D


class LinearConv(Operator):
    """Linear attention, plus a depthwise convolution on V over the grid that starts at zero. Each
    patch gets its neighbours (JetViT), as no sum over all keys could; the prefix bypasses it."""

    def __init__(self, arch):
        super().__init__(arch, bias_shift=-4.0)
        self.conv = nn.Conv2d(arch.width, arch.width, 5, padding=2, groups=arch.width, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, q, k, v, grid):
        _, H, N, D = v.shape
        prefix = N - grid[0] * grid[1]
        x = v[:, :, prefix:].transpose(1, 2).flatten(2)                     # (B,H,N,D) -> (B,N,C)
        x = x.mT.unflatten(2, grid)                     # (B,N,C) -> (B,C,rows,columns), a view
        # In memory C is last already; PyTorch does not see that at B = 1, and is slow, if not told.
        x = self.conv(x.contiguous(memory_format=torch.channels_last))
        x = x.flatten(2).mT.unflatten(2, (H, D)).transpose(1, 2)            # -> (B,H,N,D)
        out = linear_attention(q, k, v)
        out[:, :, prefix:].add_(x)                      # in place: fresh memory costs a CPU time
        return out


ATTENTION = {                                           # name -> Operator, given an Architecture
    "softmax": partial(Operator, function=softmax_attention),
    "softmax_reference": partial(Operator, function=softmax_reference),
    "linear": partial(Operator, function=linear_attention, bias_shift=-4.0),
    "linear_conv": LinearConv,
    "relu": partial(Operator, function=partial(linear_attention, phi=lambda x: x.clamp(min=1e-6))),
    "relu2": partial(Operator, function=partial(
        linear_attention, phi=lambda x: x.relu().square() + 1e-4)),
    "hedgehog": Hedgehog,
}


# --------------------------------------------------------------------------------------------------
# The network. Modules and tensors have timm's names, which are DINOv2's but for the registers.

@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the tensors and the function of a ViT, but for its operator."""
    width: int                                          # C
    depth: int                                          # blocks
    heads: int                                          # H
    hidden: int                                         # width of the MLP's hidden layer
    patch: int                                          # pixels
    grid: tuple                                         # (rows, columns) of the position table
    cls: bool = True                                    # has a CLS token
    cls_position: bool = True                           # the table's first row belongs to CLS
    registers: int = 0                                  # R
    layerscale: bool = False
    position: str = "timm"                              # whose rule resizes the table, or "rotary"
    eps: float = 1e-6                                   # of every LayerNorm
    mean: tuple = (0.485, 0.456, 0.406)                 # of pixels in [0, 1]; here ImageNet's
    std: tuple = (0.229, 0.224, 0.225)
    act: str = "gelu"                                   # of the MLP; "quick_gelu": OpenAI's CLIP
    norm_pre: bool = False                              # CLIP's first LayerNorm; no patch bias then
    qkv_bias: bool = True

    @property
    def pixels(self):
        """Native image size (height, width): the one that the position table was made for."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def prefix(self):
        """Number of tokens before the patches: CLS and registers."""
        return self.cls + self.registers


def rotate(x, grid):
    """Rotary positions of DINOv3 (arXiv 2508.10104): turn pairs of features by a patch's place.

    x: queries or keys (B, H, prefix + N, D) -> the same shape; prefix tokens are not turned.
    Linear attention sees the turned q and k, too: still O(N), and positive weights that sum to 1.
    But phi(q) . phi(k) depends not on the patches' offset alone; stage 1 has to make up for it.
    """
    rows, columns = (((torch.arange(n, device=x.device) + 0.5) / n) * 2 - 1 for n in grid)
    place = torch.cartesian_prod(rows, columns).unsqueeze(-1)           # (N, 2, 1)
    quarter = x.shape[-1] // 4
    period = 100 ** (torch.arange(quarter, device=x.device) / quarter)
    angle = (2 * math.pi * place / period).flatten(1).repeat(1, 2)      # (N, 2, D/4) -> (N, D)
    prefix, patches = x.tensor_split([x.shape[-2] - len(angle)], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    turned = patches * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()
    return torch.cat([prefix, turned.to(x.dtype)], dim=-2)


class Attention(nn.Module):
    """Multi-head self-attention in three steps, so that stage 1 can look between them."""

    def __init__(self, arch, attention):
        super().__init__()
        self.heads, self.rotary = arch.heads, arch.position == "rotary"
        self.qkv = nn.Linear(arch.width, 3 * arch.width, bias=arch.qkv_bias)
        self.proj = nn.Linear(arch.width, arch.width)
        self.operator = ATTENTION[attention](arch)

    def project(self, x):
        """(B, N, C) -> q, k, v, each (B, H, N, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))             # (B,N,3C) -> (B,N,3,H,D)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q, k, v, grid):
        """q, k, v (B, H, N, D) -> (B, N, C), heads side by side."""
        if self.rotary:
            q, k = rotate(q, grid), rotate(k, grid)
        x = self.operator(q, k, v, grid)
        return x.transpose(1, 2).flatten(2)             # (B,H,N,D) -> (B,N,H,D) -> (B,N,C)

    def forward(self, x, grid):
        return self.proj(self.attend(*self.project(x), grid))


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}

    def __init__(self, arch):
        super().__init__()
        self.act = self.ACTIVATIONS[arch.act]
        self.fc1 = nn.Linear(arch.width, arch.hidden)
        self.fc2 = nn.Linear(arch.hidden, arch.width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


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
        self.proj = nn.Conv2d(3, arch.width, arch.patch, stride=arch.patch, bias=not arch.norm_pre)

    def forward(self, images):
        """(B, 3, H, W) -> (B, N, C), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Pre-norm Vision Transformer of every family in FAMILIES.

    attention: a name in ATTENTION. keep_softmax: this many last blocks keep softmax, and the ViT
    is not linear any more. facts: what the header of its weight file says of its origin.
    """

    def __init__(self, arch, attention="softmax", keep_softmax=0):
        super().__init__()
        if attention not in ATTENTION:
            raise InputError(f"attention '{attention}' is unknown: expected {', '.join(ATTENTION)}")
        self.arch, self.attention, self.keep_softmax, self.facts = arch, attention, keep_softmax, {}
        self.patch_embed = PatchEmbed(arch)
        if arch.position != "rotary":
            rows = arch.grid[0] * arch.grid[1] + arch.cls_position
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, arch.width))
        if arch.cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        if arch.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, arch.registers, arch.width))
        self.norm_pre = nn.LayerNorm(arch.width, eps=arch.eps) if arch.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(arch, attention if i + keep_softmax < arch.depth else "softmax")
            for i in range(arch.depth))
        self.norm = nn.LayerNorm(arch.width, eps=arch.eps)
        # Initialise for training from scratch. Operators initialise their own parameters.
        for name, tensor in self.named_parameters():
            if ".operator." not in name and tensor.ndim > 1:
                nn.init.trunc_normal_(tensor, std=0.02)
            elif ".operator." not in name and name.endswith(".bias"):
                nn.init.zeros_(tensor)

    def normalize(self, images):
        """uint8 images (B, 3, H, W) -> in the weights' dtype as they expect them, same device."""
        mean = torch.tensor(self.arch.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.arch.std, device=images.device).view(3, 1, 1)
        return ((images / 255 - mean) / std).to(self.norm.weight.dtype)

    def positions(self, grid):
        """The position table for a grid: CLS's row (1, 0 or 1, C) and the patches' (1, N, C)."""
        arch = self.arch
        cls, table = self.pos_embed.tensor_split([int(arch.cls_position)], dim=1)
        if grid != tuple(arch.grid):
            table = table.unflatten(1, arch.grid).permute(0, 3, 1, 2)   # -> (1, C, rows, columns)
            rule = dict(size=grid, antialias=True)      # timm's
            if arch.position == "dinov2":               # the official one: an offset of 0.1
                rule = dict(scale_factor=[(n + 0.1) / m for n, m in zip(grid, arch.grid)])
            table = F.interpolate(table, mode="bicubic", **rule)
            table = table.flatten(2).transpose(1, 2)    # (1, C, rows, columns) -> (1, N, C)
        return cls, table

    def grid(self, height, width):
        """Image height and width in pixels -> (rows, columns) of patches."""
        patch = self.arch.patch
        if min(height, width) < 1 or height % patch or width % patch:
            raise InputError(f"size {height} x {width}: expected multiples of the patch, {patch}")
        return height // patch, width // patch

    def embed(self, images):
        """Normalised images (B, 3, H, W) -> tokens (B, 1+R+N, C) before the first block, grid."""
        grid, x = self.grid(*images.shape[2:]), self.patch_embed(images)
        tokens = [self.cls_token] if self.arch.cls else []
        tokens += [self.reg_token] if self.arch.registers else []
        if self.arch.position != "rotary":
            cls_position, table = self.positions(grid)
            x = x + table
            if self.arch.cls_position:                  # registers never have a position
                tokens[0] = tokens[0] + cls_position
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1)
        return self.norm_pre(x), grid

    def forward(self, images):
        """Normalised images (B, 3, H, W) -> tokens (B, 1+R+N, C): CLS, registers, patches."""
        x, grid = self.embed(images)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)


# --------------------------------------------------------------------------------------------------
# Weights: known names, reading, swapping the operator, writing

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun's
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
SIZES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
CLIP = dict(norm_pre=True, eps=1e-5, mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711))
QUICK = CLIP | dict(act="quick_gelu")
DINOV2 = dict(layerscale=True, position="dinov2", grid=(37, 37))
REGISTERS = dict(layerscale=True, registers=4, cls_position=False, grid=(37, 37))
DINOV3 = REGISTERS | dict(position="rotary", qkv_bias=False, eps=1e-5, grid=(16, 16))
SIGLIP = HALF | dict(cls=False, cls_position=False)
DEIT3 = dict(layerscale=True, cls_position=False)
LICENCES = {"lvd1689m": "dinov3-license", "laion400m_e32": "mit"}       # by tag; others: apache-2.0
FAMILIES = {            # timm's name.tag, {a,b}: one name with a, one with b -> what is not default
    "vit_{small,base,large}_patch14_dinov2.lvd142m": DINOV2,
    "vit_{small,base,large}_patch14_reg4_dinov2.lvd142m": REGISTERS,
    "vit_{small,base,large}_patch16_dinov3.lvd1689m": DINOV3,
    "vit_{base_patch16,base_patch32,large_patch14}_clip_quickgelu_224.openai": QUICK,
    "vit_base_patch32_clip_quickgelu_224.laion400m_e32": QUICK,
    "vit_base_patch{16,32}_clip_224.{laion2b,openai}": CLIP,
    "vit_large_patch14_clip_224.laion2b": CLIP | HALF,
    "vit_large_patch14_clip_224.openai": CLIP,
    "vit_base_patch16_siglip_{224,256,384,512}.{webli,v2_webli}": SIGLIP,
    "vit_large_patch16_siglip_{256,384}.{webli,v2_webli}": SIGLIP,
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": HALF,
    "vit_{tiny,small,base,large}_patch16_224.{augreg_in21k_ft_in1k,augreg_in21k}": HALF,
    "vit_{tiny,small,base,large}_patch16_384.augreg_in21k_ft_in1k": HALF,
    "vit_{small,base}_patch{16,8}_224.dino": {},
    "deit_{tiny_patch16_224,small_patch16_224,base_patch16_224,base_patch16_384}.fb_in1k": {},
    "deit3_{small,base,large}_patch16_{224,384}.{fb_in1k,fb_in22k_ft_in1k}": DEIT3,
}
KNOWN = {"demo": Architecture(96, 6, 3, 384, patch=8, grid=(8, 8))}     # name.tag -> Architecture
for names, facts in FAMILIES.items():
    for name in map("".join, product(*(part.split(",") for part in re.split("[{}]", names)))):
        width, depth = SIZES[name.split("_")[1]]
        patch, pixels = re.search(r"patch(\d+).*?(?:_(\d+))?\.", name).groups()
        patch, grid = int(patch), {"grid": (int(pixels) // int(patch),) * 2} if pixels else {}
        KNOWN[name] = Architecture(width, depth, width // 64, 4 * width, patch, **grid, **facts)
MARK = "patch_embed.proj.weight"                        # every ViT has it, by timm's name
OTHER_TASKS = ("head", "mask_token", "fc_norm", "attn_pool")            # no part of a backbone
RENAMED = {r"^(blocks\.\d+\.)gamma_([12])$": r"\1ls\2.gamma",           # by timm, of DINOv3
           r"^(blocks\.\d+\.attn\.)map_([qk])\.weight$": r"\1operator.map_\2"}    # once by us


class InputError(Exception):
    """What the user gave cannot be used; one line: file, flag or tensor; expected; found."""

    def __init__(self, message):                        # files' names may hold line breaks
        super().__init__("".join(c if c.isprintable() else " " for c in str(message)))


class HubsReply(HTTPRedirectHandler):
    """The hub's own reply has the file's sha256; that of its store on another host has not."""

    def http_error_302(self, request, reply, code, message, headers):
        if not urljoin(request.full_url, headers.get("Location", "")).startswith(HUB):
            return reply
        return super().http_error_302(request, reply, code, message, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@contextmanager
def rank_0_first():
    """Other processes of torchrun wait until rank 0 is through, and find its download on disk."""
    if dist.is_initialized() and RANK > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and RANK == 0:
        dist.barrier()


@rank_0_first()
def download(name):
    """A known ViT's file, fetched once into torch.hub's folder, checked by sha256 and length."""
    repository = name.replace("_quickgelu", "")         # timm keeps one file for both activations
    url = f"{HUB}/timm/{repository}/resolve/main/model.safetensors"
    path = Path(torch.hub.get_dir(), "checkpoints", f"{repository}.safetensors")
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reply = build_opener(HubsReply).open(Request(url, method="HEAD"), timeout=30)
        digest = re.fullmatch('"(.{64})"', reply.headers.get("X-Linked-ETag", ""))
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest and digest[1])
        read_weights(path)                              # refuses another length than its header's
    except Exception as error:                          # networks fail in nearly any way
        path.unlink(missing_ok=True)                    # a cut file must not stay in the cache
        raise InputError(f"{name} could not be downloaded from {url} ({one_line(error)}): get that "
                         f"file by other means and put it at {path}") from None
    print(f"{name}: downloaded to {path}, {'sha256 checked' if digest else 'hub sent no sha256'}")
    return path


def weights_file(spec):
    """NAME, FILE or NAME=FILE -> (path, its name in KNOWN or None); a NAME is downloaded once."""
    if Path(spec).is_file():
        return Path(spec), None
    name, _, file = str(spec).partition("=")
    name = next((known for known in KNOWN if name in (known, known.partition(".")[0])), None)
    if name is None or name == "demo" and not file:     # the demo's file is in demo/, not online
        raise InputError(f"{spec} is neither a weight file nor a known name: expected a file, "
                         "NAME=FILE, or a name that `python model.py` lists")
    if "_clip_224.openai" in name:
        print(f"{name}: timm's model of this name has GELU, its weights were trained with "
              f"QuickGELU: {name.replace('clip', 'clip_quickgelu')} is exact")
    return Path(file) if file else download(name), name


def one_line(error):
    """What a library's error says, in 300 characters at most, without torch.load's advice."""
    message = str(error).rpartition("WeightsUnpickler error:")[2]
    return (" ".join(message.split()) or type(error).__name__)[:300]


def read_weights(path):
    """A weight file, whatever its suffix -> ({name: tensor}, header, {} if it is not ours)."""
    try:
        content = Path(path).read_bytes()
        if content[8:9] == b"{":                        # safetensors: 8 bytes of length, then JSON
            header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
            return load(content), json.loads(header.get("__metadata__", {}).get("adala", "{}"))
        tree = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        tensors = {}                                    # {"model": {"a": 1}} -> {"model/a": 1}
        for key, value in tree.items():
            inner = value.items() if isinstance(value, dict) else ()
            tensors |= {f"{key}/{name}": tensor for name, tensor in inner} or {str(key): value}
        return tensors, {}
    except Exception as error:                          # junk makes readers raise nearly anything
        raise InputError(f"{path} is no readable state_dict: {one_line(error)}") from None


def clean(tensors, path):
    """Anybody's tensors -> timm's names, without wrappers' prefixes and other tasks' tensors."""
    prefixes = [name.removesuffix(MARK) for name in tensors if name.endswith(MARK)]
    if len(prefixes) != 1:                              # DINO's {"student": ..., "teacher": ...}
        raise InputError(f"expected one ViT with timm's names, found {len(prefixes)}: "
                         f"{', '.join(prefixes or list(tensors)[:3]) or 'no tensors'}")
    prefix = prefixes[0]
    kept = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix) and not name.removeprefix(prefix).startswith(OTHER_TASKS)}
    left_out = sorted(tensors.keys() - {prefix + name for name in kept})
    if prefix or not all(name.startswith("head.") for name in left_out):    # not our own heads
        print(f"{path}: prefix '{prefix}', left out: {', '.join(left_out) or 'nothing'}")
    for pattern, new in RENAMED.items():
        kept = {re.sub(pattern, new, name): tensor for name, tensor in kept.items()}
    if {"register_tokens", "pos_embed", "cls_token"} <= kept.keys():    # DINOv2's own: timm adds
        kept["reg_token"] = kept.pop("register_tokens")                 # CLS's position to CLS
        cls_position, kept["pos_embed"] = kept["pos_embed"].tensor_split([1], dim=1)
        kept["cls_token"] = kept["cls_token"] + cls_position
    return kept


def load_vit(spec, attention=None):
    """A pretrained ViT or a student of ours, on the CPU, float32, in eval mode.

    spec: a name in KNOWN (timm's, without tag the first; downloaded once), a file that save_vit
    wrote, or NAME=FILE for anybody else's: tensors do not tell activation, eps, mean, positions.
    attention: a name in ATTENTION; None keeps the file's, softmax where it says nothing.
    Raises InputError: not readable; any tensor missing, unexpected, mis-shaped, integer or NaN.
    """
    path, name = weights_file(spec)
    tensors, facts = read_weights(path)
    if not facts and name is None:
        raise InputError(f"{path} does not say which ViT it is: write NAME={path} with a NAME that "
                         "`python model.py` lists")
    try:
        saved = {key: tuple(value) if isinstance(value, list) else value
                 for key, value in facts.pop("architecture", {}).items() if key != "interpolation"}
        arch = Architecture(**saved) if saved or name is None else KNOWN[name]
        model = ViT(arch, facts.pop("attention", "softmax"), facts.pop("keep_softmax", 0))
        tensors = clean(tensors, path)
        if bad := [key for key, tensor in tensors.items()
                   if not tensor.is_floating_point() or not tensor.isfinite().all()]:
            raise InputError(f"expected floating-point tensors without NaN, not {bad[:3]}")
        model.load_state_dict(tensors)
    except Exception as error:                          # names, shapes or kinds differ
        raise InputError(f"{path} does not fit {name or 'its header'}: {one_line(error)}") from None
    if name and arch != KNOWN[name]:
        raise InputError(f"{path} is no {name}, its header says {arch}")
    if name:
        print(f"{path}: read as {name}, mean {arch.mean}, std {arch.std}, "
              f"positions by the rule '{arch.position}'")
    model = model if attention in (None, model.attention) else linearize(model, attention)
    model.facts = facts
    return model.eval()


def linearize(model, attention="linear", keep_softmax=0):
    """A student: every weight copied, the operator swapped; the new one's parameters are fresh.
    What keeps softmax is what this call says, not what the model kept."""
    student = ViT(model.arch, attention, keep_softmax)
    same = (attention, keep_softmax) == (model.attention, model.keep_softmax)
    kept = {name: t for name, t in model.state_dict().items() if same or ".operator." not in name}
    student.load_state_dict(student.state_dict() | kept)
    return student.to(next(model.parameters()).device).train(model.training)


def load_pair(teacher, student=None, attention=None, keep_softmax=0):
    """Stages 1 and 2: -> (softmax teacher, student to train, sha256 of the teacher's tensors).
    student: a file that this teacher aligned; None starts from the teacher's weights."""
    theirs = load_vit(teacher)
    if theirs.attention != "softmax":
        raise InputError(f"{teacher} cannot teach: expected softmax, found {theirs.attention}")
    digest = hashlib.sha256()
    for name, tensor in sorted(theirs.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    digest = digest.hexdigest()
    if not 0 <= keep_softmax < theirs.arch.depth:
        raise InputError(f"--keep-softmax {keep_softmax}: expected 0 to {theirs.arch.depth - 1}")
    if student is None:
        return theirs, linearize(theirs, attention or "linear", keep_softmax), digest
    ours = load_vit(student)
    if attention not in (None, ours.attention) or keep_softmax not in (0, ours.keep_softmax):
        raise InputError(f"--attention {attention} --keep-softmax {keep_softmax}, but {student} "
                         f"has {ours.attention} attention and keeps {ours.keep_softmax}")
    if ours.arch != theirs.arch or ours.facts.get("teacher") != digest:
        raise InputError(f"{student} was not aligned to {teacher}, or by an earlier version: give "
                         "its own teacher, or run stage 1 again with this one")
    return theirs, ours, digest


def write_whole(path, content):
    """Write bytes, what content(file) writes, or JSON: the file appears whole or not at all."""
    if RANK > 0:
        return
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        if callable(content):
            content(buffer := io.BytesIO())
            content = buffer.getbuffer()
        elif not isinstance(content, bytes):
            content = json.dumps(content, indent=1, allow_nan=False).encode()
        part.write_bytes(content)
        part.replace(path)
    except (OSError, ValueError) as error:              # no room, or NaN where a number should be
        raise InputError(f"{path} could not be written: {one_line(error)}") from None
    finally:                                            # a signal may have ended it
        with suppress(OSError):                         # the name may be too long
            part.unlink(missing_ok=True)


def save_vit(model, path, head=None, **facts):
    """Write a ViT, and a task head as head.*, with architecture, operator and facts as a header."""
    tensors = model.state_dict()
    if model.arch.position == "rotary":                 # timm's names, so that timm reads students
        tensors = {re.sub(r"^(blocks\.\d+\.)ls([12])\.gamma$", r"\1gamma_\2", name): tensor
                   for name, tensor in tensors.items()}
    tensors |= {f"head.{name}": t for name, t in (head.state_dict() if head else {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"architecture": asdict(model.arch), "attention": model.attention,
              "keep_softmax": model.keep_softmax, **facts}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors, metadata={"adala": json.dumps(header)}))


# --------------------------------------------------------------------------------------------------
# Photos: one reader, one listing, one order of draws

BICUBIC = dict(interpolation=v2.InterpolationMode.BICUBIC, antialias=True)  # of every family
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
SETS = {            # torchvision's downloads: class, its word for a part, training, held-out part
    "imagenette": (partial(datasets.Imagenette, size="320px"), "split", "train", "val"),
    "flowers102": (datasets.Flowers102, "split", "train", "test"),
    "pets": (datasets.OxfordIIITPet, "split", "trainval", "test"),
    "voc2012": (datasets.VOCSegmentation, "image_set", "train", "val"),
}


def decode(source, short=None):
    """Path or PIL image -> PIL image: first frame, upright by EXIF or XMP; the content decides.

    short: a JPEG may be decoded at 1/2, 1/4 or 1/8, its shorter side not below twice that.
    """
    try:
        image = source
        if not isinstance(source, Image.Image):         # bytes: of a TIFF that it maps from a path,
            image = Image.open(io.BytesIO(Path(source).read_bytes()))   # Pillow turns only the size
        if short:
            image.draft(None, (2 * short, 2 * short))
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:                          # junk makes decoders raise nearly anything
        why = "unknown format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise InputError(f"{source} is not a readable image: {why}") from None


def read_image(source, short=None):
    """The one reader of photos, see decode: -> uint8 (3, H, W), RGB, no alpha.

    source: a path, a PIL image, an item that begins with one, or a drawn image, which stays.
    16 bits and floats from 0 to 1 are scaled; InputError for a range that the file does not say.
    """
    source = source[0] if isinstance(source, tuple) else source
    if isinstance(source, torch.Tensor):
        return source
    image = decode(source, short)
    if image.mode[0] not in "FI":                       # floats; integers, "I;16" among them
        return v2.functional.pil_to_tensor(image.convert("RGB"))
    pixels = v2.functional.pil_to_tensor(image.convert("F")) / (1 if image.mode == "F" else 65535)
    unsaid = image.mode == "I" and image.format != "PPM"
    if unsaid or not ((pixels >= 0) & (pixels <= 1)).all():
        raise InputError(f"{source} is an image of unknown range: expected 8 or 16 bits or floats "
                         f"from 0 to 1, found mode {image.mode}")
    return (pixels * 255).round().to(torch.uint8).expand(3, -1, -1)


def walk(folder, above=()):
    """Every file below a folder, sorted; links are followed, but not in circles; no dot names."""
    above = (*above, os.path.realpath(folder))
    for path in sorted(p for p in Path(folder).iterdir() if not p.name.startswith(".")):
        if not path.is_dir():
            yield path
        elif (mark := path / "run.json").is_file() and b'"script"' in mark.read_bytes():
            print(f"{path}: left out, a run of this program wrote it")
        elif os.path.realpath(path) not in above:
            yield from walk(path, above)


def is_label_map(path):
    """Stored without loss, and of few values: a mask rather than a photo."""
    lossless = path.suffix.lower() in (".png", ".tif", ".tiff", ".bmp")
    with suppress(InputError):                          # a damaged photo is named when it is drawn
        return lossless and len(np.unique(decode(path))) <= 64
    return False


def say_left_out(folder, files):
    suffixes = Counter(path.suffix.lower() or "without suffix" for path in files)
    if suffixes:
        reasons = ", ".join(f"{n} {suffix}" for suffix, n in suffixes.most_common())
        print(f"{folder}: {len(files)} files not read: {reasons}")


def find_images(folder):
    """Paths of all images below a folder, sorted. None is opened but a few that may be label maps.

    A folder is left out if most of its first files are label maps and all are called like photos in
    another: x.png or x_L.png like x.jpg, x_0001_gtFine_labelIds.png like x_0001_leftImg8bit.png.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder")
    by_folder, others = defaultdict(list), []
    for path in walk(folder):
        kind = by_folder[path.parent] if path.suffix.lower() in SUFFIXES else others
        kind.append(path)
    say_left_out(folder, others)
    first = {name: paths[:8] for name, paths in by_folder.items()}
    labels = [name for name in first if 2 * sum(map(is_label_map, first[name])) > len(first[name])]
    scene = lambda path: re.sub(r"(\d{4})_\D.*", r"\1", path.stem)
    photos = {scene(path) for name in by_folder.keys() - labels for path in by_folder[name]}
    for name in labels:
        if all({scene(path), path.stem.rpartition("_")[0]} & photos for path in first[name]):
            print(f"{name}: {len(by_folder.pop(name))} files left out, they are label maps")
    if not by_folder:
        raise InputError(f"{folder} holds no photo: expected {', '.join(sorted(SUFFIXES))}")
    return sorted(str(path) for paths in by_folder.values() for path in paths)


@rank_0_first()
def open_set(name, root="data"):
    """One of torchvision's sets, downloaded to `root` on first use -> [training, held-out part]."""
    kind, argument, *parts = SETS[name]
    try:
        return [kind(root, download=True, **{argument: part}) for part in parts]
    except (ModuleNotFoundError, OSError, RuntimeError) as error:       # a package, or the network
        raise InputError(f"--data {name} could not be had in {root}: {one_line(error)}") from None


def unlabelled(data):
    """Photos for stages 1 and 2 -> (training, held out): paths, or items that begin with an image.

    data: folders of any depth, or names in SETS, which a folder of that name beats. A folder with
    train/ and val/ holds out val/; of any other every tenth photo is held out, at most 256.
    """
    parts = []
    for folder in data:
        if folder in SETS and not Path(folder).is_dir():
            parts.append(open_set(folder))
        elif Path(folder, "train").is_dir() and Path(folder, "val").is_dir():
            parts.append([find_images(Path(folder, part)) for part in ("train", "val")])
        else:
            paths = find_images(folder)
            step = max(10, math.ceil(len(paths) / 256))
            parts.append([[path for i, path in enumerate(paths) if i % step], paths[::step]])
    train, held_out = map(ConcatDataset, zip(*parts))
    if not len(train):
        raise InputError(f"{' '.join(map(str, data))} holds one photo, held out: expected more")
    return train, held_out


def seed_of(*parts):
    """Any values -> a seed of 32 bits, which is all that PyTorch's generator looks at."""
    return zlib.crc32(repr(parts).encode())


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, "epoch", epoch)))


class Draws(Dataset):
    """Draw i of a run -> (transform(read(item)), names of unreadable photos passed over).

    A function of (seed, i) alone, so any number of workers sees the same data: every epoch is a
    permutation; the next photo of it takes the place of an unreadable one. seed None: in order.
    """

    def __init__(self, source, read, transform, seed=None):
        self.source, self.read, self.transform, self.seed = source, read, transform, seed

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        n, unread = len(self), []
        order = range(n) if self.seed is None else permutation(n, self.seed, i // n)
        for place in range(i, i + n):
            try:
                item = self.read(self.source[int(order[place % n])])
            except InputError as error:
                unread.append(str(error))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.seed, i))
                return self.transform(item), "\n".join(unread)
        raise InputError(f"none of {n} photos can be read, the last: {unread[-1]}")


def note_unread(messages, unread, listed):
    """Name each unreadable photo once; refuse when they exceed one, and one in a hundred listed."""
    for message in set(filter(None, "\n".join(messages).split("\n"))) - set(unread):
        unread.append(message)
        print(f"left out: {message}")
    if len(unread) > max(1, listed / 100):
        raise InputError(f"{len(unread)} of {listed} photos cannot be read, the last: {unread[-1]}")


# --------------------------------------------------------------------------------------------------
# Runs: flags, torchrun's processes, and the state from which a stopped run goes on

def pair_flags(flag, demo):
    """The flags of stages 1 and 2 that name a pair of ViTs and the photos to align them on."""
    flag("--teacher", help="softmax ViT to imitate: a known name, a file of ours or NAME=FILE "
         f"(demo: {demo['teacher']})")
    flag("--student", help="a student of this teacher to train further (default: the teacher, "
         f"swapped; demo: {demo.get('student', 'the same')})")
    flag("--attention", choices=ATTENTION, help="operator without --student (default: linear)")
    flag("--keep-softmax", type=int, default=0, help="this many last blocks keep softmax, O(N^2) "
         "(default: 0, all are linear)")
    flag("--data", nargs="+", help="folders of images, or torchvision sets (default: the demo's)")


def run_flags(flag, out, defaults, demo):
    """The flags that say nothing of the method, the same in all stages."""
    cuda = torch.cuda.is_available()
    flag("--size", type=int, help="pixels, a multiple of the patch (default: that of a fine-tuned "
         "checkpoint, else the weights' native)")
    for key in ("steps", "batch_size"):
        flag(f"--{key.replace('_', '-')}", type=int,
             help=f"(default: {defaults[key]}, demo: {demo[key]})")
    flag("--workers", type=int, default=min(8, os.cpu_count() or 1) if cuda else 0,
         help="processes that load photos (default: up to 8 on a GPU, else 0)")
    flag("--dtype", choices=("auto", "float64", "float32", "bfloat16", "float16"), default="auto",
         help="of autocast (default: auto, bfloat16 where the machine has it, float16 on older "
         "GPUs, else float32); float64: weights and all computation")
    flag("--compile", action=argparse.BooleanOptionalAction, default=cuda,
         help="torch.compile (default: on a GPU)")
    flag("--seed", type=int, default=0, help="of photos, crops, flips and heads (default: 0)")
    flag("--out", default=out, help=f"folder to write (default: {out})")
    flag("--every", type=int, help="steps between held-out scores (default: ten times a run)")
    flag("--save-every", type=float, default=120, help="seconds between states from which the same "
         "command goes on (default: 120, the first after 30)")


def complete(args, defaults, demo):
    """Fill in flags that were not given: by `defaults`; without --data by `demo`, and say so."""
    for key, value in (defaults if args.data else demo).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if "teacher" in demo and args.teacher is None:
        raise InputError("--teacher is missing: with --data, name the softmax ViT to imitate")
    if args.every is None:
        args.every = max(1, args.steps // 10)
    if args.data is None and demo != defaults:
        print("demo:", *(f"--{key.replace('_', '-')} {getattr(args, key)}" for key in demo))
        if args.size != demo["size"]:
            raise InputError(f"--size {args.size}: the demo's images have {demo['size']} pixels, "
                             "--data names your own")
    for key, least in dict(steps=0, workers=0, save_every=0, batch_size=1, every=1).items():
        if not (value := getattr(args, key)) >= least:
            raise InputError(f"--{key.replace('_', '-')} {value}: expected {least} or more")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise InputError(f"--lr {args.lr}: expected a number above 0")
    if args.batch_size % WORLD:
        raise InputError(f"--batch-size {args.batch_size} is of all {WORLD} processes: expected a "
                         "multiple of their number")
    return args


def device_and_dtype(args):
    """-> (CUDA where there is one, dtype of autocast); joins torchrun's processes, if there are.
    "auto" in args.dtype becomes what it is here: a state goes on in its own precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo",
                                timeout=timedelta(hours=12))    # rank 0 may download for long
    torch.backends.cudnn.allow_tf32 = False             # else convolutions in float32 are not
    if args.dtype == "auto":
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else
                  getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # no public name yet
        args.dtype = "bfloat16" if native else {"cuda": "float16", "cpu": "float32"}[device]
    return device, getattr(torch, args.dtype)


def autocast(device, dtype):
    """torch.autocast for half precision; in float32 and float64 everything stays as it is.
    What is compiled enters it inside, since its backward runs under the autocast of its call."""
    return torch.autocast(device, dtype, enabled=dtype in (torch.bfloat16, torch.float16))


bar = partial(tqdm, leave=False, delay=2, disable=RANK > 0)     # over what may take a while


def widen(tensor):
    """To float32, in which losses are summed; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def average(tensors):
    """Put the mean over torchrun's processes in each tensor's place; -> those that are not None."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    for tensor in tensors if WORLD > 1 else ():
        dist.all_reduce(tensor)
        tensor /= WORLD
    return tensors


def update(scaler, optimizer, schedule, groups):
    """After the backward: average gradients, clip them by group, step. -> the last group's rate."""
    average(p.grad for group in groups for p in group)
    scaler.unscale_(optimizer)
    for group in groups:
        nn.utils.clip_grad_norm_(group, 1.0)
    scaler.step(optimizer)
    scaler.update()
    rate = schedule.get_last_lr()[-1]
    schedule.step()
    optimizer.zero_grad()
    return rate


def one_cycle(optimizer, steps):
    """Up to each group's rate in a tenth of the steps, then down to next to nothing."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], max(steps, 10) + 1,
        pct_start=0.1, cycle_momentum=False)


def views(size):
    """Photos to squares: -> (a random crop, mirrored or not, for training; all of the middle)."""
    return (v2.Compose([v2.RandomResizedCrop(size, (0.35, 1), **BICUBIC),
                        v2.RandomHorizontalFlip()]),
            v2.Compose([v2.Resize(size, **BICUBIC), v2.CenterCrop(size)]))


def loaders(args, source, held_out, first, most=256):
    """Stages 1 and 2: -> (batches of the draws after step `first`, held-out batches in order).
    At most `most` held-out photos are used: more change no table's second digit."""
    crop, whole = views(args.size) if args.data else (v2.Identity(), v2.Identity())
    read = partial(read_image, short=args.size)
    loader = partial(DataLoader, num_workers=args.workers, pin_memory=torch.cuda.is_available(),
                     worker_init_fn=leave_signals)
    draws = range(first * args.batch_size + RANK, args.steps * args.batch_size, WORLD)
    train = loader(Draws(source, read, crop, args.seed), args.batch_size // WORLD, sampler=draws)
    few = Subset(held_out, range(0, len(held_out), math.ceil(len(held_out) / most)))
    return train, loader(Draws(few, read, whole), args.batch_size // WORLD)


def fingerprint(weights, *sources):
    """sha256 of weight files and of the names that datasets list: what a saved state belongs to."""
    parts = [part for source in sources for part in getattr(source, "datasets", [source])]
    names = [part if isinstance(part, list) else [type(part).__name__, len(part)] for part in parts]
    digest = hashlib.sha256(repr(names).encode())
    for spec in filter(None, weights):
        digest.update(weights_file(spec)[0].read_bytes())
    return digest.hexdigest()


def hold(mark, out):
    """Refuse a folder to which another living run writes; a lock of a dead process is none."""
    if RANK > 0 or os.name != "posix":                  # Windows has no such lock
        return
    import fcntl
    hold.file = open(mark, "r+b")                       # locked while this process lives
    try:
        fcntl.lockf(hold.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"--out {out} is being written by another run: wait for its end, or name "
                         "another folder") from None
    except OSError:                                     # a file system without locks
        pass


def open_out(args, inputs, read=""):
    """Make the folder --out, or find the state of a stopped run in it: -> (folder, state or None).

    Called after all checks, before training. Nothing is ever overwritten: refused is a folder that
    is, holds or lies in one of `inputs`, or that no run of ours wrote; what an earlier run wrote
    moves to OUT-1, OUT-2, ..., unless that run was stopped and had the same arguments (but for
    workers and saves).
    read: fingerprint of what is read; a state is refused if that has changed since.
    """
    out = Path(os.path.realpath(args.out))
    for given in map(str, filter(None, inputs)):
        forms = {given, given.partition("=")[2], "data" if given in SETS else ""}
        forms |= {form.rpartition(":")[0] for form in forms}            # NAME=FILE:OPERATOR
        for file in map(Path, filter(os.path.exists, forms)):
            for real in (file.resolve(), file.parent.resolve() / file.name):    # target, link
                if out.is_relative_to(real) or real.is_relative_to(out):
                    raise InputError(f"--out {args.out} is, holds or lies in {given}, which is "
                                     "read: name another folder")
    state, mark = out / "state.pt", out / "run.json"
    numbers = {key: value for key, value in vars(args).items()
               if key not in ("workers", "save_every")}     # these may change while it is stopped
    settings = json.dumps({"script": Path(sys.argv[0]).name, **numbers}, indent=1).encode()
    try:
        if RANK == 0 and out.is_dir() and {p.name for p in out.iterdir()} - {".run.json.part"}:
            found = mark.read_bytes() if mark.is_file() else b""
            if b'"script"' not in found:
                raise InputError(f"--out {args.out} holds files that no run of this version wrote: "
                                 "name an empty or a new folder")
            hold(mark, args.out)                        # to read it after this would unlock it
            if not state.is_file() or found != settings:
                aside = next(p for i in count(1) if not os.path.lexists(p := Path(f"{out}-{i}")))
                out.rename(aside)
                print(f"--out {args.out}: an earlier run was there, now in {aside.name}")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out} cannot be written to: {one_line(error)}") from None
    if WORLD > 1:
        dist.barrier()                                  # the folder is as rank 0 leaves it
    if state.is_file():
        try:
            saved = torch.load(state, map_location="cpu", weights_only=True)
        except Exception:                               # junk makes readers raise nearly anything
            raise InputError(f"{state} is cut or damaged, or holds more than tensors: remove it, "
                             "and the same command begins anew") from None
        if saved["read"] != read:
            raise InputError(f"--out {args.out} holds a stopped run, whose weight file or photos "
                             "have changed: put them back, or name another --out")
        print(f"--out {args.out}: goes on from step {saved['step']} of {args.steps}")
    else:
        saved = None
        write_whole(mark, settings)
        hold(mark, args.out)
    return Path(args.out) if os.path.realpath(args.out) == str(out) else out, saved   # "." moved


class Stopped(KeyboardInterrupt):
    """A signal ended the run; run() is told its number, and what is left to say."""


def interrupt(number, _):
    """Outside the loop over steps: end at once, without a traceback."""
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(number, "the same command goes on from the last state, if there is one")


def leave_signals(_):
    """A loader's worker: Ctrl-C reaches it too, and what ends it is the main process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Progress:
    """A run on its way: log.jsonl, the bar, and OUT/state.pt, from which the same command goes on.

    saved: what open_out found. kept: what else the end of the run needs: numbers, text, tensors.
    parts: what a step changes, each with a state_dict. Used with `with`, around the loop.
    """

    def __init__(self, args, out, saved, read, kept, **parts):
        self.args, self.out, self.read, self.kept, self.parts = args, out, read, kept, parts
        self.step, self.seconds, self.signal = 0, 0.0, 0
        self.log = io.BytesIO() if RANK else open(out / "log.jsonl", "ab")
        if saved:
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.log.truncate(min(saved["logged"], self.log.tell()))    # later lines: done again
        if WORLD > 1:                                   # all processes begin as rank 0 does
            modules = [part for part in parts.values() if isinstance(part, nn.Module)]
            for tensor in nn.ModuleList(modules).state_dict().values():
                dist.broadcast(tensor, 0)

    def __enter__(self):
        self.start = time.perf_counter() - self.seconds
        self.due = time.perf_counter() + min(30, self.args.save_every)
        size, total = self.args.batch_size, self.args.steps
        self.bar = tqdm(total=total * size, initial=self.step * size, unit="img", mininterval=1,
                        disable=RANK > 0)
        self.before = {number: signal.signal(number, self.stop)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def stop(self, number, _):
        """The step is finished first. A second signal ends at once; torchrun's is ignored."""
        self.signal = number
        for each in self.before:
            signal.signal(each, signal.SIG_IGN if WORLD > 1 else signal.SIG_DFL)

    def done(self, loss, **row):
        """After a step: a line in the log, the bar, the state when it is due; may end the run."""
        self.step, self.seconds = self.step + 1, time.perf_counter() - self.start
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {self.step}: try a lower --lr than "
                             f"{self.args.lr}; no state is saved after step {self.step - 1}")
        row = dict(step=self.step, loss=loss, **row, seconds=round(self.seconds, 2))
        self.log.write(json.dumps(row).encode() + b"\n")
        self.bar.update(self.args.batch_size)
        self.bar.set_postfix(loss=f"{loss:.4f}")
        stop = torch.tensor(self.signal, dtype=torch.float32,
                            device="cuda" if torch.cuda.is_available() else "cpu")
        average([stop])                                 # all processes stop after the same step
        if stop:
            raise Stopped
        if time.perf_counter() > self.due:
            self.save()

    def save(self):
        self.log.flush()
        self.due = time.perf_counter() + self.args.save_every
        state = dict(read=self.read, step=self.step, seconds=self.seconds, kept=self.kept,
                     parts={name: part.state_dict() for name, part in self.parts.items()},
                     logged=self.log.seek(0, os.SEEK_END))
        write_whole(self.out / "state.pt", partial(torch.save, state))

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.bar.close()
        if kind in (None, Stopped):
            self.save()                                 # what follows, scoring, may be stopped, too
        if kind is Stopped and WORLD > 1:
            dist.barrier()                              # none ends before the state is written
        self.log.close()
        if kind is Stopped or kind is None and self.signal:     # since the last step was logged
            raise Stopped(self.signal or signal.SIGTERM, f"step {self.step}, {self.out}/state.pt: "
                          "the same command goes on from here")

    def finish(self):
        """The run is over and its files are written: no state is needed. Draws the log's curves."""
        if RANK > 0:                                    # it may be over before rank 0 has written
            return
        with suppress(ModuleNotFoundError):             # without matplotlib no curves
            from matplotlib.figure import Figure
            rows = [json.loads(line) for line in open(self.out / "log.jsonl")]
            figure = Figure(figsize=(8, 4), layout="constrained")
            axes = figure.subplots(1, 2)
            names = dict.fromkeys(row.get("weights") for row in rows)       # None in stages 1, 2
            for (key, axis), name in product(zip(("loss", "held_out"), axes), names):
                curve = [(row["step"], row[key]) for row in rows
                         if key in row and row.get("weights") == name]
                axis.plot(*zip(*curve), label=name, linewidth=1)
                axis.set(xlabel="step", title=key.replace("_", " "))
            if any(names):
                axes[0].legend(fontsize=6)
            if rows:
                write_whole(self.out / "curves.png", partial(figure.savefig, dpi=100))
        (self.out / "state.pt").unlink(missing_ok=True)


def run(main):
    """A script's main(), with what a user can mend as one line on stderr instead of a traceback."""
    with suppress(ImportError, OSError, ValueError):    # Windows has no limit, others may refuse
        import resource                                 # workers send each tensor as an open file
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")            # a terminal that cannot print a file's name
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    for number in (signal.SIGINT, signal.SIGTERM):      # a parent process may have them ignored
        signal.signal(number, interrupt)
    script, code = Path(sys.argv[0]).name, 1
    try:
        main()
        return dist.destroy_process_group() if dist.is_initialized() else None
    except InputError as error:                         # a loader's worker sends its traceback, too
        message = str(error).rpartition("model.InputError: ")[2].strip()
    except torch.OutOfMemoryError:
        message = "out of GPU memory: try a lower --batch-size or --size"
    except OSError as error:
        message = one_line(error)
    except Stopped as stop:
        number, left = stop.args
        message, code = f"stopped by {signal.Signals(number).name}: {left}", 128 + number
    if RANK == 0 or code == 1:
        print(f"{script}: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    print(f"{'name (without tag: the first)':50s} M params  patch  pixels  licence")
    for name, arch in list(KNOWN.items())[1:]:
        with torch.device("meta"):
            size = sum(p.numel() for p in ViT(arch).parameters()) / 1e6
        licence = LICENCES.get(name.partition(".")[2], "apache-2.0")
        print(f"{name:50s} {size:8.1f} {arch.patch:6d} {arch.pixels[0]:7d}  {licence}")
