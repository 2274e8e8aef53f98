"""A Vision Transformer (ViT) whose softmax attention can be exchanged for linear attention.

ViT-AdaLA (arXiv 2603.16063) turns a pretrained softmax ViT, O(N^2) in its tokens, into a
linear-attention ViT, O(N), by the stages `align_attention.py`, `align_features.py`, `finetune.py`.
This file holds what they share: first the network, up to class ViT, then pretrained weights.

    teacher = load_vit("vit_small_patch14_dinov2")      # a name (downloads), our file, or NAME=FILE
    student = linearize(teacher, "linear")              # the same weights, another operator
    tokens = student(student.normalize(images))         # uint8 (B, 3, height, width) -> (B, N, C)

Every file uses these letters. The paper's symbol stands in brackets, where it has one.
    B  images in a batch                     C  width of a token [d]
    N  tokens of an image [N]: prefix + P    H  attention heads
    P  patches of an image                   D  width of a head, C / H
    R  register tokens                       phi  feature map of linear attention [phi]
    grid    (rows, columns) of patches       prefix  tokens before the patches: CLS, registers
"""
import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch.utils.checkpoint import checkpoint

from support.runs import InputError, one_line, widen, write_whole
try:
    from support import linear_triton
except ImportError:                                     # Triton comes with torch on Linux alone
    linear_triton = None


# ---- Attention: q, k, v, each (B, H, N, D) -> one such. A definition precedes its fast form.

def softmax_reference(q, k, v):
    """out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j, written out: O(N^2) time and memory."""
    scores = q @ k.mT * q.shape[-1] ** -0.5             # (B,H,N,D) @ (B,H,D,N) -> (B,H,N,N)
    return scores.softmax(-1) @ v                       # (B,H,N,N) @ (B,H,N,D) -> (B,H,N,D)


def elu_plus_one(x):
    """phi(x) = 1 + ELU(x) (Katharopoulos et al. 2020): exp(x) below 0, 1 + x above. The clamp keeps
    it above 0 in bfloat16, too, where 1 + F.elu(x) would be 0 below -6."""
    return x.clamp(-30, 0).exp() + x.relu()


def linear_reference(q, k, v, phi=elu_plus_one):
    """out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j), written out: O(N^2)."""
    weights = phi(q) @ phi(k).mT                        # (B,H,N,D) @ (B,H,D,N) -> (B,H,N,N)
    return weights / weights.sum(-1, keepdim=True) @ v  # (B,H,N,N) @ (B,H,N,D) -> (B,H,N,D)


def linear_plain(q, k, v, phi=elu_plus_one):
    """The same with its brackets moved, phi(q) (phi(k)^T v): O(N) time and memory, no N x N map.

    phi must be positive. The paper does not publish its phi; here it is 1 + ELU, no scale, no eps.
    Sums over tokens are float32. float16 overflows at N = 785: so it is multiplied as float32."""
    with torch.autocast(v.device.type, enabled=False):  # these dtypes are chosen, not inherited
        wide = torch.promote_types(v.dtype, torch.float32)
        work = wide if v.dtype == torch.float16 else v.dtype
        q, k = phi(q.to(work).contiguous()), phi(k.to(work).contiguous())   # strided: slower
        kv = k.mT @ v.to(work)                          # (B,H,D,N) @ (B,H,N,D) -> (B,H,D,D)
        k_sum = k.sum(-2, keepdim=True, dtype=wide)     # (B,H,N,D) -> (B,H,1,D)
        total = q.to(wide) @ k_sum.mT                   # (B,H,N,D) @ (B,H,D,1) -> (B,H,N,1)
        return ((q / total).to(work) @ kv).to(v.dtype)  # (B,H,N,D) @ (B,H,D,D) -> (B,H,N,D)


def linear_attention(q, k, v, phi=elu_plus_one):
    """The same. On a GPU with Triton a kernel does it for this phi, unless ADALA_KERNEL=plain."""
    if linear_triton and phi is elu_plus_one and linear_triton.usable(q, linear_plain, k, v):
        return linear_triton.linear_attention(q, k, v)
    return linear_plain(q, k, v, phi)


