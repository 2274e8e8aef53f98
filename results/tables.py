"""README's and results/README.md's tables, from the CSV files beside this one: python results/tables.py [device]"""
import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def read(name):
    """Rows of a CSV as dictionaries; numbers stay text. A file that is not there has none."""
    path = HERE / name
    return list(csv.DictReader(path.open())) if path.exists() else []


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def times(value):
    return f"{float(value):.2f}x"


def mode(device):
    """How bench.py runs on it when it is not told."""
    return "eager" if device == "cpu" else "compiled"


def curves(device):
    """Rows of part model, both dtypes."""
    return [row for dtype in ("float32", "bfloat16") for row in read(f"bench-{device}-model-{dtype}-{mode(device)}.csv")]


def gains(device):
    """Images/s of the linear ViTs, and how many times that of fused softmax they are."""
    rows = [row for row in curves(device) if row["images_per_s"]]
    value = {tuple(row[key] for key in ("model", "batch", "dtype", "name", "pixels")): row for row in rows}
    pixels = dict.fromkeys(row["pixels"] for row in rows)
    lines = dict.fromkeys(key[:4] for key in value if key[3].startswith("linear"))

    def cell(line, p):
        row = value.get((*line, p))
        return f"{float(row['images_per_s']):.2f} ({1 / float(row['ratio']):.2f}x)" if row and row["ratio"] else "-"

    return table(["model, batch, dtype, operator", *(f"{p} px" for p in pixels)],
                 [[", ".join(line), *(cell(line, p) for p in pixels)] for line in lines])


def memory(device):
    """Peak MB of a forward pass at batch 1, on top of weights and images: written out / fused / linear."""
    rows = read(f"bench-{device}-model-float32-{mode(device)}.csv")
    value = {(row["model"], row["pixels"], row["name"]): f"{float(row['peak_mb']):,.0f}" for row in rows if row["batch"] == "1" and row["peak_mb"]}
    pixels, models = dict.fromkeys(row["pixels"] for row in rows), dict.fromkeys(row["model"] for row in rows)
    cell = lambda *point: " / ".join(value.get((*point, name), "-") for name in ("softmax_reference", "softmax", "linear"))
    return table(["model", *(f"{p} px" for p in pixels)], [[m, *(cell(m, p) for p in pixels)] for m in models])


def operator(device):
    """Time of linear attention over that of its two products alone."""
    value = {(row["heads"], row["tokens"], row["mode"], row["pass"]): times(row["ratio"]) for mode in ("eager", "compiled")
             for row in read(f"bench-{device}-attention-float32-{mode}.csv") if row["name"] == "linear" and row["ratio"]}
    kinds = [(mode, kind) for kind in ("forward", "forward+backward") for mode in ("eager", "compiled")]
    points = dict.fromkeys((heads, tokens) for heads, tokens, *_ in value if int(tokens) >= 4096)
    return table(["heads", "tokens", *(f"{kind}, {mode}" for mode, kind in kinds)],
                 [[h, f"{int(t):,}", *(value.get((h, t, *kind), "-") for kind in kinds)] for h, t in points])


def choices(device):
    """Time of a ViT-S/14 with a variant of the operator over that with model.py's own."""
    rows = read("operator.csv")
    value = {(row["variant"], row["pass"], row["pixels"], row["batch"]): times(row["ratio"]) for row in rows}
    points = list(dict.fromkeys(key[1:] for key in value))
    return table(["variant", *(f"{kind}, {pixels} px, batch {batch}" for kind, pixels, batch in points)],
                 [[name, *(value[(name, *point)] for point in points)] for name in dict.fromkeys(row["variant"] for row in rows)])


