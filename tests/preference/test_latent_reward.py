"""The latent reward model: its scores beside the formula over diffusers' and transformers' own networks, its files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spo.algorithm.preference import Candidates
from spo.checkpoint.tensor_file import open_tensor_file
from spo.cli.main import main
from spo.errors import SpoError
from spo.preference.clip.towers import TowerShape, token_ids
from spo.preference.latent_reward import LatentReward, _Text, empty_unet, feature_width
from spo.preference.load import describe_preference, list_preference_models, load

PROMPTS = ["a red fox", "two boats, evening"]
COUNTS = {"sd15": 1, "sdxl": 2}


class Published:
    """The formula, told by the networks' whole outputs: what is published, at small size and with random weights."""

    def __init__(self, architecture):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        torch.manual_seed(1)
        self.architecture, width = architecture, 32
        text = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        text |= {"projection_dim": 24, "bos_token_id": 49406, "eos_token_id": 49407}
        blocks = {"norm_num_groups": 8, "layers_per_block": 2, "sample_size": 16, "attention_head_dim": 4}
        if architecture == "sd15":
            self.texts = [CLIPTextModel(CLIPTextConfig(**text))]
            self.unet = UNet2DConditionModel(
                block_out_channels=(16, 16, 32, 32), cross_attention_dim=width, **blocks
            )  # fmt: skip
        else:
            kinds = (CLIPTextModel, CLIPTextModelWithProjection)
            acts = ("quick_gelu", "gelu")
            self.texts = [kind(CLIPTextConfig(**text, hidden_act=act)) for kind, act in zip(kinds, acts, strict=True)]
            self.unet = UNet2DConditionModel(
                block_out_channels=(16, 32, 32), cross_attention_dim=2 * width, transformer_layers_per_block=[1, 1, 2],
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24 + 6 * 8, **blocks,
            )  # fmt: skip
        channels = self.unet.config.block_out_channels
        self.visual = nn.Linear(sum(channels) + channels[-1], 24, bias=False)
        self.text = nn.Linear(width, 24, bias=False)
        self.logit_scale = torch.tensor(2.5)
        for module in (self.unet, *self.texts):
            for weight in module.parameters():
                nn.init.normal_(weight, std=0.1)

    def save(self, folder):
        self.unet.save_pretrained(folder / "unet")
        for number, text in enumerate(self.texts):
            text.save_pretrained(folder / ("text_encoder_2" if number else "text_encoder"))
        parts = {"visual_projection": self.visual.state_dict(), "logit_scale": self.logit_scale}
        if self.architecture == "sd15":
            parts["text_projection"] = self.text.state_dict()
        torch.save(parts, folder / "state_dict.pt")
        return folder

    @torch.no_grad()
    def scores(self, latents, timestep, prompts):
        """[N] of [N, 4, h, w] latents as the UNet sees them and as many prompts."""
        outputs = []
        hooks = [
            block.register_forward_hook(lambda block, args, output: outputs.append(output))
            for block in (*self.unet.down_blocks, self.unet.mid_block)
        ]
        try:
            both = []
            for some in (prompts, [""] * len(prompts)):
                outputs.clear()
                states, pooled = self._encoded(some)
                side = 8.0 * self.unet.config.sample_size
                sizes = torch.tensor([[side, side, 0, 0, side, side]]).repeat(len(some), 1)
                added = {"text_embeds": pooled, "time_ids": sizes} if self.architecture == "sdxl" else None
                self.unet(latents, timestep, encoder_hidden_states=states, added_cond_kwargs=added)
                *levels, middle = outputs
                skips = [
                    latents,
                    *(skip for level in levels for skip in level[1]),
                ]  # number 0: of the first convolution
                chosen = [skips[number].mean((2, 3)) for number in (2, 5, 8, 11) if number < len(skips)]
                both.append((chosen, middle.mean((2, 3)), pooled))
        finally:
            for hook in hooks:
                hook.remove()
        (chosen, prompted, pooled), (_, unprompted, _) = both
        features = self.visual(torch.cat([*chosen, unprompted + 7.5 * (prompted - unprompted)], 1))
        wanted = self.text(pooled) if self.architecture == "sd15" else pooled
        return self.logit_scale.exp() * torch.cosine_similarity(features, wanted, dim=1)

    def _encoded(self, prompts):
        ids = token_ids(prompts)
        if self.architecture == "sd15":
            output = self.texts[0](ids)
            return output.last_hidden_state, output.pooler_output
        padded = ids.clone()
        for row in padded:
            row[int(row.argmax()) + 1 :] = 0
        first, second = (text(i, output_hidden_states=True) for text, i in zip(self.texts, (ids, padded), strict=True))
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def published(request):
    return Published(request.param)


@pytest.fixture(scope="module")
def packed(published, tmp_path_factory):
    folder = published.save(tmp_path_factory.mktemp("published") / f"lrm_{published.architecture}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spo.checkpoint.tensor_file.FIRST_SAFE_TORCH", (2, 0))
        assert main(["convert-preference", str(folder), "--precision", "float32"]) == 0
    return folder.with_name(f"{folder.name}.half.safetensors")


