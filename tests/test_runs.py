"""Runs that are stopped and go on: kills, signals, full disks, changed inputs, torchrun.

A run here is a real process: a fork of this one, with all imported, in which what should happen at
a certain step is patched in. What a shell or torchrun adds is started as a command.
"""
import hashlib
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch

import align_attention
import align_features
import finetune
import model
from conftest import BRIEF, STAGES, brief, log_of, moved
from model import Progress, read_weights

ALL = pytest.mark.parametrize("stage", STAGES)
STEPS = 6
SCORE = {align_attention: "compare", align_features: "compare", finetune: "evaluate"}
MAY_LEAVE = {"state.pt", "log.jsonl", "run.json"}
BEST = "0-classify-best.safetensors"                    # of stage 3, from its first score on


def command(stage, files, out, *flags):
    name, data = ("weights", "classify") if stage is finetune else ("teacher", "photos")
    return [str(word) for word in (
        stage.__file__, f"--{name}", files / "teacher.safetensors", "--data", files / data, *BRIEF,
        "--steps", STEPS, "--every", 4, *flags, "--out", out)]


class Run:
    """stage.main() in a process of its own, in which before() is called first."""

    def __init__(self, stage, files, out, *flags, before=lambda: None):
        self.pipe, end = os.pipe()
        self.pid = os.fork()
        if self.pid:
            return os.close(end)
        code = 0
        try:
            os.dup2(end, 1), os.dup2(end, 2)
            sys.stdout, sys.stderr = (open(n, "w", 1, closefd=False) for n in (1, 2))
            sys.argv = command(stage, files, out, *flags)
            signal.alarm(120)                           # one that hangs ends, too
            before()
            model.run(stage.main)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self):
        """-> (exit code, or -signal; what it said, without bars; its last line)."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with open(self.pipe, newline="\n") as file:
            said = [line.rpartition("\r")[2] for line in file.read().split("\n")]
        assert "Traceback" not in "\n".join(said), "\n".join(said)
        said = [line for line in said if line and "img/s" not in line]
        return code, "\n".join(said), (said or [""])[-1]


def at(step, act):
    """For Run: act() when this step (None: the first) is computed, before it is logged."""
    def before():
        done, acted = Progress.done, []

        def hooked(self, loss, **row):
            if step in (None, self.step + 1) and not acted:
                acted.append(act())
            done(self, loss, **row)

        Progress.done = hooked
    return before


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def weights(out):
    return {path.name: read_weights(path)[0] for path in sorted(out.glob("*.safetensors"))}


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """stage -> what a run that nothing stops leaves: (weights, log)."""
    made = {}

    def of(stage):
        if stage not in made:
            out = tmp_path_factory.mktemp("whole") / "out"
            assert Run(stage, files, out).wait()[0] == 0
            made[stage] = weights(out), log_of(out)
        return made[stage]
    return of


def check_same(out, whole):
    """Weights and log of `out` are bit for bit those of the run that nothing stopped."""
    found = weights(out)
    assert found.keys() == whole[0].keys() and found
    assert not any(moved(whole[0][name], found[name]) for name in found)
    rows = [[row | dict(weights=None) for row in log] for log in (log_of(out), whole[1])]
    assert rows[0] == rows[1] and not (out / "state.pt").exists()


# --------------------------------------------------------------------------------------------------
# Killed

@ALL
def test_killed_at_random_moments(files, tmp_path, whole, stage):
    """Each goes on where the last state was; the end is that of a run that nothing stopped."""
    moments, kills, code, out = random.Random(0), 0, None, tmp_path / "out"
    while code != 0:
        def soon():                         # as `kill -9`: the kernel ends it, nothing is caught
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-3, 2e-2) * 1.1 ** kills)

        state = (out / "state.pt").exists()
        moments.random()
        code, said, _ = Run(stage, files, out, "--save-every", 0, before=at(None, soon)).wait()
        assert state == ("goes on from step" in said) and code in (0, -signal.SIGALRM)
        kills += code != 0
        assert kills < 60
    assert kills > 1
    check_same(out, whole(stage))


@ALL
def test_killed_during_a_save_and_during_scoring(files, tmp_path, whole, stage):
    """The state before stays whole; weights are on disk before anything is scored."""
    out, flags, log = tmp_path / "out", ("--save-every", 0), tmp_path / "out/log.jsonl"
    lines = lambda: log.read_bytes().count(b"\n") if log.exists() else 0

    def half_a_save():
        def cut(path, content, write=Path.write_bytes):
            kill = "state" in path.name and lines() == 3
            write(path, content[:len(content) // 2] if kill else content)
            kill and send(signal.SIGKILL)()
        Path.write_bytes = cut

    def scoring():
        score = getattr(stage, SCORE[stage])
        setattr(stage, SCORE[stage], lambda *args, **more: (
            lines() == STEPS and send(signal.SIGKILL)(), score(*args, **more))[1])

    assert Run(stage, files, out, *flags, before=half_a_save).wait()[0] == -signal.SIGKILL
    code, said, _ = Run(stage, files, out, *flags, before=scoring).wait()
    assert code == -signal.SIGKILL and "goes on from step 2 of 6" in said
    assert weights(out).keys() == whole(stage)[0].keys() and (out / "state.pt").exists()
    code, said, _ = Run(stage, files, out, *flags,
                        before=lambda: sys.modules.pop("matplotlib.figure")).wait()
    assert code == 0 and "goes on from step 6 of 6" in said
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert (out / "curves.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    check_same(out, whole(stage))


def test_the_first_state_is_due_after_30_seconds_the_next_after_120(files, tmp_path):
    def before():
        clock, later = time.perf_counter, []
        time.perf_counter = lambda: clock() + sum(later)
        for step, seconds in ((2, 31), (4, 100)):
            at(step, partial(later.append, seconds))()
        at(6, send(signal.SIGKILL))()

    Run(align_features, files, tmp_path, before=before).wait()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2


# --------------------------------------------------------------------------------------------------
# Stopped by a signal, refused, failed

@ALL
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_in_one_line_and_the_same_command_goes_on(files, tmp_path, whole, stage,
                                                                number):
    """Also where the parent process had it ignored; and at the last step, before the scoring; with
    other workers, another rate of saving."""
    out, name = tmp_path / "out", Path(stage.__file__).name
    for step, *flags in ((2,), (STEPS, "--workers", 1, "--save-every", 60)):
        before = lambda: (signal.signal(number, signal.SIG_IGN), at(step, send(number))())
        code, said, last = Run(stage, files, out, *flags, before=before).wait()
        assert code == 128 + number and hashes(out).keys() - {BEST} == MAY_LEAVE
        assert len(log_of(out)) == step
        assert last == (f"{name}: stopped by {number.name}: step {step}, {out / 'state.pt'}: the "
                        "same command goes on from here")
    assert "goes on from step 2 of 6" in said and Run(stage, files, out).wait()[0] == 0
    check_same(out, whole(stage))


def test_a_row_after_the_one_that_was_stopped_begins_at_its_beginning(files, tmp_path):
    """Stage 3 with two of --weights, stopped in the first."""
    file, out, other = files / "teacher.safetensors", tmp_path / "out", tmp_path / "other"
    two = "--weights", file, f"{file}:linear"
    assert Run(finetune, files, other, *two).wait()[0] == 0
    assert Run(finetune, files, out, *two, before=at(2, send(signal.SIGINT))).wait()[0] == 130
    assert Run(finetune, files, out, *two).wait()[0] == 0
    assert [row["step"] for row in log_of(out)] == 2 * list(range(1, STEPS + 1))
    check_same(out, (weights(other), log_of(other)))


def test_auto_is_what_the_device_has(files, tmp_path, monkeypatch):
    """A state goes on in its precision; where "auto" is another one, the run begins anew."""
    out, native = tmp_path / "out", "_is_avx512_bf16_supported"
    monkeypatch.setattr(torch.cpu, native, lambda: True, raising=False)
    flags = align_features, files, out, "--dtype", "auto"
    Run(*flags, before=at(2, send(signal.SIGTERM))).wait()
    assert json.loads((out / "run.json").read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr(torch.cpu, native, lambda: False, raising=False)
    code, said, _ = Run(*flags).wait()
    assert code == 0 and "goes on" not in said and (tmp_path / "out-1/state.pt").exists()
    assert json.loads((out / "run.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("second", (signal.SIGINT, signal.SIGTERM))
def test_a_second_signal_ends_at_once(files, tmp_path, second):
    run = Run(align_features, files, tmp_path / "out", before=at(2, send(signal.SIGINT, second)))
    assert run.wait()[0] == -second and not (tmp_path / "out/state.pt").exists()


def test_a_signal_outside_the_loop_is_not_lost(files, tmp_path, whole):
    """Before the last state is written; while it is, which leaves no part of it; in scoring."""
    def leaving():
        leave = Progress.__exit__
        Progress.__exit__ = lambda *args: (send(signal.SIGTERM)(), leave(*args))[1]

    def saving():
        write = Path.write_bytes
        Path.write_bytes = lambda path, content: write(path, content) and (
            send(signal.SIGTERM)() if "state" in path.name else 0)

    def scoring():
        align_features.compare = lambda *args: send(signal.SIGTERM)()

    for before in (leaving, saving, scoring):
        out = tmp_path / before.__name__
        code, said, last = Run(align_features, files, out, before=before).wait()
        assert code == 143 and "stopped by SIGTERM" in last and "the same command goes on" in last
        left = hashes(out).keys()
        assert left <= MAY_LEAVE and ("state.pt" in left) == (before is leaving)
        assert Run(align_features, files, out).wait()[0] == 0
        check_same(out, whole(align_features))


def test_a_lost_log_and_what_a_kill_left_of_run_json_are_no_hindrance(files, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".run.json.part").touch()
    Run(align_features, files, out, before=at(2, send(signal.SIGTERM))).wait()
    (out / "log.jsonl").unlink()
    assert Run(align_features, files, out).wait()[0] == 0
    assert [row["step"] for row in log_of(out)] == [3, 4, 5, 6]


@ALL
def test_changed_inputs_are_refused_and_other_arguments_begin_anew(files, tmp_path, whole, stage):
    """One sentence, nothing touched: a photo more or less, another weight, a state that is damaged
    or holds code, which does not run. What is changed back goes on."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    shutil.copytree(files, tmp_path / "files")
    here, out, gone = tmp_path / "files", tmp_path / "out", tmp_path / "gone"
    teacher, state = here / "teacher.safetensors", out / "state.pt"
    data = here / ("classify/train/red" if stage is finetune else "photos/album1")
    Run(stage, here, out, before=at(2, send(signal.SIGTERM))).wait()
    other, weight, good = next(data.iterdir()), teacher.read_bytes(), state.read_bytes()
    evil = torch.load(state, weights_only=True) | dict(kept=Evil())
    for change, undo in (
            (lambda: shutil.copy(other, data / "new.jpg"), (data / "new.jpg").unlink),
            (lambda: other.rename(gone), lambda: gone.rename(other)),
            (lambda: teacher.write_bytes(weight[:-1] + bytes([weight[-1] ^ 1])),
             lambda: teacher.write_bytes(weight)),
            (lambda: state.write_bytes(good[:-9]), lambda: state.write_bytes(good)),
            (lambda: torch.save(evil, state), lambda: state.write_bytes(good))):
        change()
        kept = hashes(out)
        code, _, last = Run(stage, here, out).wait()
        assert code == 1 and hashes(out) == kept and ("changed" in last or "pt is cut" in last)
        undo()
        assert sorted(tmp_path.iterdir()) == [here, out]
    kept = hashes(out)
    code, said, _ = Run(stage, here, out, "--seed", 1, "--steps", 1).wait()
    assert code == 0 and "an earlier run was there, now in out-1" in said
    assert hashes(tmp_path / "out-1") == kept and len(log_of(out)) == 1
    shutil.rmtree(out)
    (tmp_path / "out-1").rename(out)
    assert Run(stage, here, out).wait()[0] == 0
    check_same(out, whole(stage))


