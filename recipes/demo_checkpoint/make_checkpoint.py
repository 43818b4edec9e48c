#!/usr/bin/env python3
"""Make the demo checkpoint: a small text-to-image model with Stable Diffusion 1's architecture, trained on emoji.

Stages, in this order (each reads what the earlier ones left in --work, the last ones write into --out):

    data        choose subjects, render both styles in several ways               -> pictures.npy, subjects.json
    vae         train the f8 autoencoder                                          -> vae.pt, reconstructions.png
    encode      encode the pictures and measure the latents' scale                -> latents.pt
    unet        train text encoder and UNet together, exporting snapshots         -> unet.pt, snapshots
    unet_core   go on with the core subjects only                                 -> unet.pt, snapshots
    classifier  train the subject classifier                                      -> subject_classifier.safetensors
    calibrate   divide its logits, so that it is as sure as it is right           -> subject_classifier.safetensors
    export      write the checkpoint and check it against diffusers' own loader   -> demo.safetensors, demo.yaml
    prompts     choose training and held-out prompts                              -> prompts.txt, prompts_heldout.txt
    sheet       draw contact sheets                                               -> contact_sheet.png
    all         all of them, but for those that an earlier `all` has done

usage, in the project's root:
    python -m recipes.demo_checkpoint.make_checkpoint STAGE --flat <emoji-datasource-google>
        --fluent <@lobehub/fluent-emoji-3d> --work <scratch> --out <result>
Which emoji are subjects, and what they are called, stands in subject_choice.json. Networks are trained on the GPU where
there is one, else on the CPU. Every stage makes a fixed number of steps from a seed; one that was cut off goes on from
WORK/STAGE.state to the same result (`steps`). With --checkpoint, "vae" and "unet" take that file's networks in place of
training them, "data" has the core subjects alone, and "unet_core" goes on in its latent space.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from recipes.demo_checkpoint.autoencoder import encode, train_vae
from recipes.demo_checkpoint.checkpoint import export
from recipes.demo_checkpoint.classifier import calibrate_classifier, train_classifier
from recipes.demo_checkpoint.options import Options
from recipes.demo_checkpoint.pictures import make_data
from recipes.demo_checkpoint.prompts import choose_prompts, draw_sheet
from recipes.demo_checkpoint.text_and_unet import train_unet, train_unet_core
from spo.demo.install import TOKENIZER
from spo.files import write_text

STAGES: dict[str, Callable[[Options], None]] = {
    "data": make_data,
    "vae": train_vae,
    "encode": encode,
    "unet": train_unet,
    "unet_core": train_unet_core,
    "classifier": train_classifier,
    "calibrate": calibrate_classifier,
    "export": export,
    "prompts": choose_prompts,
    "sheet": draw_sheet,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument(
        "--flat", type=Path, default=Path("emoji-datasource-google"), help="unpacked npm package of that name"
    )
    parser.add_argument(
        "--fluent", type=Path, default=Path("fluent-emoji-3d"), help="unpacked npm package @lobehub/fluent-emoji-3d"
    )
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder with CLIP's vocab.json, merges.txt")
    parser.add_argument("--work", type=Path, default=Path("demo-work"), help="scratch folder")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results")
    parser.add_argument("--checkpoint", type=Path, help="a demo checkpoint to go on from, see above")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto: the GPU where there is one")
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--unet-steps", type=int, default=6000)
    parser.add_argument("--core-steps", type=int, default=12000)
    parser.add_argument("--unet-lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=64, help="noisy latents in a step, two of each picture")
    parser.add_argument("--classifier-steps", type=int, default=3000)
    parser.add_argument("--save-every", type=int, default=250, help="steps after which a cut-off stage can go on")
    parser.add_argument("--snapshots", type=Path, help="folder for checkpoints while the UNet trains")
    given = parser.parse_args(arguments)
    options = Options(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Options)})
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    done = options.work / "done.json"
    names: list[str] = json.loads(done.read_text()) if done.exists() else []
    for stage in STAGES if given.stage == "all" else (given.stage,):
        if given.stage != "all" or stage not in names:
            STAGES[stage](options)
            names = [*dict.fromkeys([*names, stage])]
            write_text(done, json.dumps(names) + "\n")


if __name__ == "__main__":
    main()
