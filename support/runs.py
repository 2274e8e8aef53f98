"""What any long run needs, and the method does not: flags, stopping and going on, torchrun, files.

A run owns one folder: run.json (its arguments and a hash of what it reads), log.jsonl, and state.pt
until it is finished. The same command on the same inputs goes on from state.pt. Before any other
run the folder moves to OUT-1, OUT-2, ... A file appears whole or not at all.
"""
import argparse
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

fcntl = resource = None
with suppress(ImportError):                             # Windows has neither
    import fcntl
    import resource
RANK, WORLD = 0, 1
if dist.is_torchelastic_launched():                     # other launchers set RANK, too
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
LINE_EVERY = 30                                         # seconds, where stderr is no terminal
bar = partial(tqdm, leave=False, delay=2, disable=RANK > 0, mininterval=0.1 if sys.stderr
              and sys.stderr.isatty() else LINE_EVERY)


class InputError(Exception):
    """What the user gave cannot be used. The message is one line: the file, flag or tensor, what is
    expected, and what was found."""

    def __init__(self, message):                        # a loader's worker prepends a traceback
        message = str(message).rpartition("InputError: ")[2].strip()
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class Stopped(KeyboardInterrupt):
    """A signal ended the run; args[0] is its number. left: what a run that ends early leaves on
    disk, for its last message."""
    left = ""


# ---- Files
def one_line(error):
    """A library's error message as one line of 300 characters, without torch.load's advice."""
    message = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    if "Original Traceback" in message:                 # of a loader's worker, ends with its error
        message = message.splitlines()[-1]
    return (" ".join(message.split()) or type(error).__name__)[:300]


