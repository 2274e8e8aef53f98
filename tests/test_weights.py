"""Weight files: written and read bit for bit, or refused in a line. Downloads: from 127.0.0.1."""
import hashlib
import http.server
import json
import threading
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import model
from conftest import error, randomise, refusal, same, seeded
from model import ATTENTION, KNOWN, Architecture, ViT, linearize, load_pair, load_vit, save_vit

URL = "/timm/tiny.test/resolve/main/model.safetensors"
TINY = Architecture(width=64, depth=2, heads=4, hidden=96, patch=8, grid=(4, 4))
RICH = replace(TINY, grid=(2, 5), registers=3, cls_position=False, layerscale=True, eps=1e-5,
               mean=(0.5,) * 3)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(KNOWN, "tiny.test", TINY)
    monkeypatch.setitem(KNOWN, "tiny.other", replace(TINY, eps=1e-5))


@pytest.fixture
def vit():
    return randomise(ViT(TINY))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def written(path, content):
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return f"tiny={path}"


@pytest.mark.parametrize("arch", (TINY, RICH, replace(RICH, position="rotary", qkv_bias=False)))
@pytest.mark.parametrize("attention", ATTENTION)
def test_swapping_saving_and_loading_keep_every_weight(path, capsys, attention, arch):
    teacher, head, images = randomise(ViT(arch)).train(), nn.Linear(64, 3), seeded(1, 3, 16, 40)
    student = linearize(teacher, attention)
    own, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(own[name], tensor) and own[name].data_ptr() != tensor.data_ptr()
    assert all(".operator." in name for name in own.keys() - theirs.keys())
    assert student.training and (teacher.attention, student.attention) == ("softmax", attention)
    difference = error(student(images), teacher(images))
    assert difference < 1e-5 if "softmax" in attention else difference > 0.01
    save_vit(teacher, path, note=1)
    swapped = load_vit(path, attention=attention)
    assert same(swapped, student) and (swapped.attention, swapped.facts) == (attention, {"note": 1})
    save_vit(randomise(student, seed=1), path, head=head, note="of this run", epochs=3)
    again = load_vit(path)
    assert same(student, again) and (again.arch, again.attention) == (arch, attention)
    assert again.facts == {"note": "of this run", "epochs": 3} and not again.training
    assert torch.equal(again(images), student(images)) and not capsys.readouterr().out
    assert torch.equal(load_file(path)["head.weight"], head.weight)
    with safe_open(path, "pt") as file:                 # the header needs no code of this project
        header = json.loads(file.metadata()["adala"])
    assert (header["architecture"]["width"], header["attention"]) == (64, attention)
    assert any("gamma_1" in name for name in load_file(path)) == (arch.position == "rotary")


def test_a_save_that_fails_half_way_leaves_the_old_file(path, vit):
    resource = pytest.importorskip("resource", reason="stands in for a full disk: not on Windows")
    save_vit(vit, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        message = refusal(save_vit, ViT(TINY), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in message
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    path.with_name("plain").touch()                     # others may read it like any other file
    assert path.stat().st_mode == path.with_name("plain").stat().st_mode


@pytest.mark.parametrize("suffix", (".safetensors", ".pth", ""))
@pytest.mark.parametrize("writer", (save_file, torch.save), ids=("safetensors", "torch"))
def test_the_content_of_a_file_decides_not_its_suffix(tmp_path, vit, writer, suffix):
    """Also through a link, as in the hub's cache; float16 and bfloat16 become float32."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        vit = vit.to(dtype)
        writer(vit.state_dict(), tmp_path / "blob")
        (link := tmp_path / f"{dtype}{suffix}").symlink_to(tmp_path / "blob")
        again = load_vit(f"tiny={link}")
        assert all(p.dtype == torch.float32 for p in again.parameters())
        assert same(again, vit.float())


@pytest.mark.parametrize("prefix", ("", "module.", "teacher.backbone.", "module.vit.encoder."))
@pytest.mark.parametrize("key", (None, "model", "anything"))
def test_the_one_vit_inside_is_taken_and_the_rest_named(tmp_path, vit, capsys, key, prefix):
    """DINO, DINOv2, DeiT, AugReg, SigLIP, trainers: wrappers' names, tensors of other tasks."""
    others = {prefix + name: torch.ones(3) for name in (
        "mask_token", "head.bias", "head_dist.weight", "fc_norm.weight", "attn_pool.q.weight")}
    others |= {"loss.centre": torch.ones(3)} if prefix else {}
    tensors = {prefix + name: tensor for name, tensor in vit.state_dict().items()} | others
    more = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}}
    spec = written(tmp_path / "a.pth", {key: tensors} | more if key else tensors)
    assert same(load_vit(spec), vit)
    first, second = capsys.readouterr().out.splitlines()
    whole = f"{key}/" if key else ""
    left_out = {whole + name for name in others}
    left_out |= {"epoch", "optimizer/state", "optimizer/param_groups"} if key else set()
    assert f"a.pth: prefix '{whole}{prefix}', " in first
    assert set(first.split("left out: ")[1].split(", ")) == left_out
    assert "a.pth: read as tiny.test" in second