@ALL
@pytest.mark.parametrize("room", (200, 20_000))         # neither log nor state fit; the log does
def test_a_full_disk_or_a_loss_that_is_not_finite_leaves_the_last_state(files, tmp_path, whole,
                                                                        stage, room):
    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    out, start = tmp_path / "out", partial(Run, stage, files)
    code, _, last = start(out, "--save-every", 0, before=at(3, fill)).wait()
    assert code == 1 and "File too large" in last and hashes(out).keys() == MAY_LEAVE
    code, said, _ = start(out, "--save-every", 0).wait()
    assert code == 0 and "goes on from step 2 of 6" in said
    check_same(out, whole(stage))
    code, _, last = start(tmp_path / "nan", "--lr", 1e30, "--save-every", 0).wait()
    step = torch.load(tmp_path / "nan/state.pt", weights_only=True)["step"]
    assert code == 1 and f"at step {step + 1}: try a lower --lr than 1e+30" in last
    assert step < STEPS and hashes(tmp_path / "nan").keys() == MAY_LEAVE


# --------------------------------------------------------------------------------------------------
# The same from any number of workers and processes

@ALL
def test_a_run_can_be_repeated_and_have_any_number_of_steps(files, tmp_path, stage):
    """Same seed: same tensors and losses, bit for bit, however many workers. Another: others."""
    for out, flags in dict(a=[], b=["--workers", 3], c=["--seed", 1]).items():
        brief(stage, files, tmp_path / out, *flags)
    states = [weights(tmp_path / out) for out in "abc"]
    assert [any(moved(states[0][name], state[name]) for name in states[0]) for state in states
            ] == [False, False, True]
    logs = [log_of(tmp_path / out) for out in "abc"]
    assert [logs[0] != log for log in logs] == [False, False, True]
    steps = (1, 2, 9, 10)                   # the warm-up, a tenth of the schedule, is short of one
    for steps in steps if stage is finetune else (0, *steps):
        brief(stage, files, tmp_path / "n", "--steps", steps, "--batch-size", 2)
        assert len(log_of(tmp_path / "n")) == steps


