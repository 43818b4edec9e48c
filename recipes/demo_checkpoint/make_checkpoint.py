#!/usr/bin/env python3
"""Make the demo checkpoint: a small text-to-image model with Stable Diffusion 1's architecture, trained on emoji.

Stages, in this order (each reads what the earlier ones left in --work, the last ones write into --out):

    data        choose subjects, render both styles on white with small jitters   -> pictures.npy, subjects.json
    vae         train the f8 autoencoder                                          -> vae.pt, reconstructions.png
    vae_colour  tune the autoencoder's colours                                    -> vae.pt, reconstructions.png
    encode      encode the pictures and measure the latents' scale                -> latents.pt
    unet        train text encoder and UNet together, exporting snapshots         -> unet.pt, snapshots
    unet_core   go on with the core subjects only                                 -> unet.pt, snapshots
    classifier  train the subject classifier                                      -> subject_classifier.safetensors
    export      write the checkpoint and check it against diffusers' own loader   -> demo.safetensors, demo.yaml
    prompts     choose training and held-out prompts                              -> prompts.txt, prompts_heldout.txt
    sheet       draw contact sheets                                               -> contact_sheet.png

usage, in the project's root:
    python -m recipes.demo_checkpoint.make_checkpoint STAGE --flat <emoji-datasource-google>
        --fluent <@lobehub/fluent-emoji-3d> --tokenizer <folder with CLIP's vocab.json and merges.txt>
        --work <scratch> --out <result>
Needs torch, diffusers, transformers, safetensors, numpy, pillow. Everything runs on two CPU cores.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SIZE_PX = 64
VARIANTS = 9  # jittered renderings of a picture; the first one has no jitter
SCALE_FACTOR = 0.18215
STYLES = ("flat", "3d")
CLIP_LENGTH = 77

# ---------------------------------------------------------------------------------------------------------------
# data

SKIPPED_CATEGORIES = {"Flags", "Component", "Symbols"}
SKIPPED_SUBCATEGORIES = {"person-gesture", "person-activity", "person-sport", "family", "person-symbol"}
KEPT_FROM_SKIPPED = {
    "atm",
    "atom_symbol",
    "beginner",
    "bicyclist",
    "biohazard",
    "dancer",
    "exclamation",
    "fencer",
    "fingerprint",
    "footprints",
    "heavy_dollar_sign",
    "infinity",
    "large_blue_circle",
    "large_blue_square",
    "large_green_circle",
    "large_green_square",
    "large_orange_circle",
    "large_purple_circle",
    "large_red_square",
    "large_yellow_circle",
    "large_yellow_square",
    "low_brightness",
    "musical_note",
    "no_entry",
    "peace_symbol",
    "question",
    "radioactive",
    "recycle",
    "red_circle",
    "restroom",
    "runner",
    "skier",
    "snowboarder",
    "star_of_david",
    "surfer",
    "swimmer",
    "traffic_light",
    "trident",
    "warning",
    "wheelchair",
    "white_check_mark",
    "x",
    "yin_yang",
}
SKIPPED_NAMES = re.compile(
    r"clock face|^(man|woman|men|women|person)[ :]|(man|woman) (health|with|in|feeding)|japanese post|"
    r"banknote with (yen|euro|pound)|no mobile|one sound wave|speaker with cancel|mobile phone with|love hotel|"
    r"earth globe a|moon with face|waxing|waning|quarter moon|feeding|breast|pregnant|oncoming|lowered flag|"
    r"open mailbox|playing card|mahjong|postbox|facing right|heart suit|tram car|sun behind|hand with middle|"
    r"reversed hand|finger extended"
)
RENAMED = {  # short name -> the name used in prompts, where the Unicode name is not what people say
    "heart": "red heart",
    "pizza": "pizza",
    "bulb": "light bulb",
    "flashlight": "flashlight",
    "corn": "corn",
    "eggplant": "eggplant",
    "car": "car",
    "basketball": "basketball",
    "tennis": "tennis ball",
    "dart": "dartboard",
    "gift": "gift box",
    "8ball": "8 ball",
    "cake": "slice of cake",
    "sunny": "sun",
    "star": "star",
    "zap": "lightning bolt",
    "ocean": "ocean wave",
    "boom": "explosion",
    "rage": "red angry face",
    "alien": "alien",
    "robot_face": "robot",
    "computer": "laptop",
    "iphone": "smartphone",
    "santa": "santa claus",
    "mrs_claus": "mrs claus",
    "hocho": "kitchen knife",
    "gun": "water pistol",
    "bee": "bee",
    "ladybug": "ladybug",
    "camel": "camel",
    "moon": "gibbous moon",
    "smile": "smiling face with smiling eyes and open mouth",
    "heart_eyes": "heart eyes face",
    "sob": "crying face with tears",
    "rain_cloud": "rain cloud",
    "snow_cloud": "snow cloud",
    "facepunch": "fist",
    "helmet_with_white_cross": "rescue helmet",
    "point_up": "index finger pointing up",
}
NOT_TAUGHT_SUBCATEGORIES = {
    "book-paper",
    "cat-face",
    "computer",
    "dishware",
    "face-affection",
    "face-concerned",
    "face-hand",
    "face-neutral-skeptical",
    "face-tongue",
    "face-unwell",
    "food-asian",
    "hand-fingers-closed",
    "hand-fingers-open",
    "hand-fingers-partial",
    "hand-prop",
    "hand-single-finger",
    "hands",
    "household",
    "light & video",
    "lock",
    "mail",
    "medical",
    "money",
    "office",
    "other-object",
    "person",
    "person-activity",
    "person-resting",
    "person-role",
    "person-sport",
    "place-building",
    "place-geographic",
    "place-other",
    "place-religious",
    "science",
    "transport-sign",
    "warning",
    "writing",
}
NOT_TAUGHT_NAMES = re.compile(
    r"face with (stuck|peeking|open eyes|finger)|kissing face with|smiling face with (smiling|open)|"
    r"grinning face with smiling|slightly|notebook|spiral|envelope|airplane (dep|arr)|small airplane|linked|"
    r"front-facing|bookmark|older|(left|right)-facing|card index|page|(open|lock with|closed lock)|chart with|"
    r"mx claus|railway car|high-speed|light rail|trolley|minibus|sunset over|cityscape at|umbrella (with|on)|"
    r"bactrian|speech balloon|anger bubble|inbox|outbox|closed mailbox|ledger|second place|third place|pushpin|"
    r"videocassette|dvd|minidisc|flat shoe|ear with|fisted|squared|motor boat|ferry"
)
TAUGHT_ANYWAY = {
    "+1",
    "-1",
    "baby",
    "bathtub",
    "bed",
    "books",
    "broom",
    "bucket",
    "bulb",
    "camera",
    "candle",
    "chair",
    "church",
    "circus_tent",
    "computer",
    "dango",
    "desert_island",
    "door",
    "email",
    "european_castle",
    "ferris_wheel",
    "heart_eyes",
    "hocho",
    "house",
    "key",
    "lock",
    "microscope",
    "moneybag",
    "moyai",
    "nerd_face",
    "no_entry",
    "paintbrush",
    "paperclip",
    "pencil2",
    "pill",
    "ramen",
    "recycle",
    "robot_face",
    "santa",
    "scissors",
    "scream",
    "sob",
    "spoon",
    "statue_of_liberty",
    "sushi",
    "syringe",
    "telescope",
    "tent",
    "thinking_face",
    "toilet",
    "tv",
    "volcano",
    "warning",
    "wave",
}
SMALL_WORDS = re.compile(
    r"\b(symbol|sign|ornament|emblem|heavy|large|white (?=left|right|up|down|medium|smiling|frowning|heavy|question)|"
    r"black (?=sun|question|telephone|scissors|nib|universal|chess)|negative squared|squared)\b ?"
)


# what the UNet's last stage goes on with, and what the demo is about
CORE_SUBJECTS = """
    grinning face; heart eyes face; smiling face with sunglasses; red angry face; skull; pile of poo; clown face;
    ghost; alien; robot; red heart; orange heart; yellow heart; green heart; blue heart; purple heart; black heart;
    broken heart; explosion; thumbs up; thumbs down; nose; brain; tooth; bone; eye; baby; santa claus; monkey face;
    dog face; fox face; cat face; lion face; tiger face; horse face; unicorn face; zebra face; cow face; pig face;
    mouse face; rabbit face; bear face; panda face; frog face; chicken; baby chick; penguin; owl; parrot; duck;
    flamingo; turtle; snake; whale; fish; tropical fish; shark; octopus; crab; snail; butterfly; ant; bee; ladybug;
    spider; cherry blossom; rose; sunflower; tulip; cactus; evergreen tree; palm tree; four leaf clover; maple leaf;
    mushroom; grapes; watermelon; tangerine; lemon; banana; pineapple; red apple; green apple; pear; peach;
    cherries; strawberry; tomato; avocado; eggplant; carrot; corn; broccoli; pretzel; hamburger; french fries;
    pizza; hot dog; egg; popcorn; ice cream; doughnut; cookie; birthday cake; cupcake; lollipop; beer mug; wine
    glass; teapot; fire engine; bus; taxi; car; bicycle; sailboat; airplane; helicopter; rocket; flying saucer;
    alarm clock; hourglass; crescent moon; full moon; sun; ringed planet; star; cloud; rainbow; umbrella; lightning
    bolt; snowflake; snowman; fire; droplet; jack-o-lantern; christmas tree; balloon; gift box; trophy; soccer ball;
    baseball; basketball; tennis ball; bowling; boxing glove; dartboard; kite; 8 ball; crystal ball; game die; teddy
    bear; artist palette; sunglasses; t-shirt; jeans; dress; high-heeled shoe; crown; top hat; ring; gem stone;
    bell; guitar; microphone; headphone; television; camera; light bulb; lock; key; hammer; scissors; pencil; bomb;
    magnet; no entry; check mark; cross mark; red circle; blue circle; green circle; yellow circle; red square; blue
    square; green square; yellow square