def test_a_file_without_a_header_needs_a_name_and_says_what_it_was_taken_for(path, vit, capsys):
    spec = written(path, vit.state_dict())
    assert f"NAME={path}" in refusal(load_vit, path) and not capsys.readouterr().out
    for name, full in (("tiny", "tiny.test"), ("tiny.test",) * 2, ("tiny.other",) * 2):
        assert load_vit(f"{name}={path}").arch == KNOWN[full]           # no tag: the first
        said, = capsys.readouterr().out.splitlines()
        assert said.startswith(f"{path}: read as {full}, mean {TINY.mean}, std {TINY.std}, ")
    save_vit(vit, path)                                 # its header agrees with one of them
    assert load_vit(spec).arch == load_vit(path).arch == TINY
    assert "is no tiny.other" in refusal(load_vit, f"tiny.other={path}")


def test_official_dinov2_with_registers_adds_clss_position(tmp_path, monkeypatch):
    """Its files hold a position for CLS, which timm's have added to CLS, and register_tokens."""
    arch = replace(TINY, registers=4, layerscale=True)
    monkeypatch.setitem(KNOWN, "tiny.test", replace(arch, cls_position=False))
    official = randomise(ViT(arch))
    tensors = official.state_dict()
    tensors["register_tokens"] = tensors.pop("reg_token")
    loaded = load_vit(written(tmp_path / "official.pth", tensors))
    for size in ((32, 32), (24, 48)):
        assert error(loaded(seeded(1, 3, *size)), official(seeded(1, 3, *size))) <= 1e-6


HEADERS = ("[]", "null", '"text"', "{", "3", *map(json.dumps, (         # of other programs
    {"architecture": 3}, {"architecture": {"width": 64}}, {"attention": "linear"},
    *({"architecture": asdict(TINY) | more} for more in ({"new": 1}, {"grid": 4}, {"width": "64"})),
    *({"architecture": asdict(TINY), "attention": name} for name in (["linear"], "mamba")))))
QKV, BIAS, FC2 = "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias", "blocks.1.mlp.fc2.weight"
UNFIT = {                                   # (tensors -> tensors, words of the message)
    "lacks two": (lambda t: {name: t[name] for name in t.keys() - {BIAS, "norm.bias"}},
                  ("Missing", BIAS, "norm.bias")),
    "one more": (lambda t: t | {"blocks.0.x": torch.ones(1)}, ("Unexpected", "blocks.0.x")),
    "turned": (lambda t: t | {FC2: t[FC2].T.contiguous()}, (FC2, "[96, 64]", "[64, 96]")),
    "patches flat": (lambda t: t | {model.MARK: torch.ones(64, 192)}, ("mismatch", model.MARK)),
    "integer": (lambda t: t | {BIAS: torch.ones(192, dtype=torch.int64)}, ("floating", BIAS)),
    "NaN": (lambda t: t | {QKV: t[QKV].where(t[QKV] != t[QKV].max(), torch.nan)}, ("NaN", QKV)),
}


@pytest.mark.parametrize("change, words", UNFIT.values(), ids=UNFIT)
def test_a_tensor_that_does_not_fit_is_named(path, vit, change, words):
    for ours in (True, False):
        header = {"adala": json.dumps({"architecture": asdict(TINY)})}
        save_file(change(vit.state_dict()), path, header if ours else None)
        message = refusal(load_vit, path if ours else f"tiny={path}")
        assert all(word in message for word in (str(path), *words)), message