@pytest.mark.parametrize("again", (False, True))
def test_ctrl_c_to_a_command_with_workers(files, tmp_path, again):
    """As a terminal sends it, to all processes; started with it ignored, as by `nohup ... &`. While
    it runs, no other run can write to its folder, and none while it goes on after a stop."""
    flags = "--save-every", 0, "--workers", 2, "--steps", 100_000
    out, state = tmp_path / "out", tmp_path / "out/state.pt"
    if again:
        Run(align_features, files, out, *flags, before=at(3, send(signal.SIGINT))).wait()
    before = state.stat().st_mtime_ns if again else 0
    argv = command(align_features, files, out, *flags)
    process = subprocess.Popen([sys.executable, *argv], stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
        time.sleep(0.01)
    code, _, last = Run(align_features, files, out, *flags).wait()
    assert code == 1 and "is being written by another run" in last
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "stopped by SIGINT: step" in errors.splitlines()[-1] and again == ("goes on" in said)
    with pytest.raises(ProcessLookupError):             # no worker is left
        os.killpg(process.pid, 0)


@ALL
def test_two_processes_equal_one(files, tmp_path, stage):
    """20 steps in float64 within 1e-8; only the first writes and prints; both stop together."""
    flags = ["--steps", 20, "--dtype", "float64", "--lr", 1e-3]
    one, two = tmp_path / "one", tmp_path / "two"
    brief(stage, files, one, "--every", 4, *flags)

    def pair(before=lambda: None):
        """What torchrun --nproc-per-node 2 starts, without its imports."""
        with socket.create_server(("localhost", 0)) as free:
            port = str(free.getsockname()[1])

        def rank(n):
            os.environ |= dict(RANK=str(n), WORLD_SIZE="2", MASTER_ADDR="localhost",
                               MASTER_PORT=port)
            for module in (model, *STAGES):
                module.RANK, module.WORLD = n, 2
            before()

        runs = [Run(stage, files, two, *flags, before=partial(rank, n)) for n in (0, 1)]
        return [run.wait() for run in runs]

    (code, _, last), quiet = pair(at(7, lambda: model.RANK and send(signal.SIGTERM)()))
    assert code == 143 and "step 7" in last and quiet == (143, "", "")
    (code, said, _), quiet = pair()
    assert code == 0 and "goes on from step 7 of 20" in said and quiet == (0, "", "")
    assert hashes(one).keys() == hashes(two).keys()
    for want, have in zip(weights(one).values(), weights(two).values(), strict=True):
        assert all(want[key].dtype == torch.float64 for key in want)
        assert max((want[key] - have[key]).abs().max() for key in want) < 1e-8
    losses = [[row["loss"] for row in log_of(out)] for out in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-8) and len(losses[0]) == 20


def test_torchrun(files, tmp_path):
    argv = command(align_features, files, tmp_path / "out", "--steps", 1)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           *argv], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1 == done.stdout.count("training all")


def test_the_logs_length_is_saved_also_by_a_resume_that_takes_no_step(files, tmp_path, whole):
    """Killed twice in scoring, with lines in the log that the state does not know of."""
    out, kill = tmp_path / "out", lambda: os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(2):
        Run(align_features, files, out, before=lambda: setattr(
            align_features, "picture", lambda *args: kill())).wait()
        with open(out / "log.jsonl", "a") as log:
            log.write('{"step": 99}\n')
    length = torch.load(out / "state.pt", weights_only=True)["logged"]
    (out / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes()[:length])
    assert [row["step"] for row in log_of(out)] == list(range(1, STEPS + 1))
    assert Run(align_features, files, out).wait()[0] == 0
    check_same(out, whole(align_features))