class Operator(nn.Module):
    """How a block attends. A new one is a line in ATTENTION: a subclass, or partial(Operator,
    function=f) with f(q, k, v) -> out. bias_shift: stage 1 first adds it to the biases of q and k,
    so that phi starts where it is exponential."""

    def __init__(self, arch, function=None, bias_shift=0.0):
        super().__init__()
        self.function, self.bias_shift = function, bias_shift

    def forward(self, q, k, v, grid):
        """q, k, v (B, H, N, D) -> (B, H, N, D). The last rows * columns tokens are the patches,
        row by row. Rotary positions, if the ViT has them, are already in q and k."""
        return self.function(q, k, v)


class LinearConv(Operator):
    """Linear attention, plus a depthwise convolution on V over the grid of patches (JetViT), which
    adds each patch's neighbours. It starts at zero, equal to "linear". The prefix bypasses it.

    JetViT: its taps lie one patch apart on every grid. Here: (1 + s) / 2 patches, at least 1, where
    the grid's shorter side is s times that on which it learned. So it agrees better with its
    teacher there (results/README.md). Between two whole distances it is a mix of both."""

    def __init__(self, arch):
        super().__init__(arch, bias_shift=-4.0)
        self.side = arch.aligned or min(arch.grid)      # of the grid on which it learned
        self.conv = nn.Conv2d(arch.width, arch.width, 5, groups=arch.width, bias=False)
        nn.init.zeros_(self.conv.weight)

    def spread(self, x, step, share):
        """x (B, C, rows, columns) -> `share` of its convolution, taps `step` patches apart."""
        weight = share * self.conv.weight
        if x.is_cpu and torch.is_grad_enabled():        # oneDNN's bfloat16 gradient is slow, and
            x = widen(x)                # wrong of taps further apart (torch 2.11 and 2.14)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight.to(x.dtype), padding="same", dilation=step, groups=x.shape[1])

    def forward(self, q, k, v, grid):
        _, H, N, D = v.shape
        prefix = N - grid[0] * grid[1]
        x = v[:, :, prefix:].transpose(1, 2).flatten(2)                     # (B,H,P,D) -> (B,P,C)
        # In memory C is last already. PyTorch does not see that at B = 1, and is slow if not told.
        x = x.mT.unflatten(2, grid).contiguous(memory_format=torch.channels_last)
        distance = max(1.0, (1 + min(grid) / self.side) / 2)
        near, rest = int(distance), distance % 1
        y = self.spread(x, near, 1 - rest)                                  # (B,C,rows,columns)
        y = y + self.spread(x, near + 1, rest) if rest else y
        y = y.to(v.dtype).flatten(2).mT.unflatten(2, (H, D)).transpose(1, 2)    # -> (B,H,P,D)
        return linear_attention(q, k, v) + F.pad(y, (0, 0, prefix, 0))      # (B,H,N,D)


class Hedgehog(Operator):
    """Linear attention with the learned phi of LoLCATS (arXiv 2410.10254), from Hedgehog's paper:
    phi(x) = cat(softmax(W x), softmax(-W x)). W of each head starts at identity."""

    def __init__(self, arch):
        super().__init__(arch)
        eye = torch.eye(arch.width // arch.heads).repeat(arch.heads, 1, 1)
        self.map_q, self.map_k = nn.Parameter(eye), nn.Parameter(eye.clone())   # (H, D, D)

    @staticmethod
    def phi(x):                                         # (B,H,N,D) -> (B,H,N,2D), never quite 0
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1).clamp(min=1e-12)

    def forward(self, q, k, v, grid):
        return linear_attention(q @ self.map_q.mT, k @ self.map_k.mT, v, self.phi)


ATTENTION = {                                           # name -> Operator, given an Architecture
    "softmax": partial(Operator, function=F.scaled_dot_product_attention),  # fused, O(N) memory
    "softmax_reference": partial(Operator, function=softmax_reference),
    "linear": partial(Operator, function=linear_attention, bias_shift=-4.0),
    "linear_conv": LinearConv,
    "hedgehog": Hedgehog,
}