"""


def core_names() -> list[str]:
    return [name.strip() for name in CORE_SUBJECTS.replace("\n", " ").split(";")]


def clean_name(name: str) -> str:
    """A lower-case wording without the Unicode standard's typographic words."""
    name = SMALL_WORDS.sub("", name.lower().replace("_", " ").replace("’", "'"))
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9' -]", " ", name)).strip()


def is_subject(entry: dict) -> bool:
    """Whether an entry of emoji.json is one of the demo's subjects."""
    kept = entry["short_name"] in KEPT_FROM_SKIPPED
    skipped = entry["category"] in SKIPPED_CATEGORIES or entry["subcategory"] in SKIPPED_SUBCATEGORIES
    gendered = re.match(r"(fe)?male[-_]|(wo)?man[-_]", entry["short_name"])
    named_out = SKIPPED_NAMES.search(entry["name"].lower()) or gendered
    return entry["has_img_google"] and "obsoleted_by" not in entry and (kept or not (skipped or named_out))


def is_taught(entry: dict) -> bool:
    """Whether the text model learns the subject; near-duplicates only help to train the autoencoder."""
    unclear = entry["subcategory"] in NOT_TAUGHT_SUBCATEGORIES or NOT_TAUGHT_NAMES.search(entry["name"].lower())
    return entry["short_name"] in TAUGHT_ANYWAY or not unclear


def fluent_file(entry: dict, folder: Path) -> Path | None:
    """The fluent picture of an entry: the files are named by code points, with or without variation selectors."""
    codes = [entry["unified"], entry["non_qualified"] or "", entry["unified"].replace("-FE0F", "")]
    files = [folder / "assets" / f"{code.lower()}.webp" for code in codes]
    return next((file for file in files if file.is_file()), None)


