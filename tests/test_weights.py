"""Weight files: written and read bit for bit, or refused in a line. Downloads: from a folder."""
import json
import re
import runpy
from argparse import Namespace
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import model
from conftest import error, randomise, refusal, same, seeded
from model import ATTENTION, KNOWN, Architecture, ViT, linearize, load_pair, load_vit, save_vit

TINY = Architecture(width=64, depth=2, heads=4, hidden=96, patch=8, grid=(4, 4))
RICH = replace(TINY, grid=(2, 5), registers=3, cls_position=False, layerscale=True, eps=1e-5)
OURS = {"architecture": asdict(TINY)}                   # our header
VIT, ONE, BIAS = randomise(ViT(TINY)), torch.ones(1), "blocks.1.attn.qkv.bias"
MANY = VIT.state_dict()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(KNOWN, "tiny.test", TINY)
    monkeypatch.setitem(KNOWN, "tiny.other", replace(TINY, eps=1e-5))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def written(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return f"tiny={path}"


@pytest.mark.parametrize("arch", (RICH, replace(RICH, position="rotary", qkv_bias=False)))
@pytest.mark.parametrize("attention", ATTENTION)
def test_students_are_copies_and_their_files_are_loaded_bit_for_bit(path, capsys, attention, arch):
    teacher, head, images = randomise(ViT(arch)), torch.nn.Linear(64, 3), seeded(1, 3, 16, 40)
    student = linearize(teacher, attention)
    for name, tensor in teacher.state_dict().items():
        own = student.state_dict()[name]
        assert torch.equal(own, tensor) and own.data_ptr() != tensor.data_ptr()
    path = path.parent / "new/student.safetensors"
    save_vit(randomise(student, seed=1), path, head=head, note="of this run", epochs=3)
    again = load_vit(path)
    assert same(linearize(student, attention), student)                 # what it learnt stays
    assert same(student, again) and (again.arch, again.attention) == (arch, attention)
    assert again.header == {"note": "of this run", "epochs": 3} and not again.training
    assert torch.equal(again(images), student(images)) and not capsys.readouterr().out
    assert torch.equal(load_file(path)["head.weight"], head.weight)
    other = linearize(teacher.double(), attention)      # a new module would train, in float32
    assert not other.training and other.norm.weight.dtype == torch.float64


def test_a_file_says_on_which_grid_its_operator_learned_and_a_new_one_learns_on_its_own(path):
    save_vit(linearize(ViT(TINY), "linear_conv", 40), path)
    student = load_vit(path)
    for vit in (student, linearize(student, "linear_conv", 80)):        # what it learnt stays
        assert vit.arch.aligned == vit.blocks[0].attn.operator.side == 5
    assert linearize(student, "linear", 80).arch.aligned == 10
    assert linearize(student, "linear").arch.aligned == 4               # the native size
    assert "multiples of the patch, 8" in refusal(linearize, student, "linear", 44)


def test_a_student_is_taken_with_its_own_teacher_alone_by_whatever_name(tmp_path):
    t, other, s = (tmp_path / f"{i}.safetensors" for i in range(3))
    save_vit(VIT, t), save_vit(randomise(ViT(TINY), seed=1), other)
    bare = written(tmp_path / "bare.pth", MANY)
    teacher, student, digest = load_pair(t)
    assert same(teacher, VIT) and same(student, VIT) and student.attention == "linear"
    save_vit(randomise(linearize(VIT, "hedgehog", 16), seed=2), s, teacher=digest)
    for spec, attention in ((t, None), (bare, "hedgehog")):
        teacher, student, again = load_pair(spec, s, attention)
        assert again == digest and same(teacher, VIT) and same(student, load_vit(s))
    for theirs, ours in ((other, s), (bare.replace("tiny=", "tiny.other="), s), (t, t)):
        assert f"{ours} was not aligned to {theirs}" in refusal(load_pair, theirs, ours)
    assert f"{s} cannot teach" in refusal(load_pair, s)
    assert "--attention linear" in refusal(load_pair, t, s, "linear")


@pytest.mark.parametrize("name", ("a.safetensors", "b.pth", "c"))
@pytest.mark.parametrize("writer", (save_file, torch.save))
def test_the_content_decides_not_the_suffix_and_a_file_that_was_cut_is_refused(
        tmp_path, writer, name):
    path = tmp_path / name
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        vit = randomise(ViT(TINY)).to(dtype)
        writer(vit.state_dict(), path)
        assert same(load_vit(f"tiny={path}"), vit.float())
    whole = path.read_bytes()
    for part in (0, 1e-4, .01, .5, .9, .9999):
        path.write_bytes(whole[:int(part * len(whole))])
        assert f"{path} is no readable state_dict" in refusal(load_vit, f"tiny={path}")


@pytest.mark.parametrize("prefix", ("", "module.", "model/", "teacher/backbone."))
def test_the_one_vit_inside_is_taken_and_the_rest_named(tmp_path, capsys, prefix):
    others = ("attn_pool.q.weight", "fc_norm.weight", "head_dist.weight", "mask_token")
    tensors = MANY | {name: torch.ones(3) for name in others}
    key, _, inner = prefix.rpartition("/")
    tensors = {inner + name: tensor for name, tensor in tensors.items()}
    content = {key: tensors, "zoo": {"epoch": 3}} if key else tensors
    assert same(load_vit(written(tmp_path / "a.pth", content)), VIT)
    left_out, _ = capsys.readouterr().out.splitlines()
    names = [prefix + name for name in others] + ["zoo/epoch"] * (key > "")
    assert left_out.endswith(f"{len(names)} tensors are left out: {', '.join(names)}")


@pytest.mark.parametrize("blocks", [
    r"blocks.0.\1.", r"blocks.\1._checkpoint_wrapped_module._orig_mod."])     # DINOv2's chunks
def test_words_that_wrappers_put_into_names_are_taken_out(tmp_path, blocks):
    tensors = {re.sub(r"blocks\.(\d)\.", blocks, name): MANY[name] for name in MANY}
    assert same(load_vit(written(tmp_path / "a.pth", tensors)), VIT)


def test_a_file_without_a_header_needs_a_name_and_says_what_it_was_taken_for(path, capsys):
    save_file(MANY, path)
    assert f"NAME={path}" in refusal(load_vit, path) and not capsys.readouterr().out
    assert load_vit(f"tiny={path}").arch == TINY        # without its tag, the first
    assert f"{path}: read as tiny.test, mean {TINY.mean}, std " in capsys.readouterr().out
    save_vit(VIT, path)                                 # its header agrees with one name
    assert load_vit(f"tiny={path}").arch == load_vit(path).arch == TINY
    assert "does not fit tiny.other" in refusal(load_vit, f"tiny.other={path}")


def test_a_position_table_of_another_square_grid_is_read_and_said(tmp_path, capsys):
    own = randomise(ViT(replace(TINY, grid=(3, 3))))
    loaded = load_vit(written(tmp_path / "a.pth", own.state_dict()))
    assert same(loaded, own) and loaded.arch == own.arch
    assert "3 x 3" in capsys.readouterr().out.splitlines()[0]
    wide = randomise(ViT(replace(TINY, grid=(2, 5))))   # nothing says that it is not 5 x 2
    assert "pos_embed" in refusal(load_vit, written(tmp_path / "a.pth", wide.state_dict()))


def test_official_dinov2_with_registers_adds_clss_position(tmp_path, monkeypatch):
    """Its files hold a position for CLS, which timm's have added to CLS, and register_tokens."""
    arch = replace(TINY, registers=4, layerscale=True)
    monkeypatch.setitem(KNOWN, "tiny.test", replace(arch, cls_position=False))
    official = randomise(ViT(arch))
    tensors = official.state_dict()
    tensors["register_tokens"] = tensors.pop("reg_token")
    loaded = load_vit(written(tmp_path / "official.pth", tensors))
    assert error(loaded(images := seeded(1, 3, 24, 48)), official(images)) <= 1e-6


@pytest.mark.parametrize("change, header, words", [
    ({BIAS: None}, OURS, ("1 missing", BIAS)),
    ({"blocks.1.x": ONE}, OURS, ("1 unexpected", "blocks.1.x")),
    ({BIAS: torch.ones(64)}, OURS, (BIAS, "[64]", "[192]")),
    ({BIAS: torch.ones(192, dtype=torch.int64)}, OURS, (BIAS, "floating-point", "int64")),
    ({BIAS: torch.full((192,), torch.inf)}, OURS, (BIAS, "expected finite")),
    ({}, {"architecture": {"width": 64}}, []), ({}, OURS | {"attention": "mamba"}, ["mamba"])])
def test_a_tensor_or_a_header_that_does_not_fit_is_named(path, change, header, words):
    tensors = {name: t for name, t in (MANY | change).items() if t is not None}
    save_file(tensors, path, {"adala": json.dumps(header)})
    assert all(word in refusal(load_vit, path) for word in (str(path), *words))


@pytest.mark.parametrize("content, words", [
    ({"student": MANY, "teacher": MANY}, "found 2: student/, teacher/"),
    ({"embeddings.patch_embeddings.projection.weight": ONE}, "embeddings.patch_emb"),
    ({"model": MANY, "args": Namespace(lr=1)}, "argparse.Namespace"),   # objects are never made
    ({}, "no tensors"), (b"12345678{", ""),
    (b"version https://git-lfs.github.com/spec/v1\n", "it starts with b'version https://git-lfs")])
def test_a_file_without_one_vit_is_refused_with_what_it_is_or_holds(tmp_path, content, words):
    message = refusal(load_vit, written(tmp_path / "a.pth", content))
    assert str(tmp_path / "a.pth") in message and words in message


def test_what_is_neither_a_file_nor_a_name_is_refused(tmp_path, path):
    for spec in (path, tmp_path, "vit_gigantic", "tiny.tag", f"tinny={path}"):
        message = refusal(load_vit, spec)
        assert "`python model.py` lists" in message and str(spec) in message
    assert str(path) in refusal(load_vit, f"tiny={path}")


def test_a_known_name_is_downloaded_once_and_a_damaged_download_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", tmp_path.as_uri() + "/")
    monkeypatch.setattr(model, "HUB", runpy.run_path(model.__file__)["HUB"])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = tmp_path / "timm/tiny.test/resolve/main/model.safetensors"
    kept = tmp_path / "hub/checkpoints/tiny.test.safetensors"
    file.parent.mkdir(parents=True)
    for content in (None, save(MANY)[:-1000], b"<html>Sign in</html>"):
        if content:
            file.write_bytes(content)
        message = refusal(load_vit, "tiny")
        assert f"tiny.test could not be downloaded from {file.as_uri()}" in message
        assert str(kept) in message and not any(kept.parent.iterdir())
    save_file(MANY, file)
    assert same(load_vit("tiny"), VIT)
    file.unlink()
    assert same(load_vit("tiny.test"), VIT)
