"""The demo's data, drawn here: which of five shapes has the colour of the ring?

Each image holds a ring and five filled shapes. All have different colours but one shape, which has
the ring's. The label is the kind of that shape. The mask marks its pixels (1 + kind); everything
else is background (0). No patch can know its label alone: the ring's colour must be found, carried
to every shape and compared, which is what attention is for.

    python demo/shapes.py            # writes demo/shapes.png, validation images beside their masks
"""
from pathlib import Path

import torch
from torch.utils.data import Dataset

SIZE, CELL = 64, 16             # pixels of an image, and of a cell of its 4 x 4 board
KINDS = ("disc", "square", "triangle", "cross")
COLOURS = torch.tensor([[.90, .20, .20], [.20, .75, .25], [.25, .40, .95],
                        [.95, .85, .20], [.80, .30, .85], [.20, .80, .85]])
IMAGES = {"train": 16_000, "val": 2_000}


def outline(kind, x, y):
    """Distance-like value of a unit shape at (x, y): below 1 inside, above 1 outside. kind: 0 to 3
    are KINDS, 4 is the ring."""
    radius = (x * x + y * y).sqrt()
    return torch.stack([
        radius,
        torch.maximum(x.abs(), y.abs()) / 0.85,
        torch.maximum(y, 1.8 * x.abs() - y) * 0.55 + 0.45,
        torch.maximum(torch.maximum(x.abs(), y.abs()), 0.65 + torch.minimum(x.abs(), y.abs())),
        1 + (radius - 0.75).abs() - 0.25,
    ]).gather(0, kind.expand(1, *x.shape))[0]


def draw(n, seed):
    """n samples -> images uint8 (n, 3, 64, 64), labels int64 (n,), masks uint8 (n, 64, 64)."""
    random = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(shape, generator=random)
    places = uniform(n, 16).argsort(1)[:, :6]                   # (n, 6) cells: shapes, then ring
    colours = uniform(n, 6).argsort(1)                          # (n, 6): all different ...
    colours[:, 5] = colours[:, 0]                               # ... but the ring's: the first's
    kinds = (4 * uniform(n, 6)).long()
    kinds[:, 5] = 4
    paint = COLOURS[colours] + 0.08 * torch.randn(n, 6, 3, generator=random)
    clouds = torch.nn.functional.interpolate(uniform(n, 3, 4, 4), size=SIZE, mode="bicubic")
    images = 0.35 + 0.25 * clouds + 0.06 * torch.randn(n, 1, SIZE, SIZE, generator=random)

    every, pixel = torch.arange(n), torch.arange(CELL) + 0.5
    board = images.view(n, 3, 4, CELL, 4, CELL).permute(0, 2, 4, 1, 3, 5)
    board = board.flatten(1, 2)                                 # (n, 16 cells, 3, 16, 16)
    masks = torch.zeros(n, 16, CELL, CELL, dtype=torch.uint8)
    for i in range(6):
        radius = 5 + 2 * uniform(n, 1, 1)
        y = (pixel.view(1, CELL, 1) - CELL / 2 + 2 * uniform(n, 1, 1) - 1) / radius
        x = (pixel.view(1, 1, CELL) - CELL / 2 + 2 * uniform(n, 1, 1) - 1) / radius
        x, y = torch.broadcast_tensors(x, y)
        inside = (1 - outline(kinds[:, i].view(n, 1, 1), x, y)) * radius + 0.5
        inside = inside.clamp(0, 1)                             # edges one pixel soft
        place = places[:, i]
        colour = paint[:, i].view(n, 3, 1, 1)
        board[every, place] = board[every, place].lerp(colour, inside.unsqueeze(1))
        if i == 0:
            masks[every, place] = torch.where(inside > 0.5, 1 + kinds[:, :1, None], 0).byte()
    images = board.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIZE, SIZE)
    masks = masks.unflatten(1, (4, 4)).transpose(2, 3).reshape(n, SIZE, SIZE)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), kinds[:, 0], masks


class Shapes(Dataset):
    """Items (image uint8 (3, 64, 64), label, mask uint8 (64, 64)); machines differ by rounding."""
    classes = KINDS

    def __init__(self, split):
        parts = [draw(1000, seed=1000 * (split == "val") + i) for i in range(IMAGES[split] // 1000)]
        self.images, self.labels, self.masks = (torch.cat(part) for part in zip(*parts))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i]), self.masks[i]


if __name__ == "__main__":
    from torchvision.utils import save_image
    shown, _, truth = (part[:8] for part in draw(1000, seed=1000))         # as Shapes("val")
    pairs = torch.cat([shown / 255, truth.unsqueeze(1).expand(-1, 3, -1, -1) / 4])
    save_image(pairs, Path(__file__).with_suffix(".png"), nrow=8)