def write_whole(path, content):
    """Write bytes, what content(file) writes, or JSON: the file appears whole or not at all."""
    if RANK > 0:
        return
    if callable(content):
        content(buffer := io.BytesIO())
        content = buffer.getvalue()
    elif not isinstance(content, bytes):
        content = json.dumps(content, indent=1, allow_nan=False).encode()
    part = Path(path).with_name(f".{Path(path).name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def claim(out, told):
    """Make the folder of the run that `told` describes, or find it. The folder of another run moves
    aside. A lock on it lasts until this process ends, however it ends."""
    mark, stopped = out / "run.json", (out / "state.pt").is_file()
    held = out.exists() and any(not path.name.startswith(".") for path in out.iterdir())
    if held and not (mark.is_file() and b'"script"' in mark.read_bytes()):
        raise InputError(f"--out {out} holds files that no run of ours wrote: name another")
    out.mkdir(parents=True, exist_ok=True)
    claim.lock = open(out / ".lock", "a") if fcntl else None    # Windows renames no folder in use
    try:
        fcntl.lockf(claim.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"--out {out} is being written by another run") from None
    except (AttributeError, OSError):                   # Windows, or a file system without locks
        pass
    before = json.loads(mark.read_bytes()) if held else told
    words = {"script": "it ran another script", "hash": "photos or weights have changed"}
    changed = [words.get(key) or f"--{key.replace('_', '-')} was {before.get(key)}"
               for key in before | told if before.get(key) != told.get(key)]
    if held and (changed or not stopped):
        aside = next(path for path in (Path(f"{out}-{i}") for i in count(1))
                     if not os.path.lexists(path))
        try:
            out.rename(aside)
        except OSError:                                 # a mount, such as a volume of Docker
            raise InputError(f"--out {out} holds an earlier run and cannot be renamed: name "
                             "another, or a folder in it") from None
        why = f" (stopped; {'; '.join(changed)})" if stopped else ""
        print(f"--out {out}: an earlier run was there, now in {aside}{why}", file=sys.stderr)
        return claim(out, told)
    write_whole(mark, told)


def open_out(args, inputs, *lists):
    """Make the folder --out, or find a stopped run in it -> (folder, that run's state or None).
    Call it after all checks. inputs: weight files and folders to read, which --out must not hold or
    lie in. Files' content and `lists` of photos' names are hashed: changed, it is another run."""
    out, digest = Path(os.path.realpath(args.out)), hashlib.sha256(repr(lists).encode())
    inputs = [*map(Path, filter(None, inputs))]
    for path in inputs:
        if out.is_relative_to(path.resolve()) or path.resolve().is_relative_to(out):
            raise InputError(f"--out {out} holds or lies in {path}, which is read: name another")
        digest.update(path.read_bytes() if path.is_file() else b"")
    told = {"script": Path(sys.argv[0]).name, "hash": digest.hexdigest()}
    told |= {key: value for key, value in json.loads(json.dumps(vars(args))).items()
             if key not in ("out", "workers", "save_every")}        # may change; JSON has no tuples
    if RANK == 0:
        claim(out, told)
    if WORLD > 1:
        dist.barrier()                                  # the folder is as rank 0 leaves it
    state, saved = out / "state.pt", None
    if state.is_file():
        try:
            saved = torch.load(state, map_location="cpu", weights_only=True)
            print(f"--out {out}: goes on from step {saved['step']} of {args.steps}")
        except Exception:                               # junk makes readers raise nearly anything
            raise InputError(f"{state} is cut or damaged, or holds more than tensors: remove it, "
                             "and the same command begins anew") from None
    return out, saved


# ---- Flags, device, processes
def parse_args(parser, argv, out, defaults, demo, least_steps=1):
    """Add the flags that all stages share, and parse. A flag that is not given has its value of
    `demo` in a run without --data, else that of `defaults`."""
    flag, cuda = parser.add_argument, torch.cuda.is_available()
    parser.register("type", None, lambda text: "=".join(    # ~, also in NAME=~/x; photos/ is photos
        str(Path(os.path.expanduser(part))) if part else "" for part in text.split("=")))
    flag("--size", type=int, help="pixels, a multiple of the patch (default: the weights')")
    for key in ("steps", "batch_size"):
        flag(f"--{key.replace('_', '-')}", type=int,
             help=f"(default: {defaults[key]}, demo: {demo[key]})")
    flag("--workers", type=int, default=min(8, os.cpu_count() or 1) if cuda else 0,
         help="processes that load photos (default: up to 8 on a GPU, else 0)")
    flag("--dtype", choices=("auto", "float64", "float32", "bfloat16", "float16"), default="auto",
         help="(default: auto, half precision where the device has it)")
    flag("--compile", action=argparse.BooleanOptionalAction, default=cuda,
         help="(default: on a GPU)")
    flag("--seed", type=int, default=0, help="of photos, crops, flips and heads (default: 0)")
    flag("--out", default=out, help=f"folder to write (default: {out})")
    flag("--every", type=int, help="steps between held-out scores (default: ten times a run)")
    flag("--save-every", type=float, default=120, help="seconds between states (default: 120)")
    own = parser.parse_known_args(argv)[0].data
    parser.set_defaults(**(defaults if own else demo))
    args = parser.parse_args(argv)
    if not own and demo != defaults:                    # equal for --predict
        print("demo:", *(f"--{key.replace('_', '-')} {getattr(args, key)}" for key in demo))
    args.every = max(1, args.steps // 10) if args.every is None else args.every
    for key, least in dict(steps=least_steps, workers=0, save_every=0, batch_size=1, every=1,
                           seed=0).items():
        if not getattr(args, key) >= least:             # NaN is not, either
            key, found = key.replace("_", "-"), getattr(args, key)
            raise InputError(f"--{key} {found}: expected {least} or more")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise InputError(f"--lr {args.lr}: expected a number above 0")
    if args.seed >= 2 ** 63:
        raise InputError(f"--seed {args.seed}: expected a number below 2 ** 63")
    if args.batch_size % WORLD:
        raise InputError(f"--batch-size {args.batch_size}: expected a multiple of {WORLD}, one "
                         "part for each process")
    return args


def device_and_dtype(args):
    """-> ("cuda" if there is a GPU, else "cpu"; dtype of autocast). It joins torchrun's processes,
    if there are any. It replaces "auto" in args.dtype. Where torch.compile cannot work,
    args.compile becomes False, and a line says why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(hours=12))    # one may download for long
    torch.backends.cudnn.allow_tf32 = False             # else convolutions in float32 are not
    if args.dtype == "auto":
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else
                  getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # no public name yet
        args.dtype = "bfloat16" if native else {"cuda": "float16", "cpu": "float32"}[device]
    if args.compile:
        try:
            torch.compile(torch.sin)(torch.ones(8, device=device))
        except Exception as error:                      # no C++ compiler, no Triton
            args.compile = False
            print(f"--no-compile, since torch.compile does not work here: {one_line(error)}")
    return device, getattr(torch, args.dtype)


def mean_over_processes(tensor):
    """-> the mean over torchrun's processes, a new tensor without gradient."""
    tensor = tensor.detach().clone()
    if WORLD > 1:
        dist.all_reduce(tensor)
        tensor /= WORLD
    return tensor


def average_gradients(parameters):
    """Replace each gradient by its mean over torchrun's processes, in one exchange."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if WORLD > 1:
        mean = mean_over_processes(nn.utils.parameters_to_vector(gradients))
        nn.utils.vector_to_parameters(mean, gradients)


# ---- Training
def autocast(device, dtype):
    """torch.autocast in half precision; in float32 and float64 it does nothing. Enter it inside a
    function to compile, not around it: else the compiled backward pass is under it, too."""
    return torch.autocast(device, dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def widen(tensor):
    """Half precision to float32, in which losses are summed; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def warmup_cosine(optimizer, steps, ramp=40):
    """Multiply each group's rate by half a cosine down to 0, and at first by a linear ramp: of 40
    steps, or a tenth of a long run. At the full rate the loss of a run of 40 steps would rise."""
    ramp = max(ramp, steps / 10)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / ramp)
                                             * (1 + math.cos(math.pi * step / max(1, steps))) / 2)


