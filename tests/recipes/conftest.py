"""Made-up emoji in the form of the two packages."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

ENTRY = {"has_img_google": True, "category": "Animals & Nature", "subcategory": "animal-bug"}


@pytest.fixture
def emoji(tmp_path):
    """Both packages with a handful of subjects: plain squares of random colours."""
    rng = np.random.default_rng(0)
    subjects = {"RED APPLE": "apple", "DOG FACE": "dog", "ROCKET": "rocket", "SUNFLOWER": "sunflower", "GHOST": "ghost"}
    entries = []
    (tmp_path / "flat" / "img" / "google" / "64").mkdir(parents=True)
    (tmp_path / "fluent" / "assets").mkdir(parents=True)
    for number, (name, short) in enumerate(subjects.items()):
        code = f"1F{number:03X}"
        colour = (*(int(value) for value in rng.integers(0, 255, 3)), 255)
        picture = Image.new("RGBA", (64, 64), colour)
        picture.save(tmp_path / "flat" / "img" / "google" / "64" / f"{code.lower()}.png")
        picture.save(tmp_path / "fluent" / "assets" / f"{code.lower()}.webp")
        facts = {"name": name, "short_name": short, "short_names": [short], "sort_order": number, "unified": code}
        entries.append(ENTRY | facts | {"non_qualified": None, "image": f"{code.lower()}.png"})
    (tmp_path / "flat" / "emoji.json").write_text(json.dumps(entries))
    return tmp_path