# ---- The network. Modules and tensors have timm's names, which are DINOv2's but for the registers.

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
    norm_pre: bool = False                              # CLIP's LayerNorm before the blocks
    qkv_bias: bool = True
    aligned: int = field(default=None, compare=False)   # grid's side on which its operator learned

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

    x: queries or keys (B, H, N, D) -> the same shape, the prefix as it was. Of linear attention
    the weights then depend on more than the patches' offset."""
    rows, columns = (((torch.arange(n, device=x.device) + 0.5) / n) * 2 - 1 for n in grid)
    place = torch.cartesian_prod(rows, columns).unsqueeze(-1)           # (P, 2, 1)
    quarter = x.shape[-1] // 4
    period = 100 ** (torch.arange(quarter, device=x.device) / quarter)
    angle = (2 * math.pi * place / period).flatten(1).repeat(1, 2)      # (P, 2, D/4) -> (P, D)
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
        """x (B, N, C), the residual stream -> the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x), grid))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Pre-norm Vision Transformer of every family in FAMILIES. attention: its name in ATTENTION.
    header, head: its file's facts and task head. recompute: blocks again in the backward pass."""

    def __init__(self, arch, attention="softmax"):
        super().__init__()
        if attention not in ATTENTION:
            raise InputError(f"attention '{attention}' is unknown: expected {', '.join(ATTENTION)}")
        self.arch, self.attention, self.recompute = arch, attention, False
        self.header, self.head = {}, {}
        self.patch_embed = nn.Module()                  # for its name, patch_embed.proj
        self.patch_embed.proj = nn.Conv2d(3, arch.width, arch.patch, stride=arch.patch,
                                          bias=not arch.norm_pre)       # CLIP has none
        if arch.position != "rotary":
            rows = arch.grid[0] * arch.grid[1] + arch.cls_position
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, arch.width))
        if arch.cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        if arch.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, arch.registers, arch.width))
        self.norm_pre = nn.LayerNorm(arch.width, eps=arch.eps) if arch.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(arch, attention) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.width, eps=arch.eps)
        for name, tensor in self.named_parameters():    # operators initialise their own
            if ".operator." not in name and tensor.ndim > 1:
                nn.init.trunc_normal_(tensor, std=0.02)
            elif ".operator." not in name and name.endswith(".bias"):
                nn.init.zeros_(tensor)

    def normalize(self, images):
        """uint8 images (B, 3, height, width) -> as the weights expect them, in their dtype. Mean
        and std stay Python numbers: tensors would be copied to a GPU in every call."""
        channels = zip((images / 255).unbind(1), self.arch.mean, self.arch.std)
        images = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
        return images.to(self.norm.weight.dtype)

    def grid_of(self, height, width):
        """Image height and width in pixels -> (rows, columns) of patches."""
        patch = self.arch.patch
        if min(height, width) < 1 or height % patch or width % patch:
            raise InputError(f"size {height} x {width}: expected multiples of the patch, {patch}")
        return height // patch, width // patch

    def positions(self, grid):
        """For a grid: CLS's row (1, 0 or 1, C), the patches' table (1, P, C), resized by axis."""
        arch, dtype = self.arch, self.pos_embed.dtype
        cls, table = self.pos_embed.tensor_split([int(arch.cls_position)], dim=1)
        if grid == tuple(arch.grid):
            return cls, table
        table = table[0].unflatten(0, arch.grid)        # (rows, columns, C)
        table = table.to(torch.promote_types(dtype, torch.float32))     # never in half precision
        for old, new in zip(arch.grid, grid):           # both at once take a GPU milliseconds
            rule = dict(size=(new, table[0].numel()), antialias=True)       # timm's
            if arch.position == "dinov2":               # the official one: an offset of 0.1
                rule = dict(scale_factor=((new + 0.1) / old, 1.0))
            one = F.interpolate(table.flatten(1)[None, None], mode="bicubic", **rule)[0, 0]
            table = one.unflatten(1, (-1, arch.width)).transpose(0, 1)      # the other axis first
        return cls, table.flatten(0, 1)[None].to(dtype)

    def embed(self, images):
        """Normalised images (B, 3, height, width) -> tokens (B, N, C) before the blocks, grid."""
        grid = self.grid_of(*images.shape[2:])
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)     # -> (B,P,C) row by row
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
        """Normalised images (B, 3, height, width) -> tokens (B, N, C): CLS, registers, patches."""
        x, grid = self.embed(images)
        again = self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, grid, use_reentrant=False) if again else block(x, grid)
        return self.norm(x)


