"""`spo evaluate`: a page and two tables, whole or not at all."""

from __future__ import annotations

import csv

import pytest

from spo.cli.main import main
from spo.evaluation.interval import Interval
from spo.headless import evaluate as headless_evaluate
from spo.lora.read import read_lora
from spo.preference.cnn_file import save_cnn
from spo.preference.latent_cnn import LatentCNN
from spo.training.best_weight import Choice
from tests.cli.test_compare import comparison_flags


def flags(files, output, *more, checkpoint="tiny.safetensors"):
    given = comparison_flags(files, output, checkpoint)
    place = given.index("--preference")
    return ["evaluate", *given[:place], *given[place + 2 :], "--judge", given[place + 1], *more]


@pytest.mark.parametrize("checkpoint", ["tiny.safetensors", "tiny-xl.safetensors"])
def test_a_page_and_two_tables(tiny_files, trained, tmp_path, capsys, checkpoint):
    output = tmp_path / "page.html"
    lora = trained(checkpoint).output
    rest = ["--lora", str(lora), "--weights", "0", "1", "--limit", "2", "--seeds-each", "2"]
    assert main(flags(tiny_files, output, *rest, checkpoint=checkpoint)) == 0
    said = capsys.readouterr().out
    assert "Mean score" in said and "mine : 0" in said
    text = output.read_text(encoding="utf-8")
    assert text.count("<article") == 4 and text.count("<img") == 12
    assert "trained on" in text, "the LoRA's metadata name the judge"
    with (tmp_path / "page.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    still = [row for row in rows if row["column"] == "mine : 0" and row["difference"]]
    assert still and all(float(row["difference"]) == 0 for row in still), "weight 0 is the base"
    drifts = {row["column"]: float(row["mean"]) for row in rows if row["statistic"] == "drift"}
    assert drifts["mine : 0"] == 0 < drifts["mine : 1"]
    with (tmp_path / "page_pictures.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12


def test_a_runs_stages_into_a_folder_that_is_replaced_as_a_whole(tiny_files, trained, tmp_path):
    output, run = tmp_path / "evaluation", trained("tiny.safetensors").output.with_suffix(".spo")
    rest = ["--run", str(run), "--limit", "1", "--seeds", "5", "--distance", "pixels"]
    assert main(flags(tiny_files, output, *rest)) == 0
    assert sorted(path.name for path in output.iterdir()) == ["index.html", "pictures.csv", "statistics.csv"]
    (output / "index.html").write_text("old")
    assert main(flags(tiny_files, output, *rest)) == 2
    assert (output / "index.html").read_text() == "old"
    assert main(flags(tiny_files, output, *rest, "--replace")) == 0
    assert (output / "index.html").read_text() != "old"
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page.png", "evaluate writes NAME.html, or a folder"),
        ("there.html", "exists already"),
        ("tables.html", "exists already"),
        ("none/page.html", "does not exist"),
    ],
)
def test_where_it_cannot_write(tiny_files, tmp_path, capsys, name, message):
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "tables.csv").write_text("mine")
    assert main(flags(tiny_files, tmp_path / name, "--lora", "x.safetensors")) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tables.csv", "there.html"]


def test_a_folder_with_other_files_is_not_replaced(tiny_files, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("mine")
    assert main(flags(tiny_files, tmp_path / "photos", "--lora", "x.safetensors", "--replace")) == 2
    assert "holds other files than an evaluation" in capsys.readouterr().err
    assert (tmp_path / "photos" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give prompts, and a LoRA with --lora or a run with --run"),
        (["--lora", "none.safetensors"], "none.safetensors"),
        (["--run", "none.spo"], "is no run's folder"),
        (["--seeds-each", "0"], "--seeds-each is 0; give 1 or more"),
    ],
)
def test_what_cannot_be_evaluated(tiny_files, tmp_path, capsys, more, message):
    assert main(flags(tiny_files, tmp_path / "page.html", *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_demos_judges_are_for_the_demo(tiny_files, trained, tmp_path, capsys):
    lora = trained("tiny.safetensors").output
    assert main(flags(tiny_files, tmp_path / "page.html", "--lora", str(lora), "--judge", "demo-judge")) == 2
    assert "knows the demo checkpoint's pictures only; the checkpoint is tiny.safetensors" in capsys.readouterr().err
    assert main(flags(tiny_files, tmp_path / "page.html", "--lora", str(lora), "--distance", "other")) == 2
    assert 'distance is "other"' in capsys.readouterr().err


def test_the_lora_is_scaled_to_the_best_weight(tiny_files, trained, tmp_path, capsys, monkeypatch):
    lora, scaled = trained("tiny.safetensors").output, tmp_path / "scaled.safetensors"
    rest = [
        "--lora",
        str(lora),
        "--weights",
        "0.5",
        "1.5",
        "--limit",
        "2",
        "--seeds-each",
        "2",
        "--scaled",
        str(scaled),
    ]
    assert main(flags(tiny_files, tmp_path / "page.html", *rest)) == 2
    assert "No judge is given that training did not follow" in capsys.readouterr().err
    save_cnn(LatentCNN(16), tmp_path / "unseen.safetensors", {})
    rest += ["--judge", str(tmp_path / "unseen.safetensors")]
    choice = Choice("unseen", "mine : 1.5", Interval(1.0, 0.5, 1.5), {})
    monkeypatch.setattr(headless_evaluate, "best_column", lambda *_: choice)
    assert main(flags(tiny_files, tmp_path / "page.html", *rest)) == 0
    said = capsys.readouterr().out
    assert choice.text() in said and "scaled.safetensors does at weight 1 what mine does at 1.5" in said
    assert choice.text() in (tmp_path / "page.html").read_text(encoding="utf-8")
    layer = next(iter(read_lora(scaled).layers.values()))
    assert layer.alpha == 1.5 * next(iter(read_lora(lora).layers.values())).alpha
    assert main(flags(tiny_files, tmp_path / "again.html", *rest)) == 2
    assert "is not replaced" in capsys.readouterr().err and not (tmp_path / "again.html").exists()