def short(device):
    """README's: how many times fused softmax's images/s the linear ViT-S/14 has at batch 1, by dtype."""
    rows = [row for row in curves(device)
            if (row["model"], row["batch"], row["name"]) == ("vits14", "1", "linear") and row["ratio"]]
    pixels = dict.fromkeys(row["pixels"] for row in rows)
    lines = [["ViT-S/14, batch 1", *(f"{p} px" for p in pixels)]]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        found = {row["pixels"]: row for row in rows if row["dtype"] == dtype}
        lines.append([f"linear, images/s, {dtype}", *(f"{float(found[p]['images_per_s']):.2f}" if p in found else "-" for p in pixels)])
        lines.append(["of fused softmax's", *(f"{1 / float(found[p]['ratio']):.2f}x" if p in found else "-" for p in pixels)])
    return table(lines[0], lines[1:])


def training(device):
    return table(["ViT-S/14, 224 pixels, batch 8", "dtype", "in teacher forwards", "images/s", "peak MB"],
                 [[row["name"], row["dtype"], times(row["ratio"]), f"{float(row['images_per_s']):.1f}", f"{float(row['peak_mb']):,.0f}"]
                  for dtype in ("float32", "bfloat16") for row in read(f"bench-{device}-train-{dtype}-{mode(device)}-quick.csv")])


def loading(device):
    return table(["one worker, to 224 pixels", "images/s"],
                 [[row["name"], f"{float(row['images_per_s']):,.0f}"] for row in read("load-speed.csv")])


def against_timm(device):
    value = {(row["pixels"], row["batch"], row["name"]): row["ratio"] for row in read("timm-speed.csv")}
    points = dict.fromkeys(key[:2] for key in value)
    return table(["pixels", "batch", "ours, softmax", "ours, linear"],
                 [[*point, times(value[(*point, "ours")]), times(value[(*point, "ours, linear")])] for point in points])


NAMES = {"linear-1": "linear, stage 1", "linear-2": "linear, stage 2 alone", "linear-12": "linear, stages 1 + 2", "linear-12-448": "the same, last part at 448 px",
         "linear_conv-1": "linear_conv, stage 1", "linear_conv-2": "linear_conv, stage 2 alone", "linear_conv-12": "linear_conv, stages 1 + 2",
         "linear_conv-12-448": "the same, last part at 448 px", "linear_conv-12-of-500": "linear_conv, 1 + 2, from 500 photos",
         "linear-qkv-1": "linear, stage 1, --train qkv", "linear_conv-12-earlier": "linear_conv, 1 + 2, before the weight of CLS"}
MEASURES = {"photos": "photos in the last stage", "cls_cosine": "CLS cosine", "patch_cosine": "patch cosine", "whitened_error": "whitened error",
            "top-1 224": "top-1, 224 px", "mIoU 224, linear head": "mIoU, 224 px", "mIoU 224, mask head": "mIoU, 224 px, mask head",
            "mIoU 448, linear head of 224": "448 px, head of 224", "mIoU 448, mask head of 224": "448 px, mask head of 224",
            "mIoU 448, linear head": "mIoU, 448 px", "mIoU 672, linear head of 448": "mIoU, 672 px, head of 448"}
SHORT = "cls_cosine", "patch_cosine", "whitened_error"


def study_values(file="study.csv"):
    """{row: {column: (mean, lowest, highest)}}"""
    value = {}
    for row in read(file):
        value.setdefault(row["row"], {})[row["column"]] = tuple(float(row[key]) for key in ("mean", "lowest", "highest"))
    return value


def study(device, file="study.csv", measures=tuple(MEASURES), shown=("teacher", "no alignment", *NAMES), spread=True):
    """The real-weights rows of study.csv; a score with its share of the teacher's and, in the long tables, the range of its seeds."""
    value = study_values(file)

    def cell(row, key):
        if key not in value[row]:
            return "-"
        (found, low, high), best = value[row][key], value["teacher"].get(key)
        if not best:
            return f"{found:,.0f}" if key == "photos" else f"{found:.3f}" + (f", {low:.3f} to {high:.3f}" if low < high else "")
        share = "" if row == "teacher" else f" ({100 * found / best[0]:.1f}%)"
        return f"{found:.1f}{share}" + (f", {low:.1f} to {high:.1f}" if spread and low < high else "")

    measures = [key for key in measures if any(key in found for found in value.values())]
    return table(["frozen backbone", *(MEASURES[key] for key in measures)],
                 [[NAMES.get(row, row), *(cell(row, key) for key in measures)] for row in shown if row in value])