MANY, ONE = ViT(TINY).state_dict(), torch.ones(1)
REFUSED = [                                 # (content of a.pth, words of the message)
    ({"student": MANY, "teacher": MANY}, ("found 2: student/, teacher/",)),
    ({"model": MANY, "model_ema": MANY, "n": 1}, ("found 2: model/, model_ema/",)),
    ({f"{who}.backbone.{name}": t for name, t in MANY.items() for who in ("student", "teacher")},
     ("student.backbone., teacher.backbone.",)),
    ({"embeddings.patch_embeddings.projection.weight": ONE}, ("embeddings.patch_emb",)),
    ({"model": MANY, "args": Namespace(lr=1)}, ("argparse.Namespace",)),
    (ViT(TINY), ("model.ViT",)),            # a pickled object is never run
    ({model.MARK: ONE, "register_tokens": ONE}, ()),
    *((content, ()) for content in (MANY | {"epoch": 3}, MANY | {0: ONE}, {0: ONE}, [ONE], ONE, {},
                                    {"model": {"epoch": 3}})),
]


def test_a_file_without_one_vit_is_refused_with_what_it_holds(tmp_path, path, vit):
    for content, words in REFUSED:
        message = refusal(load_vit, written(tmp_path / "a.pth", content))
        assert all(word in message for word in (str(tmp_path / "a.pth"), *words)), message
    for header in HEADERS:
        save_file(vit.state_dict(), path, {"adala": header})
        assert str(path) in refusal(load_vit, path), header
    for name in ("a.pth", "a.safetensors"):
        written(file := tmp_path / name, vit.state_dict())
        whole = file.read_bytes()
        junk = [b"", b"junk", b".\n", b"r" * 99, bytes(range(256)) * 9, b"12345678{",
                b"<html>404</html>\n", b"\xff" * 8 + b"{}" * 9]
        for content in junk + [whole[:int(x * len(whole))] for x in (1e-4, .01, .5, .9, .9999)]:
            file.write_bytes(content)
            for spec in (file, f"tiny={file}"):
                assert str(file) in refusal(load_vit, spec), content[:99]


def test_what_is_neither_a_file_nor_a_name_is_refused(tmp_path, path):
    for spec in (path, tmp_path, "vit_gigantic", "tiny.tag", f"tinny={path}", "demo", ""):
        message = refusal(load_vit, spec)               # the demo has no published file
        assert "`python model.py` lists" in message and str(spec) in message
    for spec in (f"tiny={path}", f"demo={path}", f"tiny={tmp_path}"):
        assert spec.partition("=")[2] in refusal(load_vit, spec)


def test_every_name_builds_and_without_its_tag_means_the_first(monkeypatch, capsys):
    monkeypatch.setattr(model, "download", Path)
    for name in list(KNOWN)[1:]:
        assert model.weights_file(name) == (Path(name), name)
        said, exact = capsys.readouterr().out, name.replace("clip", "clip_quickgelu")
        assert (f"{exact} is exact" in said) == name.endswith("clip_224.openai") == bool(said)
        assert exact in KNOWN or not said
    for bare, first in {name.partition(".")[0]: name for name in reversed(KNOWN)}.items():
        assert bare == "demo" or model.weights_file(bare)[1] == first
    for name in ("14_dinov2.lvd142m", "14_clip_quickgelu_224.openai", "16_siglip_384.webli",
                 "16_dinov3.lvd1689m", "16_224.augreg_in21k_ft_in1k"):  # the paper's, and DINOv3
        assert f"vit_large_patch{name}" in KNOWN
    for name in ("clip_224.laion2b", "siglip_256.webli", "224.augreg2_in21k_ft_in1k"):
        assert model.weights_file(f"vit_base_patch16_{name.split('.')[0]}")[1].endswith(name)


def test_a_student_is_taken_with_its_own_teacher_alone(tmp_path, vit):
    """However the teacher's file is called: the fingerprint is of its tensors."""
    t, moved, other, shallow, s, orphan = (tmp_path / f"{i}.safetensors" for i in range(6))
    save_vit(vit, t), save_vit(vit, moved), save_vit(randomise(ViT(TINY), seed=1), other)
    save_vit(ViT(replace(TINY, depth=1)), shallow)
    bare = written(tmp_path / "bare.pth", vit.state_dict())
    for attention in (None, "relu"):
        teacher, student, digest = load_pair(t, attention=attention)
        assert (teacher.attention, student.attention) == ("softmax", attention or "linear")
        assert same(teacher, vit) and same(student, vit) and len(digest) == 64
    save_vit(randomise(linearize(vit, "hedgehog"), seed=2), s, teacher=digest)
    save_vit(linearize(vit), orphan)
    for spec in (t, moved, str(t), bare):
        for attention in (None, "hedgehog"):
            teacher, student, again = load_pair(spec, s, attention)
            assert again == digest and same(teacher, vit) and same(student, load_vit(s))
    quick = bare.replace("tiny", "tiny.other", 1)
    for theirs, ours in ((other, s), (shallow, s), (quick, s), (t, orphan)):
        message = refusal(load_pair, theirs, ours)
        assert f"{ours} was not aligned to {theirs}" in message and "stage 1 again" in message
    assert f"{s} cannot teach" in refusal(load_pair, s)
    assert "--attention relu" in refusal(load_pair, t, s, "relu")