class Progress:
    """A training loop's log.jsonl, its line on stderr, and its state, OUT/state.pt.

    saved: the state that open_out found, or None. kept: numbers, text and tensors that the end of
    the run needs. parts: what an update changes, each with a state_dict. images: seen by all
    processes. An error during an update, between steps() and done(), saves nothing, because the
    update is half done. After any other error run() saves.
    """
    now, signal = None, 0       # the Progress whose loop runs; number of a signal that has come

    def __init__(self, args, out, saved, kept, **parts):
        self.args, self.out, self.kept, self.parts = args, out, kept, parts
        self.step, self.seconds, self.images, self.updating, self.row = 0, 0.0, 0, 0, {}
        self.times = []                                 # of this process's steps
        self.file = io.BytesIO() if RANK else open(out / "log.jsonl", "ab")
        if saved:
            try:
                for name, part in parts.items():
                    part.load_state_dict(saved["parts"][name])
                self.step, self.seconds, self.images = saved["progress"]
            except (RuntimeError, ValueError, KeyError) as error:
                raise InputError(f"{out / 'state.pt'} does not fit the code, which has changed: "
                                 f"remove it to begin anew ({one_line(error)})") from None
            self.file.truncate(min(saved["logged"], self.file.tell()))  # later lines: done again
        self.saved, self.due = self.step, time.perf_counter() + args.save_every
        for part in parts.values() if WORLD > 1 else ():
            for tensor in part.state_dict().values() if isinstance(part, nn.Module) else ():
                dist.broadcast(tensor, 0)               # all processes begin as rank 0 does

    def steps(self, batches):
        """-> (step, batch), from the first step that is not done yet. It saves when due and at the
        end. A signal to any process ends all processes after the same step."""
        Progress.now, batches, stop = self, iter(batches), 0
        self.printed = time.perf_counter(), self.step, self.images
        with suppress(AttributeError, ValueError):      # torch's handler would raise in an update
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # when a worker dies; so next() does
        while self.step < self.args.steps:
            self.save(self.due)
            self.start = time.perf_counter()
            batch = next(batches)
            stop = torch.tensor(Progress.signal)
            if WORLD > 1:                               # fails where another process has ended
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            if stop:
                break
            groups = [batch] if isinstance(batch, torch.Tensor) else [images for images, _ in batch]
            self.images += WORLD * sum(map(len, groups))
            self.updating = self.step + 1
            yield self.updating, batch
        self.save()                                     # scoring, which follows, may be stopped
        Progress.now = None
        if stop or Progress.signal:
            raise Stopped(Progress.signal or int(stop))

    def done(self, loss, **row):
        """The update is complete. Prepare its row of the log, with the mean loss of all processes.
        Print a line every 30 seconds; a terminal shows one that changes."""
        loss = mean_over_processes(torch.tensor(loss, dtype=torch.float64)).item()
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {self.updating}: try a lower --lr")
        now, (then, step, images), steps = time.perf_counter(), self.printed, self.args.steps
        self.step, self.updating = self.updating, 0
        self.seconds += now - self.start
        self.times.append(now - self.start)
        self.row = dict(step=self.step, loss=loss, **row, seconds=round(self.seconds, 2))
        over, terminal = self.step == steps, sys.stderr.isatty()
        if RANK == 0 and (over or now > then + (0.5 if terminal else LINE_EVERY)):
            left = tqdm.format_interval((steps - self.step) * (now - then) / (self.step - step))
            print(f"step {self.step}/{steps}  loss {loss:.4f}  lr {row.get('lr', 0):.1e}  "
                  f"{(self.images - images) / (now - then):.3g} images/s  {left} left",
                  end="   \r" if terminal and not over else "\n", file=sys.stderr, flush=True)
            self.printed = now, self.step, self.images

    def log(self, **row):
        """Add to this step's row of the log, such as a held-out score."""
        self.row |= row

    def save(self, due=0):
        """Write the step's row to the log and, if the time `due` has come, the state."""
        row, self.row = self.row, {}
        if row:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()                           # for `tail -f`
        if self.step > self.saved and time.perf_counter() >= due:
            state = dict(step=self.step, progress=(self.step, self.seconds, self.images),
                         parts={name: part.state_dict() for name, part in self.parts.items()},
                         kept=self.kept, logged=self.file.seek(0, os.SEEK_END))
            write_whole(self.out / "state.pt", partial(torch.save, state))
            self.saved, self.due = self.step, time.perf_counter() + self.args.save_every
        if self.saved:
            where = self.out / "state.pt"
            Stopped.left = f"the same command goes on from step {self.saved}, {where}"

    def summary(self):
        """-> the median time of a step, images a second, peak memory, as text."""
        if not self.times:
            return "no step was left to do"
        step = sorted(self.times)[len(self.times) // 2]
        unit = 1 if sys.platform == "darwin" else 1024  # a Mac counts bytes, Linux KiB
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0)
        return (f"{step:.3f} s a step, {self.images / max(1, self.step) / step:.1f} images/s, "
                f"peak memory {memory / 1e9:.1f} GB")

    def finish(self):
        """The run is over and its files are written: remove its state."""
        Stopped.left = ""
        if RANK == 0:
            (self.out / "state.pt").unlink(missing_ok=True)


