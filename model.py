"""A Vision Transformer (ViT) whose softmax attention can be exchanged for linear attention.

ViT-AdaLA (arXiv 2603.16063) turns a pretrained softmax ViT, O(N^2) in its tokens, into a linear-attention ViT, O(N):
`align_attention.py` (stage 1), `align_features.py` (stage 2) and `finetune.py` (stage 3), read and run in that order.
This file holds what the stages must agree on: attention operators, network, weight files, photos.

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
import urllib.error
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torchvision import datasets


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


def elu_plus_one(x):
    """phi(x) = 1 + ELU(x) > 0 (Katharopoulos et al. 2020). Adding 1 to F.elu would round to 0 in bfloat16 below x = -6."""
    return x.clamp(max=0).exp() + x.relu()


def linear_attention(q, k, v, phi=elu_plus_one):
    """out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j): vanilla linear attention, O(N) time and memory.

    The brackets move: phi(q) (phi(k)^T v) never forms the N x N map. Paper: phi, its scale and eps are not published;
    here: 1 + ELU, no scale, no eps, because dividing phi(q) *before* the product is safe in every dtype at any N:
    the sum over N tokens, which leaves float16's range at N = 785, is taken in float32. float64 stays float64.
    """
    with torch.autocast(v.device.type, enabled=False):                  # the dtypes below are chosen, not inherited
        dtype = v.dtype
        work = torch.float32 if dtype == torch.float16 else dtype       # float16: right first, its few GPUs are old
        wide = torch.promote_types(work, torch.float32)
        q, k, v = phi(q.to(work)), phi(k.to(work)), v.to(work)
        k_sum = k.sum(-2, keepdim=True, dtype=wide)                     # (B,H,1,D)
        total = (q * k_sum).sum(-1, keepdim=True)                       # (B,H,N,1), the normaliser of each query
        total = total.masked_fill(total < torch.finfo(wide).tiny, 1)    # relu: no feature active gives 0, not NaN
        q = (q / total).to(work)
        kv = k.transpose(-2, -1) @ v                                    # (B,H,D,N) @ (B,H,N,D) -> (B,H,D,D)
        return (q @ kv).to(dtype)                                       # (B,H,N,D) @ (B,H,D,D) -> (B,H,N,D)


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
    position: str = "timm"                    # how the table is resized: "timm" or "dinov2", see ViT.positions
    eps: float = 1e-6                         # of every LayerNorm
    mean: tuple = (0.485, 0.456, 0.406)       # of the pixels in [0, 1] that the weights were trained on: ImageNet's
    std: tuple = (0.229, 0.224, 0.225)

    @property
    def prefix(self):
        """Number of tokens before the patches: CLS and registers."""
        return self.cls + self.registers


class Attention(nn.Module):
    """Multi-head self-attention in three steps, so that a stage can look between them."""

    def __init__(self, arch, attention):
        super().__init__()
        self.heads, self.attention = arch.heads, attention
        self.qkv = nn.Linear(arch.width, 3 * arch.width)
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

        The last rows * columns tokens lie on the grid. No operator here looks at it; a convolution on V would.
        """
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


class Mlp(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.fc1 = nn.Linear(arch.width, arch.hidden)
        self.fc2 = nn.Linear(arch.hidden, arch.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


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
        self.proj = nn.Conv2d(3, arch.width, kernel_size=arch.patch, stride=arch.patch)

    def forward(self, images):
        """(B, 3, H, W) -> (B, N, C), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Pre-norm Vision Transformer: DINOv2 (LayerScale, registers), DINO, DeiT and other supervised ViTs.

    `attention` is one of OPERATORS. `facts` is what the header of its weight file says of its origin.
    """

    def __init__(self, arch, attention="softmax"):
        super().__init__()
        if attention not in OPERATORS:
            raise InputError(f"attention '{attention}' is unknown: expected one of {', '.join(OPERATORS)}")
        self.arch, self.attention, self.facts = arch, attention, {}
        rows = arch.grid[0] * arch.grid[1] + arch.cls_position
        self.patch_embed = PatchEmbed(arch)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, arch.width))
        if arch.cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        if arch.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, arch.registers, arch.width))
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
        grid = self.grid(height, width)
        cls_position, table = self.positions(grid)
        tokens = [self.patch_embed(images) + table]
        if self.arch.registers:
            tokens.insert(0, self.reg_token.expand(B, -1, -1))          # registers have no position
        if self.arch.cls:
            cls = self.cls_token + cls_position if self.arch.cls_position else self.cls_token
            tokens.insert(0, cls.expand(B, -1, -1))
        return torch.cat(tokens, dim=1), grid

    def forward(self, images):
        """Normalised images (B, 3, H, W) -> tokens (B, 1+R+N, C) after the final norm: CLS, registers, patches."""
        x, grid = self.embed(images)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: known names, reading, converting, saving.

