"""Runs that are stopped and go on: kills, signals, errors, full disks, changed inputs, torchrun.

Most runs here are of main() below, a stage in small. Each is a fork of this process, in which what
should happen in a certain step is planned in PLAN. What a shell or torchrun adds is a command.
"""
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from support import runs
from support.runs import InputError, Progress

STEPS = 6
FORK = multiprocessing.get_context("fork")
PLAN = {}                               # (moment, step) -> what happens then; step None: at first


def happen(moment, step):
    if action := PLAN.pop((moment, step), None) or PLAN.pop((moment, None), None):
        action()


class Points:
    """Draw i is a point that depends on i alone."""

    def __getitem__(self, i):
        happen("read", i // 4 + 1)
        return torch.randn(3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def main(argv=None):
    parser = ArgumentParser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--lr", type=float, default=0.1)
    defaults = dict(steps=STEPS, batch_size=4)
    args = runs.parse_args(parser, argv, "runs/points", defaults, defaults)
    device, _ = runs.device_and_dtype(args)
    torch.manual_seed(args.seed)
    net = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(net.parameters(), args.lr, 0.9)     # Adam takes a sum for a mean
    schedule = runs.warmup_cosine(optimizer, args.steps)
    out, saved = runs.open_out(args, args.data or [])
    progress = Progress(args, out, saved, saved["kept"] if saved else dict(rows=[]), net=net,
                        optimizer=optimizer, schedule=schedule)
    order = range(progress.step * args.batch_size + runs.RANK, args.steps * args.batch_size,
                  runs.WORLD)
    train = DataLoader(Points(), args.batch_size // runs.WORLD, sampler=order,
                       num_workers=args.workers, worker_init_fn=runs.leave_signals)
    for step, points in progress.steps(train):
        happen("update", step)
        loss = (net(points) - points.sum(1, keepdim=True)).square().mean()
        loss.backward()
        runs.average_gradients(net.parameters())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        happen("end of update", step)
        progress.done(loss.item(), lr=schedule.get_last_lr()[-1])
        if step % args.every == 0:
            happen("score", step)
            progress.log(held_out=net.weight.sum().item())
    happen("end", None)
    runs.write_whole(out / "net.pt", partial(torch.save, net.state_dict()))
    progress.finish()


if __name__ == "__main__":                              # as a command; PLAN as Python in $PLAN
    exec(os.environ.get("PLAN", ""))
    runs.run(main)
    raise AssertionError("run() ends in sys.exit")

import pytest

import align_attention
from conftest import BRIEF, log_of, moved
from model import read_weights


def child(end, words, plan, main):
    os.setsid()                                         # a group, as a shell gives a command
    os.dup2(end, 1), os.dup2(end, 2)
    signal.alarm(60)                                    # one that hangs ends, too
    sys.argv = [str(word) for word in words]
    plan()
    runs.run(main)


class Run:
    """run(main) in a process of its own, in which plan() is called first."""

    def __init__(self, out, *flags, plan=lambda: None, main=main, name="points.py"):
        self.pipe, end = os.pipe()
        words = name, *flags, "--out", out
        self.process = FORK.Process(target=child, args=(end, words, plan, main))
        self.process.start()
        os.close(end)

    def wait(self):
        """-> (exit code, or -signal; what it said)."""
        self.process.join()
        with open(self.pipe, newline="\n") as file:
            return self.process.exitcode, file.read()


def at(moment, step, act, *args):
    """For Run: act(*args) at this moment ("read", "update", "score" ...) of this step."""
    return lambda: PLAN.update({(moment, step): partial(act, *args)})


def fail(error):
    raise error


def kill(number):
    os.kill(os.getpid(), number)


def net_of(out):
    return torch.load(out / "net.pt", weights_only=True)


def state_of(out):
    return torch.load(out / "state.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nothing stops leaves: (tensors, log). Its folder has dot names only."""
    out = tmp_path_factory.mktemp("whole")
    (out / ".DS_Store").touch()
    assert Run(out).wait()[0] == 0
    return net_of(out), log_of(out)


def check_goes_on(out, whole, step, *flags):
    """The same command goes on after this step, and ends bit for bit as the run nothing stopped."""
    code, said = Run(out, *flags).wait()
    assert code == 0 and f"goes on from step {step} of {STEPS}" in said
    assert not moved(whole[0], net_of(out)) and log_of(out) == whole[1]
    assert not (out / "state.pt").exists()


# ---- Killed
def kill_in_the_second_save(write=Path.write_bytes):
    saves = []

    def cut(path, content):
        if "state.pt" in path.name:
            saves.append(path)
        if len(saves) < 2:
            return write(path, content)
        write(path, content[:len(content) // 2])
        kill(signal.SIGKILL)
    Path.write_bytes = cut


def test_stage_1_killed_in_save_after_save_ends_as_one_that_is_not(files, tmp_path):
    """The state before is whole each time."""
    flags = ["--teacher", files / "teacher.safetensors", "--data", files / "photos", *BRIEF,
             "--steps", 4, "--every", 2, "--save-every", 0]
    one, other = tmp_path / "one", tmp_path / "other"
    assert Run(one, *flags, main=align_attention.main).wait()[0] == 0
    killed = partial(Run, other, *flags, main=align_attention.main, plan=kill_in_the_second_save)
    assert [killed().wait()[0] for _ in range(4)] == [-signal.SIGKILL] * 3 + [0]
    assert log_of(one) == log_of(other)
    assert not moved(*(read_weights(out / "student.safetensors")[0] for out in (one, other)))


# ---- Ended by a signal or an error
def fill(room):
    """No file may grow beyond `room` bytes: as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


UNREADABLE, OFTEN = InputError("photo.jpg cannot be read"), ("--save-every", 0)


@pytest.mark.parametrize("plan, flags, code, says, step", (
    (at("read", 2, kill, signal.SIGINT), (), 130, "stopped by SIGINT", 1),
    (at("update", 2, kill, signal.SIGTERM), (), 143, "stopped by SIGTERM", 2),
    (at("score", 2, kill, signal.SIGINT), (), 130, "stopped by SIGINT", 2),
    (at("end", None, kill, signal.SIGTERM), (), 143, "stopped by SIGTERM", 6),
    (at("read", 3, fail, UNREADABLE), (), 1, "photo.jpg cannot be read", 2),
    (at("read", 3, fail, UNREADABLE), ("--workers", 1), 1, "photo.jpg cannot be read", 2),
    (at("end of update", 3, fail, ZeroDivisionError("oh")), (), 1, "in step 3: oh", None),
    (at("update", 3, setattr, torch.Tensor, "square", lambda x: x * float("nan")), (), 1,
     "the loss is nan at step 3: try a lower --lr", None),
    (at("update", 3, fill, 3000), OFTEN, 1, "[Errno 27] File too large", 2)))
def test_what_ends_a_run_is_one_line_and_the_same_command_goes_on(tmp_path, whole, plan, flags,
                                                                  code, says, step):
    """From the last whole update. What is half done is never saved: without a state before, none is
    there (None)."""
    out = tmp_path / "out"
    found, said = Run(out, *flags, plan=plan).wait()
    left = f" (the same command goes on from step {step}, {out / 'state.pt'})" if step else ""
    assert found == code and said.endswith(f"points.py: {says}{left}\n")
    assert ("Traceback" in said) == ("oh" in says)      # where nobody foresaw it
    assert (out / "state.pt").exists() == bool(step)
    if step:
        check_goes_on(out, whole, step, "--workers", 1, "--save-every", 60)


def test_ctrl_c_to_a_command_with_workers_while_another_run_is_refused(tmp_path):
    out = tmp_path / "out"
    flags = "--workers", 2, "--steps", 10 ** 6, "--save-every", 0
    run = Run(out, *flags)
    while not (out / "state.pt").exists():
        time.sleep(0.01)
    code, said = Run(out, *flags).wait()
    assert code == 1 and "is being written by another run" in said
    os.killpg(run.process.pid, signal.SIGINT)
    code, said = run.wait()
    assert code == 130 and "Traceback" not in said and "stopped by SIGINT" in said
    with pytest.raises(ProcessLookupError):             # no worker is left
        os.killpg(run.process.pid, 0)


def test_a_command_whose_reader_is_gone_saves_its_state_and_ends_quietly(tmp_path):
    """As in `... 2>&1 | tee log`, where Ctrl-C ends tee first."""
    reader, writer = os.pipe()
    os.close(reader)
    plan = "runs.LINE_EVERY = 0; PLAN['update', 3] = lambda: os.kill(os.getpid(), 2)"
    command = [sys.executable, __file__, "--out", tmp_path / "out"]
    done = subprocess.run(command, stdout=writer, stderr=writer, env=os.environ | dict(PLAN=plan))
    assert done.returncode == 130 and state_of(tmp_path / "out")["step"] == 3


def test_a_worker_that_dies_ends_the_run_after_its_state_is_saved(tmp_path, whole):
    """Without a hang, also where it dies in the middle of an update."""
    plan = lambda: (at("read", 4, kill, signal.SIGKILL)(), at("update", 2, time.sleep, 0.5)())
    code, said = Run(tmp_path / "out", "--workers", 1, plan=plan).wait()
    assert code == 1 and "Traceback" not in said
    assert "a worker that loads photos failed: try fewer --workers, or 0" in said
    step = state_of(tmp_path / "out")["step"]
    assert step >= 1 and f"goes on from step {step}" in said
    check_goes_on(tmp_path / "out", whole, step)


# ---- The same run, and another one
def test_another_run_moves_the_stopped_one_aside_and_names_what_differs(tmp_path):
    photo, out = tmp_path / "photo", tmp_path / "out"
    photo.write_bytes(b"1")
    stopped = at("update", 2, kill, signal.SIGINT)
    Run(out, "--data", photo, plan=stopped).wait()
    command = out, "--data", photo, "--lr", 0.2, "--seed", 3
    said = Run(*command, plan=stopped).wait()[1]
    assert f"now in {out}-1 (stopped; --lr was 0.1; --seed was 0)" in said
    photo.write_bytes(b"2")
    assert f"now in {out}-2 (stopped; photos or weights have changed)" in Run(*command).wait()[1]
    assert f"an earlier run was there, now in {out}-3\n" in Run(
        *command, name="other.py", plan=stopped).wait()[1]             # it was finished
    assert f"{out}-4 (stopped; it ran another script)" in Run(*command).wait()[1]
    assert [state_of(tmp_path / f"out-{i}")["step"] for i in (1, 2, 4)] == [2, 2, 2]
    assert net_of(tmp_path / "out-3")


def test_a_folder_that_holds_other_files_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("{}")            # of somebody else's program
    assert "holds files that no run of ours wrote" in Run(tmp_path).wait()[1]
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_state_that_is_cut_or_holds_code_is_named_in_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    def refused():
        code, said = Run(tmp_path).wait()
        return code == 1 and "Traceback" not in said and f"{state} is cut or damaged" in said

    Run(tmp_path, plan=at("update", 2, kill, signal.SIGINT)).wait()
    state, good = tmp_path / "state.pt", state_of(tmp_path)
    state.write_bytes(state.read_bytes()[:1000])
    assert refused()
    torch.save(dict(good, kept=Evil()), state)
    assert refused() and not (tmp_path / "evil").exists()


def test_a_command_without_stdout_and_stderr_runs_alone_whatever_another_launcher_set(tmp_path):
    command = f'exec "{sys.executable}" "{__file__}" --workers 1 --out "{tmp_path}/out" >&- 2>&-'
    env = os.environ | dict(RANK="3", WORLD_SIZE="8")
    assert subprocess.run(["bash", "-c", command], env=env).returncode == 0
    assert len(log_of(tmp_path / "out")) == STEPS and net_of(tmp_path / "out")


def test_the_same_folders_in_other_words_are_the_same_run(tmp_path, whole, monkeypatch):
    """With a slash at the end, and ~ also where no shell writes it out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for step, (out, data) in enumerate((
            ("out", tmp_path / "photos"), ("out/", f"{tmp_path}/photos/"), ("~/out", "~/photos"),
            ("./photos/../out", tmp_path / "photos")), 1):
        plan = at("update", step, kill, signal.SIGINT)
        code, said = Run(out, "--data", data, plan=plan).wait()
        assert code == 130 and (step == 1 or f"goes on from step {step - 1}" in said)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "photos"}
    check_goes_on(tmp_path / "out", whole, 4, "--data", "~/photos/")
    assert align_attention.parse(["--teacher", "a=", "--data", ""]).data == [""]    # not "."


def test_without_a_compiler_a_run_is_eager_and_says_so(tmp_path):
    none = partial(fail, RuntimeError("No working C++ compiler found"))
    plan = lambda: setattr(torch, "compile", lambda function: lambda x: none())
    code, said = Run(tmp_path, "--compile", plan=plan).wait()
    assert code == 0 and "--no-compile, since torch.compile does not work here: No working" in said
    assert not json.loads((tmp_path / "run.json").read_text())["compile"]


# ---- Several processes
def pair(out, *flags, second=lambda: None):
    """What torchrun --nproc-per-node 2 starts, without its imports: -> what each Run.wait() gives.
    second: the plan of the second process."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])

    def rank(n):
        os.environ |= dict(RANK=str(n), WORLD_SIZE="2", LOCAL_RANK=str(n), MASTER_ADDR="localhost",
                           MASTER_PORT=port)
        runs.RANK, runs.WORLD = n, 2
        n and second()

    both = [Run(out, *flags, plan=partial(rank, n)) for n in (0, 1)]
    return [run.wait() for run in both]


def test_two_processes_equal_one(tmp_path):
    """Only the first writes and prints; a signal to the second stops both after the same step."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = "--steps", 20, "--every", 4
    assert Run(one, *flags).wait()[0] == 0
    (code, said), quiet = pair(two, *flags, second=at("update", 7, kill, signal.SIGTERM))
    assert code == 143 and "goes on from step 7" in said and quiet == (143, "")
    (code, said), quiet = pair(two, *flags)
    assert code == 0 and "goes on from step 7 of 20" in said and quiet == (0, "")
    assert (net_of(one)["weight"] - net_of(two)["weight"]).abs().max() < 1e-8
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-8)


@pytest.mark.parametrize("moment, act, flags, code_of_it", (
    ("read", partial(fail, UNREADABLE), (), 1),
    ("update", partial(kill, signal.SIGKILL), OFTEN, -signal.SIGKILL)))
def test_no_process_waits_for_one_that_has_ended(tmp_path, moment, act, flags, code_of_it):
    """By an error that it names, after which the other one saves its state; or killed."""
    before, plan = time.time(), at(moment, 3, act)
    (code, said), (other, reason) = pair(tmp_path, *flags, second=plan)
    assert (code, other) == (1, code_of_it) and time.time() < before + 20
    assert "another process ended" in said and "Traceback" not in said
    assert ("photo.jpg cannot be read" in reason) == (moment == "read")
    assert "goes on from step 2" in said and state_of(tmp_path)["step"] == 2


def test_processes_of_torchrun_know_of_one_another(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__,
               "--batch-size", "3", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "--batch-size 3: expected a multiple of 2" in done.stderr