def test_students_of_the_first_version_load_but_need_stage_1_again(tmp_path, vit, path):
    student = randomise(linearize(vit, "hedgehog"))
    save_vit(vit, teacher := tmp_path / "t.safetensors")
    tensors = {f"{name.replace('.operator', '')}.weight" if "operator" in name else name: tensor
               for name, tensor in student.state_dict().items()}
    header = {"architecture": asdict(TINY) | {"interpolation": "bicubic"}, "attention": "hedgehog",
              "stage": "attention", "teacher": {"file": "t.safetensors", "sha256": 64 * "0"}}
    save_file(tensors, path, {"adala": json.dumps(header)})
    again = load_vit(path)
    assert same(again, student) and (again.arch, again.facts["stage"]) == (TINY, "attention")
    assert "run stage 1 again" in refusal(load_pair, teacher, path)


@pytest.fixture
def hub(tmp_path, vit, monkeypatch):
    """A hub whose own reply has the file's hash, and leads to a store on another host."""
    class Hub(http.server.BaseHTTPRequestHandler):
        content, asked = save(vit.state_dict()), []
        promised = {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        claimed = renamed = mirror = error = None

        def answer(self):
            self.asked.append((self.command, self.headers["Host"].split(":")[0], self.path))
            code, headers = self.error or 200, {"Content-Length": self.claimed or len(self.content)}
            if self.renamed and "tiny" in self.path:    # on the same host, without a hash
                code, headers = 307, {"Location": self.path.replace("tiny", "renamed")}
            elif self.path.endswith("model.safetensors") and not self.mirror and not self.error:
                store = f"http://localhost:{self.server.server_port}/store"
                code, headers = 302, self.promised | {"Location": store}
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET" and code == 200:
                self.wfile.write(self.content)

        do_GET = do_HEAD = answer
        log_message = lambda *args: None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Hub.stop = lambda: (server.shutdown(), server.server_close())
    Hub.cached = tmp_path / "hub/checkpoints/tiny.test.safetensors"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(model, "HUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    yield Hub
    Hub.stop()


@pytest.mark.parametrize("kind", ("a hash", "no hash", "renamed", "mirror"))
def test_a_known_name_is_downloaded_once_and_a_missing_hash_is_said(hub, vit, capsys, kind):
    hub.promised = {} if kind == "no hash" else hub.promised
    hub.renamed, hub.mirror = kind == "renamed", kind == "mirror"
    assert same(load_vit("tiny"), vit)
    said = "sha256 checked" if kind in ("a hash", "renamed") else "hub sent no sha256"
    assert said in capsys.readouterr().out
    assert kind != "a hash" or hub.asked == [
        ("HEAD", "127.0.0.1", URL), ("GET", "127.0.0.1", URL), ("GET", "localhost", "/store")]
    hub.stop()
    assert same(load_pair("tiny.test")[0], vit) and hub.cached.read_bytes() == hub.content


@pytest.mark.parametrize("wrong", ("hash", "bit", "cut", "cut on the way", "cut, no hash", "longer",
                                   "cut by a mirror", "not a file", "404", "401", "no network"))
def test_a_damaged_download_is_refused_and_not_kept(hub, wrong):
    whole = hub.content
    for key, value in {
            "hash": dict(promised={"X-Linked-ETag": '"' + "0" * 64 + '"'}),
            "bit": dict(content=whole[:-1] + bytes([whole[-1] ^ 1])),
            "cut": dict(content=whole[:-1000]),
            "cut on the way": dict(content=whole[:-1000], claimed=len(whole)),
            "cut, no hash": dict(content=whole[:-1000], promised={}),
            "longer": dict(content=whole + b" ", promised={}),
            "cut by a mirror": dict(content=whole[:-1000], claimed=len(whole), mirror=True),
            "not a file": dict(content=b"<html>Sign in</html>", promised={}),
            "404": dict(error=404), "401": dict(error=401),             # no such file, or a login
            "no network": {}}[wrong].items():
        setattr(hub, key, value)
    if wrong == "no network":
        hub.stop()
    message = refusal(load_vit, "tiny")
    assert "tiny.test could not be downloaded" in message
    assert model.HUB + URL in message and str(hub.cached) in message
    assert not any(hub.cached.parent.iterdir()) and (not wrong.isdigit() or wrong in message)
