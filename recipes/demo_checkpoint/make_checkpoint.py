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
        --fluent <@lobehub/fluent-emoji-3d> --work <scratch> --out <result>
Which emoji are subjects, and what they are called, stands in subject_choice.json. Everything runs on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from recipes.demo_checkpoint.autoencoder import encode, train_vae, tune_vae_colours
from recipes.demo_checkpoint.checkpoint import export
from recipes.demo_checkpoint.classifier import train_classifier
from recipes.demo_checkpoint.options import Options
from recipes.demo_checkpoint.pictures import make_data
from recipes.demo_checkpoint.prompts import choose_prompts, draw_sheet
from recipes.demo_checkpoint.text_and_unet import train_unet, train_unet_core
from spo.demo.install import TOKENIZER

STAGES: dict[str, Callable[[Options], None]] = {
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--flat", type=Path, default=Path("emoji-datasource-google"), help="unpacked npm package of that name"
    )
    parser.add_argument(
        "--fluent", type=Path, default=Path("fluent-emoji-3d"), help="unpacked npm package @lobehub/fluent-emoji-3d"
    )
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder with CLIP's vocab.json, merges.txt")
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
    given = parser.parse_args(arguments)
    options = Options(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Options)})
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    STAGES[given.stage](options)


if __name__ == "__main__":
    main()
