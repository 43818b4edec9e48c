"""The recipe of the demo checkpoint: its data against the files it made, and every stage run on made-up emoji."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from recipes.demo_checkpoint import prompts as prompt_stages
from recipes.demo_checkpoint.checkpoint import config_yaml, schedule_buffers
from recipes.demo_checkpoint.classifier import temperature
from recipes.demo_checkpoint.ldm_names import ldm_text_name, ldm_unet_name, ldm_vae_name
from recipes.demo_checkpoint.make_checkpoint import STAGES, main
from recipes.demo_checkpoint.networks import (
    SCALE_FACTOR,
    SHIPPED_VAE,
    TEXT_CONFIG,
    VAE,
    build_text_encoder,
    build_unet,
    build_vae,
    parameter_count,
    shape_of,
)
from recipes.demo_checkpoint.pictures import (
    CHOICE,
    clean_name,
    is_subject,
    is_taught,
    load_pictures,
    render,
    to_pixels,
)
from recipes.demo_checkpoint.taken import VAE_PREFIX, read_text_encoder, read_unet, read_vae
from spo.checkpoint.tensor_file import open_tensor_file, read_tensors
from spo.demo.judge import HERE, held_out
from spo.demo.subjects import load
from spo.prompts import read_prompts
from tests.recipes.conftest import ENTRY


@pytest.fixture(scope="module")
def networks():
    with torch.device("meta"):
        return build_unet(), build_vae(SHIPPED_VAE), build_text_encoder()


def test_the_configuration_is_the_demos():
    assert config_yaml(SHIPPED_VAE) == (HERE / "demo.yaml").read_text(encoding="utf-8")
    saved = json.loads((HERE / "text_encoder_config.json").read_text(encoding="utf-8"))
    assert {name: saved[name] for name in TEXT_CONFIG} == TEXT_CONFIG


def test_the_networks_have_the_demos_names_and_shapes(networks):
    unet, vae, text_encoder = networks
    made = {f"model.diffusion_model.{ldm_unet_name(name)}": value for name, value in unet.state_dict().items()}
    made |= {f"first_stage_model.{ldm_vae_name(name)}": value for name, value in vae.state_dict().items()}
    text = text_encoder.state_dict()
    made |= {f"cond_stage_model.transformer.{ldm_text_name(name)}": value for name, value in text.items()}
    made |= schedule_buffers()
    with safe_open(HERE / "demo.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    ours = {name: list(value.shape) for name, value in made.items() if "position_ids" not in name}
    squeezed = {name: [side for side in shape if side != 1] for name, shape in shapes.items()}
    assert {name: [side for side in shape if side != 1] for name, shape in ours.items()} == {
        name: shape for name, shape in squeezed.items() if "position_ids" not in name
    }


def test_the_next_file_keeps_within_25_mb_and_no_group_of_its_norms_is_one_channel(networks):
    unet, _, text_encoder = networks
    with torch.device("meta"):
        vae = build_vae()
    assert shape_of(vae) == VAE
    assert 2 * sum(parameter_count(network) for network in (unet, vae, text_encoder)) < 24_000_000
    norms = [module for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms and all(norm.num_channels >= 2 * norm.num_groups for norm in norms)


def test_three_hundred_subjects_and_none_twice():
    core = CHOICE["core_subjects"]
    assert len(set(core)) == len(core) >= 300


def test_renderings_of_one_picture_differ_in_place_side_and_turn_on_white():
    halves = np.full((64, 64, 4), (200, 30, 30, 255), dtype=np.uint8)
    halves[:, :32, :3] = (30, 30, 200)
    rng = np.random.default_rng(0)
    plain, *others = (render(Image.fromarray(halves), variant, rng) for variant in range(12))
    assert (plain[0, 0] == 255).all() and (plain[32, 20] == (30, 30, 200)).all()
    assert all((other[0, 0] == 255).all() for other in others)
    assert len({(other[32] != 255).any(1).argmax() for other in others}) > 4  # where the picture begins
    assert {bool(other[32, 20, 0] > other[32, 20, 2]) for other in others} == {False, True}  # which half is left
    edges = [(np.diff(other[[20, 44]].astype(int), axis=1) != 0).any(2).argmax(1) for other in others]
    assert len({int(top - bottom) for top, bottom in edges}) >= 3  # how far its side leans


def test_the_demos_prompts_are_core_subjects():
    core, told = set(CHOICE["core_subjects"]), set(held_out()[0])
    assert set(load(HERE / "subject_classifier.safetensors").classes) == core
    assert told | set(read_prompts(HERE / "prompts.txt")) <= core


@pytest.mark.parametrize(
    ("entry", "subject", "taught"),
    [
        ({"name": "HONEYBEE", "short_name": "bee"}, True, True),
        ({"name": "HONEYBEE", "short_name": "bee", "has_img_google": False}, False, True),
        ({"name": "HONEYBEE", "short_name": "bee", "obsoleted_by": "1F41D"}, False, True),
        ({"name": "FLAG", "short_name": "f", "category": "Flags"}, False, True),
        ({"name": "BLACK QUESTION MARK ORNAMENT", "short_name": "question", "category": "Symbols"}, True, True),
        ({"name": "WOMAN FARMER", "short_name": "female-farmer"}, False, True),
        ({"name": "CLOCK FACE ONE OCLOCK", "short_name": "clock1"}, False, True),
        ({"name": "NOTEBOOK", "short_name": "notebook"}, True, False),
        ({"name": "OPEN BOOK", "short_name": "book", "subcategory": "book-paper"}, True, False),
        ({"name": "BOOKS", "short_name": "books", "subcategory": "book-paper"}, True, True),
    ],
)
def test_which_emoji_are_subjects_and_which_are_taught(entry, subject, taught):
    assert (bool(is_subject(ENTRY | entry)), is_taught(ENTRY | entry)) == (subject, taught)


def test_names_lose_the_standards_typography():
    assert clean_name("HEAVY BLACK HEART") == "black heart"
    assert clean_name("WHITE SMILING FACE") == "smiling face"
    assert clean_name("Jack-o’-Lantern") == "jack-o'-lantern"


def test_help_names_every_stage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(stage in said for stage in STAGES)


def test_calibrated_probabilities_are_the_shares_right():
    """Two classes, one margin m: the least cross-entropy is where the sigmoid of m / T is the share right."""
    logits, labels = torch.tensor([[1.5, -1.5]]).repeat(40, 1), torch.tensor([0] * 38 + [1] * 2)
    found = temperature(logits, labels)
    assert found == pytest.approx(3 / np.log(0.95 / 0.05), rel=1e-4)
    assert (logits / found).softmax(1)[:, 0].mean().item() == pytest.approx(0.95, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("source", [None, HERE / "demo.safetensors"], ids=["from nothing", "from a checkpoint"])
def test_every_stage_runs(emoji, monkeypatch, source):
    """A step or two of each; what they leave is what the demo consists of."""
    monkeypatch.setattr(prompt_stages, "HELD_OUT_PROMPTS", 1)
    monkeypatch.setattr(prompt_stages, "TRAINING_PROMPTS", 2)
    monkeypatch.setattr(prompt_stages, "SELECTION_SEEDS", (0,))
    monkeypatch.setattr(prompt_stages, "SLIGHTLY_COLOURFUL", 0.0)
    monkeypatch.setitem(CHOICE, "checked_prompts", [])
    folders = [f"--flat={emoji / 'flat'}", f"--fluent={emoji / 'fluent'}", f"--work={emoji / 'work'}"]
    steps = [f"--{name}-steps=1" for name in ("vae", "unet", "core", "classifier")]
    lengths = [*steps, "--batch=4", "--device=cpu", "--save-every=1"]
    results = [f"--out={emoji / 'out'}", f"--snapshots={emoji / 'snapshots'}", "--threads=1"]
    results += [f"--checkpoint={source}"] if source else []
    main(["all", *folders, *lengths, *results])
    assert json.loads((emoji / "work" / "done.json").read_text()) == list(STAGES)
    written = (emoji / "out" / "demo.safetensors").stat().st_mtime_ns
    main(["all", *folders, *lengths, *results])  # which has nothing left to do
    assert (emoji / "out" / "demo.safetensors").stat().st_mtime_ns == written
    assert {path.name for path in (emoji / "out").iterdir()} == {
        "demo.safetensors", "demo.yaml", "text_encoder_config.json", "subject_classifier.safetensors", "prompts.txt",
        "prompts_heldout.txt", "contact_sheet.png",
    }  # fmt: skip
    assert (emoji / "snapshots" / "demo.safetensors").exists()
    names = (emoji / "out" / "prompts.txt").read_text().split("\n")
    assert len(load(emoji / "out" / "subject_classifier.safetensors").classes) == 5
    assert set(filter(None, names)) < {name.lower() for name in CHOICE["core_subjects"]}
    if source:
        check_what_was_taken(emoji)


def check_what_was_taken(emoji):
    """The autoencoder is in the new file as it was in the old one, and latents are what its encoder says."""
    both = [open_tensor_file(path / "demo.safetensors") for path in (HERE, emoji / "out")]
    old, new = (read_tensors(file, [n for n in file.tensors if n.startswith(VAE_PREFIX)]) for file in both)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    begun = torch.load(emoji / "work" / "unet_all.pt")
    taken = {"unet": read_unet(HERE / "demo.safetensors"), "text_encoder": read_text_encoder(HERE / "demo.safetensors")}
    assert all(torch.equal(begun[name], weight) for name, weight in torch.nn.ModuleDict(taken).state_dict().items())
    picture = to_pixels(load_pictures(emoji / "work")[0, 0, :1])
    mean = SCALE_FACTOR * read_vae(HERE / "demo.safetensors").encode(picture).latent_dist.mean
    latents = torch.load(emoji / "work" / "latents.pt")[0, 0, :1].float()
    torch.testing.assert_close(latents, mean, rtol=2e-3, atol=2e-3)