def pool(x, sigma=2.0, timestep=400.0):
    return Candidates(x, sigma, timestep, None, lambda latents: pytest.fail("decoded"))


def test_scores_are_the_formula_s(published, packed):
    model = load(packed, architecture=published.architecture)
    torch.manual_seed(2)
    x = 3 * torch.randn(3, 2, 4, 16, 16)
    scores = model.score(pool(x), PROMPTS)
    expected = [published.scores(x[:, n] / 5**0.5, 400.0, [PROMPTS[n]] * 3) for n in range(2)]
    torch.testing.assert_close(scores, torch.stack(expected, 1), rtol=1e-4, atol=1e-4)
    assert scores.std() > 1e-3
    assert not torch.allclose(scores, model.score(pool(x, timestep=100.0), PROMPTS), atol=1e-4)
    model.latents_per_call = 4  # which latents go together changes nothing
    torch.testing.assert_close(scores, model.score(pool(x), PROMPTS), rtol=1e-4, atol=1e-4)


def test_a_prompt_is_encoded_once(published, packed, monkeypatch):
    model = load(packed, architecture=published.architecture)
    x = torch.randn(2, 2, 4, 16, 16)
    first = model.score(pool(x), PROMPTS)
    monkeypatch.setattr(model, "_encoded", lambda prompt: pytest.fail(f"encoded {prompt} again"))
    assert torch.equal(first, model.score(pool(x), PROMPTS))
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        model.score(pool(x), PROMPTS[:1])


def test_the_list_knows_it_and_its_folder(published, packed):
    info = describe_preference(packed)
    assert (info.kind, info.sees, info.knows_timestep) == ("latent reward model", "noisy latents", True)
    assert info.architecture == published.architecture
    found = list_preference_models(packed.parent)
    assert [model.path for model in found.models] == [packed]
    assert any("convert-preference" in text for text in found.refused)
    with pytest.raises(SpoError, match="latent reward model as it was published: make one file of it"):
        load(packed.with_name(f"lrm_{published.architecture}"))


def test_half_precision_leaves_out_the_way_up(published, packed, tmp_path, monkeypatch):
    target = tmp_path / "half.safetensors"
    folder = packed.with_name(f"lrm_{published.architecture}")
    monkeypatch.setattr("spo.checkpoint.tensor_file.FIRST_SAFE_TORCH", (99, 0))
    assert main(["convert-preference", str(folder), "--output", str(target)]) == 2  # as in the WebUI
    assert not target.exists()
    monkeypatch.setattr("spo.checkpoint.tensor_file.FIRST_SAFE_TORCH", (2, 0))
    assert main(["convert-preference", str(folder), "--output", str(target)]) == 0
    tensors = open_tensor_file(target).tensors
    assert {entry.dtype for name, entry in tensors.items() if name != "logit_scale"} == {"F16"}
    assert tensors["logit_scale"].dtype == "F32"
    assert not any("up_blocks" in name or "conv_out" in name for name in tensors)
    model = load(target, architecture=published.architecture)
    x = torch.randn(2, 1, 4, 16, 16)
    exact = load(packed, architecture=published.architecture).score(pool(x), PROMPTS[:1])
    torch.testing.assert_close(model.score(pool(x), PROMPTS[:1]), exact, rtol=0.02, atol=0.02)


def test_a_damaged_file_is_named(packed, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors, metadata = load_file(packed), dict(open_tensor_file(packed).metadata)
    save_file(tensors, tmp_path / "a.safetensors", {**metadata, "unet_config": "{}x"})
    with pytest.raises(SpoError, match='"a.safetensors" is a damaged latent reward model'):
        load(tmp_path / "a.safetensors")
    del tensors["unet.conv_in.bias"]
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    with pytest.raises(SpoError, match='incomplete: it lacks 1 of .*"unet.conv_in.bias"'):
        load(tmp_path / "b.safetensors")


FULL_SIZE = {  # what the two architectures' own configurations say
    "sd15": ({"cross_attention_dim": 768}, [TowerShape(768, 3072, 12, 12, "quick_gelu")], 64, 768, 4800),
    "sdxl": (
        {
            "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        [TowerShape(768, 3072, 12, 12, "quick_gelu"), TowerShape(1280, 5120, 32, 20)], 128, 1280, 3520,
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_feature_widths_of_the_full_size(architecture):
    config, texts, side, projection, width = FULL_SIZE[architecture]
    with torch.device("meta"):
        model = LatentReward(empty_unet(config), texts, [49408] * len(texts), projection)
        states = sum(text.width for text in texts)
        prompted, empty = (_Text(torch.empty(n, 77, states), torch.empty(n, projection)) for n in (2, 1))
        features = model.latent_features(torch.empty(2, 4, side, side), 500.0, prompted, empty)
    assert features.shape == (2, width) and feature_width(model.unet) == width
    assert model.visual_projection.weight.shape == (projection, width)
