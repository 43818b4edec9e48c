"""Another autoencoder for the demo's latents: what changes in the file and what does not, and that it goes on."""

from __future__ import annotations

import pytest
import torch

from recipes.demo_checkpoint.networks import VaeShape, build_vae
from recipes.demo_checkpoint.new_autoencoder import grown, main, make_examples
from recipes.demo_checkpoint.taken import VAE_PREFIX, read_vae
from spo.checkpoint.tensor_file import open_tensor_file, read_tensors
from spo.demo.judge import HERE


def made(emoji, out, *more):
    folders = [f"--flat={emoji / 'flat'}", f"--fluent={emoji / 'fluent'}", f"--work={emoji / 'work'}"]
    lengths = ["--decoder-batch=2", "--encoder-batch=2", "--save-every=1", "--threads=1", "--device=cpu"]
    main([*folders, f"--out={emoji / out}", *lengths, *more])
    file = open_tensor_file(emoji / out / "demo.safetensors")
    return read_tensors(file, file.tensors)


def test_all_but_the_autoencoder_stays(emoji):
    tensors = made(emoji, "out", "--decoder-steps=1", "--encoder-steps=1")
    file = open_tensor_file(HERE / "demo.safetensors")
    old = read_tensors(file, file.tensors)
    theirs = {name for name in old if not name.startswith(VAE_PREFIX)}
    assert {name for name in tensors if not name.startswith(VAE_PREFIX)} == theirs
    assert all(torch.equal(tensors[name], old[name]) for name in theirs)
    vae = read_vae(emoji / "out" / "demo.safetensors")  # by the names and shapes in the file
    assert vae.decode(torch.randn(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
    assert (emoji / "out" / "reconstructions.png").exists()


@pytest.mark.parametrize("cut", ["--decoder-steps=1", "--encoder-steps=1"])
def test_more_steps_train_the_part_they_are_for(emoji, cut):
    """The other part is as it was, so what was cut off goes on."""
    first = made(emoji, "first", "--decoder-steps=1", "--encoder-steps=1")
    longer = {"--decoder-steps=1": "--encoder-steps=2", "--encoder-steps=1": "--decoder-steps=2"}[cut]
    then = made(emoji, "then", cut, longer)
    changed = {name for name in first if not torch.equal(first[name], then[name])}
    parts = {"--encoder-steps=2": ("encoder.", "quant_conv."), "--decoder-steps=2": ("decoder.", "post_quant_conv.")}
    assert changed and all(name.startswith(tuple(VAE_PREFIX + part for part in parts[longer])) for name in changed)


def test_examples_are_the_old_encoders(emoji):
    vae = read_vae(HERE / "demo.safetensors")
    examples = make_examples(emoji / "flat", emoji / "fluent", vae, emoji / "examples.pt")
    assert examples.pixels.shape == (5, 2, 8, 3, 64, 64) and examples.moments.shape == (5, 2, 8, 8, 8, 8)
    again = make_examples(emoji / "flat", emoji / "fluent", None, emoji / "examples.pt")  # needs nothing: it is there
    assert torch.equal(examples.moments, again.moments)
    torch.manual_seed(0)
    pixels, moments = examples.batch(3)
    mean = vae.encode(pixels).latent_dist.mean
    assert torch.allclose(mean, moments[:, :4], atol=0.02 * float(mean.abs().max()))


def test_it_begins_with_the_old_weights():
    """What fits is the same; of a width twice as large two channels are one of the old ones, but for a little noise."""
    old = build_vae(VaeShape(32, (1, 2, 2, 2), 1))
    new = grown(old).state_dict()
    assert torch.equal(new["decoder.mid_block.resnets.0.conv1.weight"], old.decoder.mid_block.resnets[0].conv1.weight)
    theirs, ours = old.encoder.conv_in.weight, new["encoder.conv_in.weight"]
    assert ours.shape[0] == 2 * theirs.shape[0]
    assert torch.allclose(ours.unflatten(0, (-1, 2)).mean(1), theirs, rtol=0.2, atol=0)
    last = new["decoder.conv_out.weight"].unflatten(1, (-1, 2)).sum(2)
    assert torch.allclose(last, old.decoder.conv_out.weight, rtol=0.2, atol=0)