# ---- Weights: known names, reading, swapping the operator, writing

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
SIZES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}  # C, depth
HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
CLIP = dict(norm_pre=True, eps=1e-5, mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711))
QUICK = CLIP | dict(act="quick_gelu")
DINOV2 = dict(layerscale=True, position="dinov2", grid=(37, 37))
REGISTERS = dict(layerscale=True, registers=4, cls_position=False, grid=(37, 37))
DINOV3 = REGISTERS | dict(position="rotary", qkv_bias=False, eps=1e-5, grid=(16, 16))
SIGLIP = HALF | dict(cls=False, cls_position=False)
DEIT3 = dict(layerscale=True, cls_position=False)
LICENCES = {"lvd1689m": "dinov3-license"}               # by tag; others: apache-2.0
FAMILIES = {    # timm's name.tag -> all but the defaults; {a,b}: one name with a, one with b
    "vit_{small,base,large}_patch14_dinov2.lvd142m": DINOV2,
    "vit_{small,base,large}_patch14_reg4_dinov2.lvd142m": REGISTERS,
    "vit_{small,base,large}_patch16_dinov3.lvd1689m": DINOV3,
    "vit_{base_patch16,base_patch32,large_patch14}_clip_quickgelu_224.openai": QUICK,
    "vit_base_patch{16,32}_clip_224.laion2b": CLIP,
    "vit_large_patch14_clip_224.laion2b": CLIP | HALF,
    "vit_base_patch16_siglip_{224,256,384,512}.{webli,v2_webli}": SIGLIP,
    "vit_large_patch16_siglip_{256,384}.{webli,v2_webli}": SIGLIP,
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": HALF,
    "vit_{tiny,small,base,large}_patch16_224.{augreg_in21k_ft_in1k,augreg_in21k}": HALF,
    "vit_{tiny,small,base,large}_patch16_384.augreg_in21k_ft_in1k": HALF,
    "vit_{small,base}_patch{16,8}_224.dino": {},
    "deit_{tiny_patch16_224,small_patch16_224,base_patch16_224,base_patch16_384}.fb_in1k": {},
    "deit3_{small,base,large}_patch16_{224,384}.{fb_in1k,fb_in22k_ft_in1k}": DEIT3,
}