FACEBOOK = "https://dl.fbaipublicfiles.com/"


def vit(width, depth=12, heads=None, patch=16, grid=(14, 14), **more):
    return Architecture(width, depth, heads or width // 64, 4 * width, patch, grid, **more)


def dinov2(letter, width, depth=12, registers=0):
    name, suffix = f"dinov2_vit{letter}14", "_reg4" if registers else ""
    position = "timm" if registers else "dinov2"
    return (vit(width, depth, patch=14, grid=(37, 37), layerscale=True, registers=registers, position=position),
            f"dinov2/{name}/{name}{suffix}_pretrain.pth")


KNOWN = {                                     # timm's name: (architecture, where its official weights are, if anywhere)
    "vit_small_patch14_dinov2": dinov2("s", 384),
    "vit_base_patch14_dinov2": dinov2("b", 768),
    "vit_large_patch14_dinov2": dinov2("l", 1024, depth=24),
    "vit_small_patch14_reg4_dinov2": dinov2("s", 384, registers=4),
    "vit_base_patch14_reg4_dinov2": dinov2("b", 768, registers=4),
    "vit_large_patch14_reg4_dinov2": dinov2("l", 1024, depth=24, registers=4),
    "vit_small_patch16_224.dino": (vit(384), "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "vit_base_patch16_224.dino": (vit(768), "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "deit_tiny_patch16_224": (vit(192), "deit/deit_tiny_patch16_224-a1311bcf.pth"),
    "deit_small_patch16_224": (vit(384), "deit/deit_small_patch16_224-cd65a155.pth"),
    "deit_base_patch16_224": (vit(768), "deit/deit_base_patch16_224-b5f2ef4d.pth"),
    "demo": (vit(96, depth=6, heads=3, patch=8, grid=(8, 8)), None),    # the demo's teacher, see demo/README.md
}


def resolve(path_or_name):
    """A weight file's path: the file itself, or a known name's file, downloaded once into torch.hub's folder."""
    path, (_, address) = Path(path_or_name), KNOWN.get(str(path_or_name), (None, None))
    if path.is_file():
        return path
    if address is None:
        raise InputError(f"{path_or_name} is neither a weight file nor a known name with weights: expected a .safetensors, "
                         f".pth or .pt file, or one of {', '.join(name for name in KNOWN if KNOWN[name][1])}")
    path = Path(torch.hub.get_dir(), "checkpoints", Path(address).name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(FACEBOOK + address, str(path), progress=True)
            read_weights(path)                                          # a cut download must not stay in the cache
        except (OSError, urllib.error.URLError, InputError) as error:
            path.unlink(missing_ok=True)
            raise InputError(f"{path_or_name} could not be downloaded from {FACEBOOK + address} ({error}): "
                             f"get that file by other means and put it at {path}") from None
    return path


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


def architecture_of(tensors, path):
    """The architecture that the shapes tell, for a file without our header."""
    need = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "norm.weight")
    if missing := [name for name in need if name not in tensors]:
        raise InputError(f"{path} holds no Vision Transformer that is known here: it lacks {', '.join(missing)}")
    if (found := [tensors[name].dim() for name in need]) != [4, 3, 2, 1]:
        raise InputError(f"{path}: {', '.join(need)} have {found} axes, expected [4, 3, 2, 1]")
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    cls, rows = "cls_token" in tensors, tensors["pos_embed"].shape[1]
    side = math.isqrt(rows)
    cls_position = cls and side * side != rows                          # 1 + 37 * 37 rows: CLS has its own
    side = math.isqrt(rows - cls_position)
    if side * side != rows - cls_position or width % 64 or width > 1024:
        raise InputError(f"{path}: cannot tell the architecture from a position table of {rows} rows and width {width}, "
                         "expected a square table and heads of 64 (width up to 1024): only a file saved by us may differ")
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    layerscale = "blocks.0.ls1.gamma" in tensors
    return Architecture(
        width=width, heads=width // 64,                                 # published ViTs Ti to L: heads of 64
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        hidden=tensors["blocks.0.mlp.fc1.weight"].shape[0], patch=patch, grid=(side, side), cls=cls,
        cls_position=cls_position, registers=registers, layerscale=layerscale,
        position="dinov2" if layerscale and cls_position and not registers else "timm")


def load_vit(path_or_name, attention=None):
    """A pretrained ViT or a student of ours, on the CPU, float32, in eval mode.

    path_or_name: a .safetensors, .pth or .pt file (timm's, DINOv2's or our tensor names), or a name in KNOWN.
    attention: one of OPERATORS; None keeps what the file's header says, softmax where it says nothing.
    Raises InputError: no such file, not readable, or any tensor missing, unexpected or mis-shaped.
    """
    path = resolve(path_or_name)
    tensors, header = read_weights(path)
    if "register_tokens" in tensors:                                    # DINOv2's name -> timm's
        tensors["reg_token"] = tensors.pop("register_tokens")
    aside = ("mask_token", "head", "fc_norm", "attn_pool")              # of other tasks, not of the backbone
    skipped = [name for name in tensors if name.startswith(aside)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    if skipped and not header:
        print(f"{path}: skipped on purpose: {', '.join(skipped)}")
    try:
        known = header["architecture"].items() if header else asdict(architecture_of(tensors, path)).items()
        arch = Architecture(**{key: tuple(value) if isinstance(value, list) else value for key, value in known})
        saved = header.get("attention", "softmax")
        model = ViT(arch, saved)
    except InputError:
        raise
    except Exception as error:                                          # junk in a header makes nearly anything
        raise InputError(f"{path} has a header or tensor names of another version or program: {error}") from None
    check_tensors(model, tensors, path)
    if not header:
        print(f"{path}: assumed, as it does not say: heads of 64, eps {arch.eps}, pixels normalised with {arch.mean}, {arch.std}")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    if attention not in (None, saved):
        model = linearize(model, attention)
    model.facts = {key: value for key, value in header.items() if key not in ("architecture", "attention")}
    return model.eval()


def check_tensors(model, tensors, path):
    """Refuse a file whose tensors are not exactly the model's, naming (at most five each of) those that differ."""
    want, some = model.state_dict(), lambda names: ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
    missing = [name for name in want if name not in tensors]
    unexpected = [name for name in tensors if name not in want]
    misshaped = [f"{name} {tuple(tensors[name].shape)} instead of {tuple(want[name].shape)}" for name in want
                 if name in tensors and tensors[name].shape != want[name].shape]
    found = [f"{kind}: {some(names)}" for kind, names in
             (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)) if names]
    if found:
        raise InputError(f"{path} does not fit a ViT of width {model.arch.width}, depth {model.arch.depth}: {'; '.join(found)}")


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
        beside = resolve(weights).resolve().parent / recorded["file"]   # paths in a header start at the student's folder
        teacher = recorded["file"] if recorded["file"] in KNOWN else os.path.relpath(beside.resolve())
        print(f"teacher, inherited from {weights}: {teacher}")
        if (found := sha256(resolve(teacher))) != recorded["sha256"]:
            raise InputError(f"{teacher} has changed since {weights} was aligned to it: expected a file with sha256 "
                             f"{recorded['sha256'][:12]}..., found {found[:12]}...")
    model = load_vit(teacher)
    if not model.attention.startswith("softmax"):
        raise InputError(f"{teacher} cannot teach: expected softmax attention, found {model.attention}")
    if model.arch != student.arch:
        raise InputError(f"{teacher} and {weights} differ in architecture: {model.arch} and {student.arch}")
    return model, student, {"file": str(teacher), "sha256": sha256(resolve(teacher))}


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
    """An image file as an upright RGB PIL image. decode=False only looks whether it is whole, and returns nothing."""
    try:
        with Image.open(path) as image, open(path, "rb") as file:
            if decode:
                return ImageOps.exif_transpose(image).convert("RGB")
            file.seek(-12, os.SEEK_END)
            end = file.read()
            if not (end.endswith(b"\xff\xd9") or end[4:8] == b"IEND"):  # the marks that close a JPEG and a PNG
                image.load()                                            # no mark: decode, a cut file raises
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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
    except (OSError, RuntimeError, urllib.error.URLError) as error:
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
