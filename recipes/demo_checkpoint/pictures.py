"""Stage "data": choose subjects, render both styles in several ways; and pictures as tensors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from recipes.demo_checkpoint.options import Options

SIZE_PX = 64
VARIANTS = 24  # renderings of a picture; the first one as it is
STYLES = ("flat", "3d")
HERE = Path(__file__).parent

# which emoji are subjects, what they are called in prompts, which of them the text model learns; core_subjects: those
# that the checkpoint draws; skipped_names, not_taught_names, typographic_words and no_prompt hold alternatives of a
# regular expression
CHOICE: dict[str, Any] = json.loads((HERE / "subject_choice.json").read_text(encoding="utf-8"))
SKIPPED_NAMES, NOT_TAUGHT_NAMES = (re.compile("|".join(CHOICE[key])) for key in ("skipped_names", "not_taught_names"))
TYPOGRAPHIC_WORDS = re.compile(rf"\b({'|'.join(CHOICE['typographic_words'])})\b ?")


def clean_name(name: str) -> str:
    """A lower-case wording without the Unicode standard's typographic words."""
    name = TYPOGRAPHIC_WORDS.sub("", name.lower().replace("_", " ").replace("’", "'"))
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9' -]", " ", name)).strip()


def is_subject(entry: dict) -> bool:
    """Whether an entry of emoji.json is one of the demo's subjects."""
    if not entry["has_img_google"] or "obsoleted_by" in entry:
        return False
    if entry["short_name"] in CHOICE["not_skipped"]:
        return True
    gendered = re.match(r"(fe)?male[-_]|(wo)?man[-_]", entry["short_name"])
    named_out = SKIPPED_NAMES.search(entry["name"].lower()) or gendered
    skipped = (
        entry["category"] in CHOICE["skipped_categories"] or entry["subcategory"] in CHOICE["skipped_subcategories"]
    )
    return not (skipped or named_out)


def is_taught(entry: dict) -> bool:
    """Whether the text model learns the subject; near-duplicates only help to train the autoencoder."""
    if entry["short_name"] in CHOICE["taught_anyway"]:
        return True
    named_out = NOT_TAUGHT_NAMES.search(entry["name"].lower())
    return entry["subcategory"] not in CHOICE["not_taught_subcategories"] and not named_out


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
        name = CHOICE["prompt_names"].get(entry["short_name"], clean_name(entry["name"]))
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


@dataclass(frozen=True)
class Jitter:
    """By what renderings of a picture differ; what they have in common will be common to the seeds of a prompt.

    Their background is white: a tinted one would let a taste for vivid colours be met without the subject. They are
    moved from the middle as far as there is room.

    sizes_px         from, to; both are drawn. saturations: from, to
    flipped          share of them seen in a mirror
    turned_degrees   to either side, at most
    """

    sizes_px: tuple[int, int] = (48, 62)
    saturations: tuple[float, float] = (0.4, 1.1)
    flipped: float = 0.5
    turned_degrees: float = 10.0


def render(picture: Image.Image, variant: int, rng: np.random.Generator, jitter: Jitter = Jitter()) -> np.ndarray:
    """One 64-pixel rendering, uint8 [64, 64, 3]: variant 0 in the middle on white, the others as chance has it."""
    size_px, saturation, brightness, shift_px = 58, 1.0, 1.0, np.zeros(2, dtype=np.int64)
    if variant:
        size_px = int(rng.integers(jitter.sizes_px[0], jitter.sizes_px[1] + 1))
        saturation, brightness = rng.uniform(*jitter.saturations), rng.uniform(0.92, 1.06)
        room_px = (SIZE_PX - size_px) // 2
        shift_px = rng.integers(-room_px, room_px + 1, size=2)
        if rng.random() < jitter.flipped:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        degrees = rng.uniform(-jitter.turned_degrees, jitter.turned_degrees)
        picture = picture.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    small = np.asarray(picture.resize((size_px, size_px), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    colour, alpha = small[..., :3], small[..., 3:]
    luma = colour @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    colour = np.clip((luma + saturation * (colour - luma)) * brightness, 0, 1)
    canvas = np.ones((SIZE_PX, SIZE_PX, 3), dtype=np.float32)
    top, left = (SIZE_PX - size_px) // 2 + shift_px
    canvas[top : top + size_px, left : left + size_px] = colour * alpha + 1 - alpha
    return (canvas * 255).round().astype(np.uint8)


def make_data(options: Options) -> None:
    """pictures.npy: uint8 [subjects, 2 styles, VARIANTS, 64, 64, 3]; subjects.json: names and wordings."""
    subjects = list_subjects(options.flat, options.fluent)
    if options.checkpoint:  # no autoencoder is trained, which the others would help
        subjects = [subjects[row] for row in core_rows(subjects)]
    pictures = np.empty((len(subjects), len(STYLES), VARIANTS, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    rng = np.random.default_rng(0)
    for row, subject in enumerate(subjects):
        for column, style in enumerate(STYLES):
            picture = Image.open(subject.pop(style)).convert("RGBA")
            for variant in range(VARIANTS):
                pictures[row, column, variant] = render(picture, variant, rng)
    np.save(options.work / "pictures.npy", pictures)
    (options.work / "subjects.json").write_text(json.dumps(subjects, indent=0))
    print(f"{len(subjects)} subjects, {sum(len(s['wordings']) for s in subjects)} wordings")


def load_subjects(work: Path) -> list[dict]:
    return json.loads((work / "subjects.json").read_text())


def load_pictures(work: Path) -> torch.Tensor:
    """uint8 [subjects, 2, VARIANTS, 3, 64, 64]."""
    return torch.from_numpy(np.load(work / "pictures.npy")).permute(0, 1, 2, 5, 3, 4).contiguous()


def taught_rows(subjects: list[dict]) -> list[int]:
    return [row for row, subject in enumerate(subjects) if subject["taught"]]


def core_rows(subjects: list[dict]) -> list[int]:
    return [row for row, subject in enumerate(subjects) if subject["name"] in CHOICE["core_subjects"]]


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