def known():
    """FAMILIES, each name written out -> {name.tag: Architecture}; demo=FILE is known, too."""
    found = {"demo": Architecture(96, 6, 3, 384, patch=8, grid=(8, 8))}
    for family, special in FAMILIES.items():
        # "vit_{small,base}_x.y" -> ["vit_"], ["small", "base"], ["_x.y"] -> two names
        parts = [part.split(",") for part in re.split("[{}]", family)]
        for name in map("".join, product(*parts)):
            width, depth = SIZES[name.split("_")[1]]
            patch, pixels = re.search(r"patch(\d+).*?(?:_(\d+))?\.", name).groups()
            grid = {"grid": (int(pixels) // int(patch),) * 2} if pixels else {}
            found[name] = Architecture(width, depth, width // 64, 4 * width, int(patch),
                                       **grid | special)
    return found


KNOWN = known()
MARK = "patch_embed.proj.weight"                        # every ViT has it, by timm's name
WRAPPERS = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."     # inside names
OTHER_TASKS = ("head", "mask_token", "fc_norm", "attn_pool")            # no part of a backbone
RENAMED = {r"^blocks\.\d+\.(\d+\.)": r"blocks.\1",                      # DINOv2's block chunks
           r"^(blocks\.\d+\.)gamma_([12])$": r"\1ls\2.gamma"}           # timm's DINOv3


def download(name):
    """The weight file of a known ViT, fetched once into torch.hub's folder."""
    repository = name.replace("_quickgelu", "")         # timm keeps one file for both activations
    url = f"{HUB}/timm/{repository}/resolve/main/model.safetensors"
    path = Path(torch.hub.get_dir(), "checkpoints", f"{repository}.safetensors")
    part = path.with_suffix(f".{os.getpid()}")          # each process of torchrun has its own
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(part))
            read_weights(part)                          # refuses a file that was cut
            part.replace(path)
    except Exception as error:                          # networks fail in nearly any way
        part.unlink(missing_ok=True)
        raise InputError(f"{name} could not be downloaded from {url} ({one_line(error)}): get that "
                         f"file by other means and put it at {path}") from None
    return path


def weights_file(spec):
    """NAME, FILE or NAME=FILE -> (path, its name in KNOWN or None). A NAME is downloaded once."""
    if Path(spec).is_file():
        return Path(spec), None
    name, _, file = str(spec).partition("=")
    name = next((key for key in KNOWN if name in (key, key.partition(".")[0])), None)
    if name is None or name == "demo" and not file:     # the demo's file is not online
        raise InputError(f"'{spec}' is neither a file that exists nor a known name: expected a "
                         "file, a name that `python model.py` lists, or NAME=FILE")
    return Path(file) if file else download(name), name


def read_weights(path):
    """A weight file, whatever its suffix -> ({name: tensor}, our header; {} if it is not ours)."""
    try:
        with open(path, "rb") as file:
            start = file.read(30)
        if start[8:9] == b"{":                          # safetensors: 8 bytes of length, then JSON
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("adala", "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, header
        if start[:2] not in (b"PK", b"\x80\x02"):
            raise ValueError(f"expected safetensors or torch.save's, it starts with {start}")
        with open(path, "rb") as file:                  # of a path torch.load reads the suffix
            tree = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {}                                    # {"model": {"a": 1}} -> {"model/a": 1}
        for key, value in tree.items():
            inner = value.items() if isinstance(value, dict) else ()
            tensors |= {f"{key}/{name}": tensor for name, tensor in inner} or {str(key): value}
        return tensors, {}
    except Exception as error:                          # junk makes readers raise nearly anything
        raise InputError(f"{path} is no readable state_dict: {one_line(error)}") from None


def to_timm_names(tensors, path):
    """Anybody's tensors -> timm's names, without wrappers' words and other tasks' tensors."""
    plain = {re.sub(WRAPPERS, "", name): tensor for name, tensor in tensors.items()}
    prefixes = [name.removesuffix(MARK) for name in plain if name.endswith(MARK)]
    if len(prefixes) != 1 or len(plain) != len(tensors):        # DINO's "student", "teacher"
        raise InputError(f"expected one ViT with timm's names, found {len(prefixes)}: "
                         f"{', '.join(prefixes or list(tensors)[:3]) or 'no tensors'}")
    prefix = prefixes[0]
    own = {name.removeprefix(prefix): tensor for name, tensor in plain.items()
           if name.startswith(prefix) and not name.removeprefix(prefix).startswith(OTHER_TASKS)}
    left_out = sorted(plain.keys() - {prefix + name for name in own})
    if left_out and not all(name.startswith("head.") for name in left_out):     # our own heads
        print(f"{path}: {len(left_out)} tensors are left out: {', '.join(left_out)}")
    for pattern, new in RENAMED.items():
        own = {re.sub(pattern, new, name): tensor for name, tensor in own.items()}
    if {"register_tokens", "pos_embed", "cls_token"} <= own.keys():     # DINOv2's own: timm adds
        own["reg_token"] = own.pop("register_tokens")                   # CLS's position to CLS
        cls_position, own["pos_embed"] = own["pos_embed"].tensor_split([1], dim=1)
        own["cls_token"] = own["cls_token"] + cls_position
    return own


def load_vit(spec):
    """A pretrained ViT or a student of ours, on the CPU, float32, in eval mode.

    spec: a name in KNOWN, or without its tag the first that fits, downloaded once; a file of
    save_vit; or NAME=FILE for other files, whose tensors do not tell activation, eps or mean.
    InputError: not readable, or a tensor missing, extra, mis-shaped, integer or not finite."""
    path, name = weights_file(spec)
    tensors, header = read_weights(path)
    head = {key[5:]: x for key, x in tensors.items() if header and key.startswith("head.")}
    if not header and name is None:
        raise InputError(f"{path} does not say which ViT it is: write NAME={path} with a NAME that "
                         "`python model.py` lists")
    try:
        saved = {key: tuple(value) if isinstance(value, list) else value
                 for key, value in header.pop("architecture", {}).items()}
        # A file without "aligned" is older than the spread: its taps lie one patch apart.
        arch = Architecture(**{"aligned": 10**6} | saved) if saved or name is None else KNOWN[name]
        if name and arch != KNOWN[name]:
            raise InputError(f"its header says {arch}")
        tensors = to_timm_names(tensors, path)
        if "pos_embed" in tensors and not saved:
            patches = tensors["pos_embed"].shape[1] - arch.cls_position
            side = math.isqrt(patches)
            if side ** 2 == patches != math.prod(arch.grid):
                print(f"{path}: its position table is {side} x {side}, {name}'s is {arch.grid}")
                arch = replace(arch, grid=(side, side))
        model = ViT(arch, header.pop("attention", "softmax"))
        missing, more = model.load_state_dict(tensors, strict=False)    # raises if shapes differ
        if missing or more:
            raise InputError(f"{len(missing)} missing tensors, such as {missing[:1]}, and "
                             f"{len(more)} unexpected ones, such as {more[:1]}")
        for key, tensor in tensors.items():
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise InputError(f"{key} ({tensor.dtype}): expected finite floating-point numbers")
    except Exception as error:                          # names, shapes or kinds differ
        raise InputError(f"{path} does not fit {name or 'its header'}: {one_line(error)}") from None
    if name:
        print(f"{path}: read as {name}, mean {arch.mean}, std {arch.std}, position {arch.position}")
    model.header, model.head = header, head
    return model.eval()


def linearize(model, attention="linear", size=None):
    """A student: every weight copied, the operator swapped. A new operator starts fresh.
    size: pixels of the square images on which it will learn (default: the native size)."""
    arch, size = model.arch, model.arch.pixels[0] if size is None else size
    if attention != model.attention:
        arch = replace(arch, aligned=model.grid_of(size, size)[0])
    student = ViT(arch, attention).to(model.norm.weight)                # device and dtype
    copied = {name: tensor for name, tensor in model.state_dict().items()
              if attention == model.attention or ".operator." not in name}
    student.load_state_dict(student.state_dict() | copied)
    return student.train(model.training)


def load_pair(teacher, student=None, attention=None, size=None):
    """Stages 1 and 2: -> (softmax teacher, student to train, sha256 of the teacher's tensors).
    student: a file that this teacher aligned; None: linearize() of it, at this size, with head."""
    theirs = load_vit(teacher)
    if theirs.attention != "softmax":
        raise InputError(f"{teacher} cannot teach: expected softmax, found {theirs.attention}")
    content = hashlib.sha256()
    for name, tensor in sorted(theirs.state_dict().items()):
        content.update(name.encode() + tensor.numpy().tobytes())
    ours = load_vit(student) if student is not None else linearize(
        theirs, attention or "linear", size or theirs.header.get("size"))
    if theirs.header.get("head_kind") == "linear":      # a mask head has softmax of its own
        ours.head, of_head = theirs.head, ("task", "classes", "ids", "head_kind")
        ours.header |= {key: theirs.header[key] for key in of_head}
    if attention not in (None, ours.attention):
        raise InputError(f"--attention {attention}: {student} has {ours.attention} attention")
    if student is not None and (ours.arch, ours.header.get("teacher")) != (
            theirs.arch, content.hexdigest()):
        raise InputError(f"{student} was not aligned to {teacher}: give its own, or repeat stage 1")
    return theirs, ours, content.hexdigest()


def save_vit(model, path, head=None, **facts):
    """Write a ViT, and a task head as head.*, with architecture, operator and facts as a header."""
    tensors, head = model.state_dict(), head.state_dict() if head else model.head
    tensors |= {f"head.{name}": tensor for name, tensor in head.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"architecture": asdict(model.arch), "attention": model.attention, **facts}
    write_whole(path, save(tensors, metadata={"adala": json.dumps(header)}))


if __name__ == "__main__":
    print(f"{'name (without tag: the first)':50s} M params  patch  pixels  licence")
    for name, arch in list(KNOWN.items())[1:]:          # without the demo's
        with torch.device("meta"):
            size = sum(p.numel() for p in ViT(arch).parameters()) / 1e6
        licence = LICENCES.get(name.partition(".")[2], "apache-2.0")
        print(f"{name:50s} {size:8.1f} {arch.patch:6d} {arch.pixels[0]:7d}  {licence}")