def list_subjects(flat: Path, fluent: Path) -> list[dict]:
    """Subjects that exist in both styles: {"name", "wordings", "taught", "flat", "3d"}, in the standard's order.

    A wording that two subjects share stays with the one whose prompt name it is, else with the first.
    """
    entries = sorted(json.loads((flat / "emoji.json").read_text()), key=lambda entry: entry["sort_order"])
    subjects: list[dict[str, Any]] = []
    taken = {"shit"}
    for entry in filter(is_subject, entries):
        fluent_path = fluent_file(entry, fluent)
        flat_path = flat / "img" / "google" / "64" / entry["image"]
        name = RENAMED.get(entry["short_name"], clean_name(entry["name"]))
        if fluent_path is None or not flat_path.is_file() or name in taken:
            continue
        taken.add(name)
        others = [clean_name(text) for text in (entry["name"], *entry["short_names"])]
        subjects.append(
            {"name": name, "others": others, "taught": is_taught(entry), "flat": str(flat_path), "3d": str(fluent_path)}
        )
    for subject in subjects:
        others = [text for text in dict.fromkeys(subject.pop("others")) if len(text) > 2 and text not in taken]
        taken.update(others)
        subject["wordings"] = [subject["name"], *others[:3]]
    return subjects


def render(picture: Image.Image, variant: int, rng: np.random.Generator) -> np.ndarray:
    """One 64-pixel rendering on white, uint8 [64, 64, 3]; variants above 0 have jitter."""
    size_px, saturation, brightness, shift_px = 58, 1.0, 1.0, np.zeros(2, dtype=np.int64)
    if variant:
        size_px = int(rng.integers(56, 61))
        saturation, brightness = rng.uniform(0.4, 1.1), rng.uniform(0.92, 1.06)
        shift_px = rng.integers(-1, 2, size=2)
    small = np.asarray(picture.resize((size_px, size_px), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    colour, alpha = small[..., :3], small[..., 3:]
    luma = colour @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    colour = np.clip((luma + saturation * (colour - luma)) * brightness, 0, 1)
    canvas = np.ones((SIZE_PX, SIZE_PX, 3), dtype=np.float32)
    top, left = (SIZE_PX - size_px) // 2 + shift_px
    canvas[top : top + size_px, left : left + size_px] = colour * alpha + 1 - alpha
    return (canvas * 255).round().astype(np.uint8)


def make_data(args: argparse.Namespace) -> None:
    """pictures.npy: uint8 [subjects, 2 styles, VARIANTS, 64, 64, 3]; subjects.json: names and wordings."""
    subjects = list_subjects(args.flat, args.fluent)
    pictures = np.empty((len(subjects), len(STYLES), VARIANTS, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    rng = np.random.default_rng(0)
    for row, subject in enumerate(subjects):
        for column, style in enumerate(STYLES):
            picture = Image.open(subject.pop(style)).convert("RGBA")
            for variant in range(VARIANTS):
                pictures[row, column, variant] = render(picture, variant, rng)
    np.save(args.work / "pictures.npy", pictures)
    (args.work / "subjects.json").write_text(json.dumps(subjects, indent=0))
    print(f"{len(subjects)} subjects, {sum(len(s['wordings']) for s in subjects)} wordings")


def load_subjects(work: Path) -> list[dict]:
    return json.loads((work / "subjects.json").read_text())


def load_pictures(work: Path) -> torch.Tensor:
    """uint8 [subjects, 2, VARIANTS, 3, 64, 64]."""
    return torch.from_numpy(np.load(work / "pictures.npy")).permute(0, 1, 2, 5, 3, 4).contiguous()


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures -> float pixels in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def saturate(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scale the distance from grey; pixels [N, 3, H, W] in [-1, 1], factor [N]."""
    luma = (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return (luma + factor.view(-1, 1, 1, 1) * (pixels - luma)).clamp(-1, 1)


def save_grid(path: Path, pixels: torch.Tensor, columns: int) -> None:
    """Save pixels [N, 3, H, W] in [-1, 1] as one picture, row by row."""
    bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    starts = range(0, len(bytes_) // columns * columns, columns)
    rows = [np.concatenate(list(bytes_[start : start + columns]), axis=1) for start in starts]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


# ---------------------------------------------------------------------------------------------------------------
# networks

VAE_CHANNELS, VAE_MULTIPLIERS, VAE_BLOCKS = 32, (1, 2, 2, 2), 1
UNET_CHANNELS, UNET_MULTIPLIERS, UNET_BLOCKS, UNET_HEADS = 64, (1, 2), 2, 4
TEXT_CONFIG: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=256,
    num_attention_heads=4,
    num_hidden_layers=4,
    projection_dim=64,
    max_position_embeddings=CLIP_LENGTH,
    vocab_size=49408,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    levels = len(VAE_MULTIPLIERS)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[VAE_CHANNELS * m for m in VAE_MULTIPLIERS],
        layers_per_block=VAE_BLOCKS,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=SIZE_PX,
        scaling_factor=SCALE_FACTOR,
    )


def build_unet() -> Any:
    from diffusers import UNet2DConditionModel

    levels = len(UNET_MULTIPLIERS)
    return UNet2DConditionModel(
        sample_size=SIZE_PX // 8,
        block_out_channels=[UNET_CHANNELS * m for m in UNET_MULTIPLIERS],
        down_block_types=["CrossAttnDownBlock2D"] * levels,
        up_block_types=["CrossAttnUpBlock2D"] * levels,
        layers_per_block=UNET_BLOCKS,
        cross_attention_dim=TEXT_CONFIG["hidden_size"],
        attention_head_dim=UNET_HEADS,
    )


def build_text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))


def parameter_count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def learning_rate(elapsed: float, peak: float, warm_up: float = 0.03) -> float:
    """Linear warm-up, then a cosine to zero, over the elapsed fraction of the run in [0, 1]."""
    if elapsed < warm_up:
        return peak * elapsed / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (elapsed - warm_up) / (1 - warm_up))))


# ---------------------------------------------------------------------------------------------------------------
# autoencoder


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring-pixel differences."""
    difference = a - b
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def vae_loss(reconstruction: torch.Tensor, pixels: torch.Tensor, posterior: Any) -> torch.Tensor:
    """L1 at three scales + gradients + a KL term just large enough to keep the latents smooth."""
    loss = (reconstruction - pixels).abs().mean() + 0.5 * gradient_loss(reconstruction, pixels)
    for factor in (2, 4):
        loss = loss + 0.5 * (F.avg_pool2d(reconstruction, factor) - F.avg_pool2d(pixels, factor)).abs().mean()
    return loss + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()


def train_vae(args: argparse.Namespace) -> None:
    """Train for --vae-steps steps of 16 pictures in bfloat16 autocast; high saturations leave room for vivid ones."""
    pictures = load_pictures(args.work).flatten(0, 2)
    torch.manual_seed(0)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    print(f"VAE: {parameter_count(vae) / 1e6:.2f} M parameters, {len(pictures)} pictures")
    started_s = time.time()
    for step in range(args.vae_steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step / args.vae_steps, 1.5e-3)
        pixels = to_pixels(pictures[torch.randint(len(pictures), (16,))])
        pixels = saturate(pixels, torch.empty(16).uniform_(0.3, 1.6))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
        loss = vae_loss(reconstruction.float(), pixels, posterior)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            l1 = (reconstruction.float() - pixels).abs().mean().item()
            print(f"step {step + 1}: loss {loss.item():.4f} L1 {l1:.4f} {time.time() - started_s:.0f} s", flush=True)
        if step % 500 == 499:
            torch.save(vae.state_dict(), args.work / "vae.pt")
    torch.save(vae.state_dict(), args.work / "vae.pt")
    draw_reconstructions(args, vae)


def colour_loss(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Squared error of chroma (red-green, yellow-blue) and of colour at a quarter and an eighth of the size.

    L1 alone is content with the median colour: after the first stage red and green came out brown.
    """
    difference = reconstruction - pixels
    red, green, blue = difference.unbind(1)
    chroma = torch.stack([red - green, 0.5 * (red + green) - blue], 1)
    loss = 2.0 * chroma.square().mean()
    for factor in (4, 8):
        loss = loss + 2.0 * F.avg_pool2d(chroma, factor).square().mean()
        loss = loss + 4.0 * F.avg_pool2d(difference, factor).square().mean()
    return loss


def tune_vae_colours(args: argparse.Namespace) -> None:
    """Go on from vae.pt for --vae-colour-steps (1200) steps of 16 pictures with the colour loss added."""
    pictures = load_pictures(args.work).flatten(0, 2)
    torch.manual_seed(1)
    vae = build_vae()
    vae.load_state_dict(torch.load(args.work / "vae.pt"))
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    started_s = time.time()
    for step in range(args.vae_colour_steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step / args.vae_colour_steps, 1.5e-3)
        pixels = to_pixels(pictures[torch.randint(len(pictures), (16,))])
        pixels = saturate(pixels, torch.empty(16).uniform_(0.6, 1.6))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
        reconstruction = reconstruction.float()
        colour = colour_loss(reconstruction, pixels)
        loss = vae_loss(reconstruction, pixels, posterior) + colour
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            l1 = (reconstruction - pixels).abs().mean().item()
            elapsed_s = time.time() - started_s
            print(
                f"step {step + 1}: loss {loss.item():.4f} L1 {l1:.4f} colour {colour.item():.4f} {elapsed_s:.0f} s",
                flush=True,
            )
    torch.save(vae.state_dict(), args.work / "vae.pt")
    draw_reconstructions(args, vae)


@torch.no_grad()
def draw_reconstructions(args: argparse.Namespace, vae: Any) -> None:
    """reconstructions.png: rows of pictures above their reconstructions."""
    chosen = load_pictures(args.work).flatten(0, 1)[::61][:32, 0]
    pixels = to_pixels(chosen)
    decoded = vae.eval().decode(vae.encode(pixels).latent_dist.mean).sample
    rows = torch.stack([pixels.view(4, 8, *pixels.shape[1:]), decoded.view(4, 8, *decoded.shape[1:])], 1).flatten(0, 2)
    save_grid(args.work / "reconstructions.png", rows, 8)
    print(f"L1 of the means' reconstructions {(decoded - pixels).abs().mean():.4f}")


# ---------------------------------------------------------------------------------------------------------------
# latents


@torch.no_grad()
def encode(args: argparse.Namespace) -> None:
    """latents.pt: posterior means [subjects, 2, VARIANTS, 4, 8, 8] as float16, standardised per channel.

    The same standardisation is folded into the autoencoder's quant_conv and post_quant_conv (vae_folded.pt), so that
    SCALE_FACTOR times its latents has mean 0 and std 1 in each channel, as Stable Diffusion's conventions expect.
    """
    vae = build_vae()
    vae.load_state_dict(torch.load(args.work / "vae.pt"))
    vae.eval()
    pictures = load_pictures(args.work)
    parts = pictures.flatten(0, 2).split(256)
    means = torch.cat([vae.encode(to_pixels(part)).latent_dist.mean for part in parts])
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    factor = 1 / (SCALE_FACTOR * spread)
    print(f"latent means {centre.tolist()} stds {spread.tolist()}")
    vae.quant_conv.weight[:4] *= factor.view(4, 1, 1, 1)
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - centre) * factor
    vae.quant_conv.bias[4:] += 2 * factor.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ centre
    vae.post_quant_conv.weight /= factor.view(1, 4, 1, 1)
    torch.save(vae.state_dict(), args.work / "vae_folded.pt")
    latents = (means - centre.view(1, 4, 1, 1)) / spread.view(1, 4, 1, 1)
    torch.save(latents.half().view(*pictures.shape[:3], 4, 8, 8), args.work / "latents.pt")


def load_vae(work: Path) -> Any:
    """The autoencoder with SCALE_FACTOR's convention folded in, for inference."""
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae_folded.pt"))
    return vae.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# text encoder and UNet


def tokenize(tokenizer_folder: Path, texts: list[str]) -> torch.Tensor:
    """CLIP token ids, int64 [N, 77], padded with the end token."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    batch = tokenizer(texts, padding="max_length", max_length=CLIP_LENGTH, truncation=True, return_tensors="pt")
    return batch.input_ids


def encode_text(text_encoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Last hidden state after the final layer norm, [N, 77, 64]."""
    return text_encoder(input_ids=tokens).last_hidden_state


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's schedule, float64 [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


class CaptionedLatents:
    """Draws training examples: a picture's variant and one of its captions.

    Half of the captions name the style; the prompt name comes 60 % of the time, the other wordings share the rest;
    10 % of the captions are empty, for classifier-free guidance.
    """

    def __init__(self, args: argparse.Namespace, rows: list[int]):
        subjects = load_subjects(args.work)
        self.rows = rows
        self.latents = torch.load(args.work / "latents.pt")
        self.wordings = {row: subjects[row]["wordings"] for row in self.rows}
        texts = [
            *sorted(
                {
                    text + tag
                    for row in self.rows
                    for text in self.wordings[row]
                    for tag in ("", *(f", {style}" for style in STYLES))
                }
            ),
            "",
        ]
        self.index = {text: i for i, text in enumerate(texts)}
        self.tokens = tokenize(args.tokenizer, texts)

    def caption(self, row: int, style: str, rng: np.random.Generator) -> str:
        if rng.random() < 0.1:
            return ""
        wordings = self.wordings[row]
        wording = wordings[0] if rng.random() < 0.6 else wordings[rng.integers(len(wordings))]
        return wording + (f", {style}" if rng.random() < 0.5 else "")

    def draw(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [count, 4, 8, 8] and tokens [count, 77]."""
        rows = rng.choice(self.rows, count)
        styles = rng.integers(len(STYLES), size=count)
        latents = self.latents[rows, styles, rng.integers(VARIANTS, size=count)].float()
        captions = [self.index[self.caption(row, STYLES[style], rng)] for row, style in zip(rows, styles, strict=True)]
        return latents, self.tokens[captions]


def denoising_loss(
    unet: Any, text_encoder: Any, latents: torch.Tensor, tokens: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """Epsilon loss with min-SNR weights (gamma 5, Hang et al. 2023), two stratified timesteps for each picture."""
    count = len(latents)
    fraction = (torch.rand(count).repeat(2) + torch.tensor([0.0, 0.5]).repeat_interleave(count)) % 1
    t = (fraction * 1000).long().clamp(max=999)
    a = alpha_bar[t].float().view(-1, 1, 1, 1)
    noise = torch.randn(2 * count, *latents.shape[1:])
    noisy = a.sqrt() * latents.repeat(2, 1, 1, 1) + (1 - a).sqrt() * noise
    context = encode_text(text_encoder, tokens).repeat(2, 1, 1)
    error = (unet(noisy, t, context).sample - noise).square().mean((1, 2, 3))
    snr = (a / (1 - a)).flatten()
    return (snr.clamp(max=5) / snr * error).mean()


def taught_rows(subjects: list[dict]) -> list[int]:
    return [row for row, subject in enumerate(subjects) if subject["taught"]]


def core_rows(subjects: list[dict]) -> list[int]:
    names = set(core_names())
    return [row for row, subject in enumerate(subjects) if subject["name"] in names]


def train_unet(args: argparse.Namespace) -> None:
    """Train both networks for --unet-minutes of wall clock (the learning rate follows it), averaging weights."""
    fit_unet(args, CaptionedLatents(args, taught_rows(load_subjects(args.work))), build_unet(), build_text_encoder())


def train_unet_core(args: argparse.Namespace) -> None:
    """Go on from the averaged weights with the core subjects alone, for --unet-minutes: fewer, but learned well."""
    unet, text_encoder = load_networks(args.work)
    unet.train().requires_grad_(True)
    text_encoder.train().requires_grad_(True)
    fit_unet(args, CaptionedLatents(args, core_rows(load_subjects(args.work))), unet, text_encoder)


def fit_unet(args: argparse.Namespace, examples: "CaptionedLatents", unet: Any, text_encoder: Any) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    networks = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    average = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    optimizer = torch.optim.AdamW(networks.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-2)
    alpha_bar = alphas_cumprod()
    print(
        f"parameters: UNet {parameter_count(unet)}, text encoder {parameter_count(text_encoder)}; "
        f"{len(examples.rows)} subjects, {len(examples.tokens)} captions",
        flush=True,
    )
    started_s, next_snapshot_s, losses = time.time(), 60 * args.snapshot_minutes, []
    step, elapsed_s, limit_s = 0, 0.0, 60 * args.unet_minutes
    while elapsed_s < limit_s:
        optimizer.param_groups[0]["lr"] = learning_rate(elapsed_s / limit_s, args.unet_lr)
        loss = denoising_loss(unet, text_encoder, *examples.draw(args.batch // 2, rng), alpha_bar)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        step += 1
        update_average(average, networks, step)
        losses.append(loss.item())
        elapsed_s = time.time() - started_s
        if step % 100 == 0:
            print(f"step {step}: loss {np.mean(losses[-100:]):.4f} {elapsed_s:.0f} s", flush=True)
        if elapsed_s > next_snapshot_s:
            next_snapshot_s += 60 * args.snapshot_minutes
            save_average(args, average)
            export_snapshot(args)
    save_average(args, average)
    export_snapshot(args)
    print(f"{step} steps of {args.batch} in {elapsed_s / 60:.1f} minutes, loss {np.mean(losses[-500:]):.4f}")


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], networks: torch.nn.Module, step: int) -> None:
    """Exponential moving average with decay 0.998, faster in the beginning."""
    weight = 1 - min(0.998, (1 + step) / (10 + step))
    for name, tensor in networks.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, weight)


def save_average(args: argparse.Namespace, average: dict[str, torch.Tensor]) -> None:
    torch.save(average, args.work / "unet.tmp")
    (args.work / "unet.tmp").replace(args.work / "unet.pt")


def load_networks(work: Path) -> tuple[Any, Any]:
    """UNet and text encoder with the averaged weights, for inference."""
    networks = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder()})
    networks.load_state_dict(torch.load(work / "unet.pt"))
    networks.eval().requires_grad_(False)
    return networks["unet"], networks["text_encoder"]


# ---------------------------------------------------------------------------------------------------------------
# sampling


class Sampler:
    """Text to pictures with the checkpoint's networks: DDIM with eta 1, 20 steps, guidance 5."""

    def __init__(self, args: argparse.Namespace):
        self.unet, self.text_encoder = load_networks(args.work)
        self.vae = load_vae(args.work)
        self.tokenizer_folder = args.tokenizer
        self.alpha_bar = alphas_cumprod().float()

    @torch.no_grad()
    def pictures(self, prompts: list[str], seeds: list[int], guidance_scale: float = 5.0) -> torch.Tensor:
        """Pixels [N, 3, 64, 64] in [-1, 1]: picture i shows prompts[i], its noise comes from seeds[i]."""
        starts = range(0, len(prompts), 64)
        return torch.cat([self._batch(prompts[i : i + 64], seeds[i : i + 64], guidance_scale) for i in starts])

    def _batch(self, prompts: list[str], seeds: list[int], guidance_scale: float) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens = tokenize(self.tokenizer_folder, [*prompts, *[""] * len(prompts)])
        context = encode_text(self.text_encoder, tokens)
        x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
        for t in range(951, 0, -50):
            conditional, empty = self.unet(torch.cat([x, x]), torch.tensor(t), context).sample.chunk(2)
            epsilon = empty + guidance_scale * (conditional - empty)
            x = self._ddim_step(x, epsilon, t, torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]))
        return self.vae.decode(x / SCALE_FACTOR).sample.clamp(-1, 1)

    def _ddim_step(self, x: torch.Tensor, epsilon: torch.Tensor, t: int, noise: torch.Tensor) -> torch.Tensor:
        """One step of Song et al. 2021, equation 12, eta 1, from t to t - 50 (in the end to entry 0)."""
        a, a_next = self.alpha_bar[t], self.alpha_bar[max(t - 50, 0)]
        denoised = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        variance = (1 - a_next) / (1 - a) * (1 - a / a_next)
        direction = (1 - a_next - variance).clamp(min=0).sqrt() * epsilon
        return a_next.sqrt() * denoised + direction + variance.sqrt() * noise


# ---------------------------------------------------------------------------------------------------------------
# export: names as in Stable Diffusion 1 checkpoints

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION_NAMES = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_unet_name(name: str) -> str:
    """A tensor's name in LDM's UNetModel, from its name in diffusers' UNet2DConditionModel."""
    period = UNET_BLOCKS + 1
    for old, new in (
        ("conv_in.", "input_blocks.0.0."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("mid_block.attentions.0.", "middle_block.1."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    side, rest = name.split(".", 1)
    if side == "mid_block":
        _, index, rest = rest.split(".", 2)
        return f"middle_block.{2 * int(index)}.{renamed(rest, RESNET_NAMES)}"
    block, kind, index, rest = rest.split(".", 3)
    stage, first = ("input_blocks", 1) if side == "down_blocks" else ("output_blocks", 0)
    position = first + int(block) * period + int(index)
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * period}.0.{rest.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        return f"output_blocks.{int(block) * period + UNET_BLOCKS}.2.{rest}"
    if kind == "attentions":
        return f"{stage}.{position}.1.{rest}"
    return f"{stage}.{position}.0.{renamed(rest, RESNET_NAMES)}"


def renamed(name: str, table: dict[str, str]) -> str:
    stem, leaf = name.rsplit(".", 1)
    return f"{table.get(stem, stem)}.{leaf}"


def ldm_vae_name(name: str) -> str:
    """A tensor's name in LDM's AutoencoderKL, from its name in diffusers' AutoencoderKL."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(
        r"mid_block\.attentions\.0\.(.+)\.(\w+)$", lambda m: f"mid.attn_1.{ATTENTION_NAMES[m[1]]}.{m[2]}", name
    )
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    level = len(VAE_MULTIPLIERS) - 1
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{level - int(m[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{level - int(m[1])}.upsample.", name)


def ldm_text_name(name: str) -> str:
    """A tensor's name below cond_stage_model.transformer; transformers 5 leaves out the first part."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def schedule_buffers() -> dict[str, torch.Tensor]:
    """The float32 buffers that LatentDiffusion registers."""
    alpha_bar = alphas_cumprod()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    betas = 1 - alpha_bar / previous
    variance = betas * (1 - previous) / (1 - alpha_bar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar),
    }
    return {name: tensor.float() for name, tensor in buffers.items()}


def ldm_tensors(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint: float16 weights and float32 schedule."""
    unet, text_encoder = load_networks(args.work)
    used = torch.zeros(TEXT_CONFIG["vocab_size"], dtype=torch.bool)
    used[CaptionedLatents(args, taught_rows(load_subjects(args.work))).tokens.flatten()] = True
    tensors = {f"model.diffusion_model.{ldm_unet_name(name)}": t for name, t in unet.state_dict().items()}
    for name, tensor in load_vae(args.work).state_dict().items():
        is_attention_matrix = ".attentions." in name and tensor.ndim == 2
        tensors[f"first_stage_model.{ldm_vae_name(name)}"] = tensor[..., None, None] if is_attention_matrix else tensor
    for name, tensor in text_encoder.state_dict().items():
        unused_rows = name.endswith("token_embedding.weight")
        tensor = tensor * used[:, None] if unused_rows else tensor
        tensors[f"cond_stage_model.transformer.{ldm_text_name(name)}"] = tensor
    tensors = {name: tensor.half().contiguous() for name, tensor in tensors.items() if tensor.is_floating_point()}
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(CLIP_LENGTH)[None]
    return tensors | schedule_buffers()


CONFIG_YAML = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 8
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: {scale_factor}
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 8
        in_channels: 4
        out_channels: 4
        model_channels: {unet_channels}
        attention_resolutions: {attention_resolutions}
        num_res_blocks: {unet_blocks}
        channel_mult: {unet_multipliers}
        num_heads: {unet_heads}
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: {context_dim}
        use_checkpoint: False
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: {size_px}
          in_channels: 3
          out_ch: 3
          ch: {vae_channels}
          ch_mult: {vae_multipliers}
          num_res_blocks: {vae_blocks}
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: CLIP_DIR_HERE
"""


def config_yaml() -> str:
    """The checkpoint's yaml; CLIP_DIR_HERE stands for the folder with tokenizer and text encoder config."""
    return CONFIG_YAML.format(
        scale_factor=SCALE_FACTOR,
        unet_channels=UNET_CHANNELS,
        unet_blocks=UNET_BLOCKS,
        unet_heads=UNET_HEADS,
        attention_resolutions=[2**level for level in reversed(range(len(UNET_MULTIPLIERS)))],
        unet_multipliers=list(UNET_MULTIPLIERS),
        context_dim=TEXT_CONFIG["hidden_size"],
        size_px=SIZE_PX,
        vae_channels=VAE_CHANNELS,
        vae_multipliers=list(VAE_MULTIPLIERS),
        vae_blocks=VAE_BLOCKS,
    )


def write_checkpoint(args: argparse.Namespace, folder: Path) -> Path:
    """demo.safetensors, demo.yaml and text_encoder_config.json in `folder`, replaced in one step each."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kind = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32"}
    (folder / "text_encoder_config.json").write_text(json.dumps(kind | TEXT_CONFIG, indent=1) + "\n")
    (folder / "demo.yaml").write_text(config_yaml())
    save_file(ldm_tensors(args), folder / "demo.tmp", metadata={"format": "pt"})
    (folder / "demo.tmp").replace(folder / "demo.safetensors")
    return folder / "demo.safetensors"


def export_snapshot(args: argparse.Namespace) -> None:
    if args.snapshots:
        write_checkpoint(args, args.snapshots)


def export(args: argparse.Namespace) -> None:
    """Write the checkpoint, then load it with diffusers' single-file loaders and compare outputs."""
    path = write_checkpoint(args, args.out)
    print(f"{path.stat().st_size / 1e6:.2f} MB")
    check_against_diffusers(args, path)


@torch.no_grad()
def check_against_diffusers(args: argparse.Namespace, path: Path) -> None:
    """Raise unless diffusers' own conversion of the file gives the same outputs as the networks rounded to float16."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file

    unet, text_encoder = load_networks(args.work)
    vae = load_vae(args.work)
    options = dict(original_config=str(path.with_suffix(".yaml")), torch_dtype=torch.float32)
    loaded_unet = UNet2DConditionModel.from_single_file(str(path), **options)
    loaded_vae = AutoencoderKL.from_single_file(str(path), **options)
    for network in (unet, text_encoder, vae):
        for parameter in network.parameters():
            parameter.copy_(parameter.half())
    loaded_text = build_text_encoder().eval()
    prefix = "cond_stage_model.transformer."
    weights = {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in load_file(path).items()
        if name.startswith(prefix) and "position_ids" not in name
    }
    own_names = {ldm_text_name(name): name for name in loaded_text.state_dict()}
    loaded_text.load_state_dict({own_names[name]: tensor for name, tensor in weights.items()})
    torch.manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    context = torch.randn(2, CLIP_LENGTH, TEXT_CONFIG["hidden_size"])
    pixels, tokens = torch.rand(2, 3, SIZE_PX, SIZE_PX) * 2 - 1, tokenize(args.tokenizer, ["red apple", "rocket, 3d"])
    pairs = {
        "unet": (unet(x, t, context).sample, loaded_unet(x, t, context).sample),
        "decoder": (vae.decode(x).sample, loaded_vae.decode(x).sample),
        "encoder": (vae.encode(pixels).latent_dist.mean, loaded_vae.encode(pixels).latent_dist.mean),
        "text encoder": (encode_text(text_encoder, tokens), encode_text(loaded_text, tokens)),
    }
    differences = {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}
    print("largest differences from diffusers' own conversion:", differences)
    if max(differences.values()) > 1e-5:
        raise RuntimeError(f"the exported checkpoint differs from the trained networks: {differences}, accepted 1e-5")


# ---------------------------------------------------------------------------------------------------------------
# subject classifier


@torch.no_grad()
def classifier_pictures(work: Path, rows: list[int]) -> torch.Tensor:
    """uint8 [subjects, 2, VARIANTS + 1, 3, 64, 64]: the renderings, and the autoencoder's version of one of them."""
    pictures, vae = load_pictures(work)[rows], load_vae(work)
    latents = torch.load(work / "latents.pt")[rows, :, 1].flatten(0, 1).float()
    decoded = torch.cat([vae.decode(part / SCALE_FACTOR).sample for part in latents.split(128)])
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().view(len(rows), len(STYLES), 1, 3, SIZE_PX, SIZE_PX)
    return torch.cat([pictures, decoded], 2)


def jitter(pixels: torch.Tensor) -> torch.Tensor:
    """Strong changes of saturation, brightness, contrast; slight ones of hue, place, size, sharpness, and noise."""
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(count, *shape).uniform_(low, high)

    mix = torch.eye(3) + uniform(-0.06, 0.06, 3, 3)
    pixels = torch.einsum("nij,njhw->nihw", mix / mix.sum(2, keepdim=True), pixels)
    pixels = saturate(pixels, uniform(0.15, 2.2))
    pixels = pixels * uniform(0.7, 1.2, 1, 1, 1) + uniform(-0.15, 0.15, 1, 1, 1)
    zoom, zero = uniform(0.9, 1.12), torch.zeros(count)
    affine = torch.stack([zoom, zero, uniform(-0.1, 0.1), zero, zoom, uniform(-0.1, 0.1)], 1).view(count, 2, 3)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    pixels = pixels.lerp(F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1), uniform(0, 1, 1, 1, 1))
    return (pixels + 0.1 * torch.rand(count, 1, 1, 1) * torch.randn_like(pixels)).clamp(-1, 1)


def train_classifier(args: argparse.Namespace) -> None:
    """Train for --classifier-minutes; batches of 128 jittered pictures over all taught subjects."""
    from safetensors.torch import save_file

    from spo.demo.subjects import SubjectNetwork

    torch.manual_seed(0)
    subjects = load_subjects(args.work)
    rows = core_rows(subjects)
    pictures = classifier_pictures(args.work, rows)
    network = SubjectNetwork(len(rows))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.05)
    print(f"classifier: {parameter_count(network) / 1e6:.2f} M parameters, {len(rows)} classes", flush=True)
    step, elapsed_s, limit_s, started_s = 0, 0.0, 60 * args.classifier_minutes, time.time()
    while elapsed_s < limit_s:
        optimizer.param_groups[0]["lr"] = learning_rate(elapsed_s / limit_s, 4e-3)
        labels, styles = torch.randint(len(rows), (128,)), torch.randint(2, (128,))
        variants = torch.where(torch.rand(128) < 0.4, VARIANTS, torch.randint(VARIANTS, (128,)))
        logits = network(jitter(to_pixels(pictures[labels, styles, variants])))
        loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step, elapsed_s = step + 1, time.time() - started_s
        if step % 100 == 0:
            right = (logits.argmax(1) == labels).float().mean().item()
            print(f"step {step}: loss {loss.item():.3f} right {right:.3f} {elapsed_s:.0f} s", flush=True)
    names = json.dumps([subjects[row]["name"] for row in rows])
    tensors = {k: v.half() for k, v in network.state_dict().items() if v.is_floating_point()}
    save_file(tensors, args.out / "subject_classifier.safetensors", metadata={"format": "pt", "classes": names})
    measure_classifier(args, pictures)


def measure_classifier(args: argparse.Namespace, pictures: torch.Tensor) -> None:
    """Print how many decoded pictures are assigned to their subject at several saturations."""
    from spo.demo.subjects import load

    classifier = load(args.out / "subject_classifier.safetensors")
    decoded = to_pixels(pictures[:, :, VARIANTS].flatten(0, 1))
    labels = torch.arange(len(pictures)).repeat_interleave(len(STYLES))
    for factor in (0.25, 0.5, 1.0, 1.5, 2.0):
        right = (classifier.assign(saturate(decoded, torch.full((len(decoded),), factor))) == labels).float().mean()
        print(f"saturation x {factor}: {right:.3f} of {len(decoded)} decoded pictures assigned to their subject")


# ---------------------------------------------------------------------------------------------------------------
# prompts and pictures

CHECKED_PROMPTS = (
    "red apple",
    "dog face",
    "blue heart",
    "rocket",
    "sunflower",
    "pizza",
    "cat face",
    "soccer ball",
    "mushroom",
    "octopus",
)
NO_PROMPT = re.compile(r"face|hand|man\b|circle|square|sign|symbol|dollar|heart |hearts|mark")
TRAINING_PROMPTS, HELD_OUT_PROMPTS, SELECTION_SEEDS = 200, 32, (0, 1, 2)


def choose_prompts(args: argparse.Namespace) -> None:
    """prompts.txt and prompts_heldout.txt, disjoint, by a fixed procedure.

    Candidates are the core subjects that make a prompt. Each is sampled with SELECTION_SEEDS (judging uses seeds from
    1000 on) and scored by the share of pictures that the classifier assigns to it. The best
    TRAINING_PROMPTS + HELD_OUT_PROMPTS, in the order of the share (ties in the candidates' order), are kept. Of those
    with the full share (of the first 2 x HELD_OUT_PROMPTS, where fewer have it), every n-th is held out.
    """
    from spo.demo.subjects import load

    classifier = load(args.out / "subject_classifier.safetensors")
    candidates = [name for name in classifier.classes if not NO_PROMPT.search(name)]
    prompts = [name for name in candidates for _ in SELECTION_SEEDS]
    pixels = Sampler(args).pictures(prompts, list(SELECTION_SEEDS) * len(candidates))
    right = classifier.assign(pixels) == torch.tensor([classifier.classes.index(name) for name in prompts])
    shares = right.float().view(len(candidates), -1).mean(1).tolist()
    share = dict(zip(candidates, shares, strict=True))
    kept = sorted(candidates, key=lambda name: -share[name])[: TRAINING_PROMPTS + HELD_OUT_PROMPTS]
    sure = kept[: max(shares.count(1.0), 2 * HELD_OUT_PROMPTS)]
    held_out = [sure[i * len(sure) // HELD_OUT_PROMPTS] for i in range(HELD_OUT_PROMPTS)]
    training = [name for name in kept if name not in held_out]
    (args.out / "prompts.txt").write_text("\n".join(training) + "\n")
    (args.out / "prompts_heldout.txt").write_text("\n".join(held_out) + "\n")
    for kind, chosen in (("candidates", candidates), ("training", training), ("held-out", held_out)):
        print(f"{kind}: {np.mean([share[name] for name in chosen]):.3f} of the samples assigned right")


def draw_sheet(args: argparse.Namespace) -> None:
    """contact_sheet.png: the checked prompts, then held-out ones, four pictures each (seeds 1000 to 1003)."""
    held_out = (args.out / "prompts_heldout.txt").read_text().splitlines()
    prompts = [*CHECKED_PROMPTS, "red apple, flat", "red apple, 3d", *held_out]
    seeds = list(range(1000, 1004))
    pixels = Sampler(args).pictures([prompt for prompt in prompts for _ in seeds], seeds * len(prompts))
    draw_captioned(args.out / "contact_sheet.png", prompts, pixels.view(len(prompts), len(seeds), 3, SIZE_PX, SIZE_PX))


def draw_captioned(path: Path, captions: list[str], pixels: torch.Tensor) -> None:
    """Save pictures [prompts, seeds, 3, 64, 64] as a sheet with four captioned prompts in a row."""
    from PIL import ImageDraw

    count, seeds = pixels.shape[:2]
    cell_px, row_px = seeds * SIZE_PX + 8, SIZE_PX + 18
    sheet = Image.new("RGB", (4 * cell_px, math.ceil(count / 4) * row_px), "white")
    draw = ImageDraw.Draw(sheet)
    bytes_ = ((pixels + 1) * 127.5).round().byte().permute(0, 3, 1, 4, 2).flatten(2, 3).numpy()
    for i, caption in enumerate(captions):
        left, top = i % 4 * cell_px, i // 4 * row_px
        draw.text((left + 2, top + 2), caption, fill="black")
        sheet.paste(Image.fromarray(bytes_[i]), (left, top + 14))
    sheet.save(path, optimize=True)


STAGES = {
    "data": make_data,
    "vae": train_vae,
    "vae_colour": tune_vae_colours,
    "encode": encode,
    "unet": train_unet,
    "unet_core": train_unet_core,
    "classifier": train_classifier,
    "export": export,
    "prompts": choose_prompts,
    "sheet": draw_sheet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--flat", type=Path, help="unpacked npm package emoji-datasource-google")
    parser.add_argument("--fluent", type=Path, help="unpacked npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--tokenizer", type=Path, help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--work", type=Path, default=Path("demo-work"), help="scratch folder")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vae-steps", type=int, default=2300)
    parser.add_argument("--vae-colour-steps", type=int, default=1200)
    parser.add_argument("--unet-minutes", type=float, default=40)
    parser.add_argument("--unet-lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=64, help="noisy latents in a step, two of each picture")
    parser.add_argument("--classifier-minutes", type=float, default=2.5)
    parser.add_argument("--snapshots", type=Path, help="folder for checkpoints while the UNet trains")
    parser.add_argument("--snapshot-minutes", type=float, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