def study_cpu(device):
    """The same with fewer photos."""
    return study(device, "study-cpu.csv")


def study_short(device):
    """README's."""
    return study(device, measures=("top-1 224", "mIoU 224, linear head", "mIoU 224, mask head", "mIoU 448, linear head", "mIoU 672, linear head of 448"),
                 shown=("teacher", "no alignment", "linear-12", "linear_conv-12"), spread=False)


def gpu(device):
    """Images/s on a GPU, and how many times that of fused softmax they are."""
    rows = [row for path in sorted(HERE.glob("bench-nvidia-h200-model-bfloat16-eager-*.csv")) for row in read(path.name) if row["ratio"]]
    value = {(row["model"], row["batch"], row["name"], row["pixels"]): f"{float(row['images_per_s']):,.0f} ({1 / float(row['ratio']):.2f}x)" for row in rows}
    names = {"softmax_reference, float32": "written-out softmax, float32", "softmax_reference": "written-out softmax"}
    pixels = sorted({row["pixels"] for row in rows}, key=int)
    return table(["model, batch, operator", *(f"{p} px" for p in pixels)], [
        [f"{model}, {batch}, {names.get(name, name)}", *(value.get((model, batch, name, p), "-") for p in pixels)]
        for model, batch in sorted({key[:2] for key in value})
        for name in ("softmax_reference, float32", "softmax_reference", "softmax", "linear", "linear_conv")])


def speed(device):
    """What the retention table's backbones cost: images/s over softmax's, MB over what its forward pass needs."""
    rows = {(row["dtype"], row["pixels"], row["name"]): row for row in curves(device) if (row["model"], row["batch"]) == ("vits14", "1")}
    points = [(dtype, pixels) for dtype in ("float32", "bfloat16") for pixels in ("224", "448", "672")]
    cell = lambda row: f"{float(row['images_per_s']):.2f} ({1 / float(row['ratio']):.2f}x), {float(row['peak_mb']):.0f} MB"
    return table(["backbone", *(f"{pixels} px, {dtype}" for dtype, pixels in points)],
                 [[name, *(cell(rows[(*point, name)]) if (*point, name) in rows else "-" for point in points)]
                  for name in ("softmax", "linear", "linear_conv")])


def first_steps(device):
    """Held-out agreement of every operator after a short stage 1."""
    value = {row: found for row, found in study_values("study-cpu.csv").items() if row.endswith("-short")}
    return table(["operator and what is trained", *(MEASURES[key] for key in SHORT)],
                 [[row.removesuffix("-short"), *(f"{found[key][0]:.3f}" for key in SHORT)] for row, found in value.items()])


def demo(device):
    """README's: top-1 of the demo's rows, over its seeds."""
    rows = [row for row in read("demo.csv") if "top-1" in row["column"]]
    names = {"teacher": "teacher (softmax)", "none": "no alignment", "one": "stage 1", "one-two": "stage 1 + 2"}
    return table(["row", f"top-1, mean (range) of {rows[0]['seeds']} seeds"], [
        [names.get(row["row"], row["row"]), "{:.1f} ({:.1f} to {:.1f})".format(*(float(row[key]) for key in ("mean", "lowest", "highest")))]
        for row in rows])


TABLES = (demo, study_short, study, study_cpu, gpu, speed, first_steps, short, gains, memory, operator, choices, training, loading, against_timm)

if __name__ == "__main__":
    for make in TABLES:
        print(f"{make.__name__}\n\n{make(sys.argv[1] if sys.argv[1:] else 'cpu')}\n")