# ---- The end, whatever brings it
class Screen(io.FileIO):
    """stdout or stderr that cannot end a run: text for a closed or broken one is lost."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def show(draw, *args, **more):
    """Call a function that draws a picture. If it fails, a line says so, and the run goes on."""
    try:
        draw(*args, **more)
    except Exception as error:
        print(f"no picture: {one_line(error)}", file=sys.stderr)


def on_signal(number, _):
    """A first signal: finish the update, save, and end. A second one ends at once."""
    signal.signal(number, signal.SIG_IGN if WORLD > 1 else signal.SIG_DFL)     # torchrun's is late
    Progress.signal = number                            # steps() sees it, should the raise be lost
    if Progress.now is None:
        raise Stopped(number)


def leave_signals(_):
    """For a loader's worker: Ctrl-C reaches it, too, but the main process must end it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def explain(error):
    """-> one line that says what ended main(). Of an unforeseen error, print the traceback, too."""
    text, updating = one_line(error), Progress.now and Progress.now.updating
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, Stopped):
        return f"stopped by {signal.Signals(error.args[0]).name}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        text = "out of memory: try a lower --batch-size or --size; stages 2 and 3 have --recompute"
    elif WORLD > 1 and ("gloo" in text or isinstance(error, dist.DistError)):
        text = "another process ended"
    elif isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker" in str(error):
        text = f"a worker that loads photos failed: try fewer --workers, or 0 ({text})"
    elif not isinstance(error, OSError):
        traceback.print_exception(error)
    return f"in step {updating}: {text}" if updating else text


def run(main):
    """Call a script's main(). What a user can mend is one line on stderr instead of a traceback."""
    with suppress(AttributeError, OSError, ValueError):     # Windows has no limit; some are fixed
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]    # workers send tensors as open files
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    null = 0
    while null < 3:             # if stdout is closed, none of our files gets its number
        null = os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (io.TextIOWrapper(
        io.BufferedWriter(Screen(number, "w", closefd=False)), errors="backslashreplace",
        line_buffering=True) for number in (null if RANK else 1, 2))
    for number in (signal.SIGINT, signal.SIGTERM):      # a parent process may have them ignored
        signal.signal(number, on_signal)
    code = 0
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as end:                           # argparse's
        code = end.code
    except BaseException as error:
        if Progress.now and not Progress.now.updating:
            with suppress(Exception):                   # a full disk: the state before stays
                Progress.now.save()
        left = f" ({Stopped.left})" if Stopped.left else ""
        code = 128 + error.args[0] if isinstance(error, Stopped) else 1
        if RANK == 0 or code == 1:
            print(f"{Path(sys.argv[0]).name}: {explain(error)}{left}", file=sys.stderr)
        if WORLD > 1:
            time.sleep(1)                               # the others still receive what it has sent
            os._exit(code)                              # and it waits for none of them
    sys.exit(code)
