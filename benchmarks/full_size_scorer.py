"""The step-aware CLIP at its full size, with random weights: loading, memory, one verdict; and how often the shortcuts
name the same best and worst candidate as float32 over the full decode, on pictures of the demo checkpoint.

    python benchmarks/full_size_scorer.py --folder FOLDER

FOLDER takes 8 GB. Every number is written to FOLDER/full_size_scorer.json as soon as it is known, and not measured
again. What random weights cannot tell is how far apart a trained scorer puts its candidates, nor what it looks at.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from spo.algorithm.preference import Candidates, PreferenceModel  # noqa: E402
from spo.config import build_config  # noqa: E402
from spo.headless.host import load_host  # noqa: E402
from spo.preference.clip.step_aware import StepAwareCLIP  # noqa: E402
from spo.preference.clip.towers import ClipShape, TowerShape  # noqa: E402
from spo.preference.load import load  # noqa: E402
from spo.preference.pickles import convert  # noqa: E402
from spo.preference.small_decode import shrunk  # noqa: E402
from spo.rng import generator  # noqa: E402

VIT_H = ClipShape(TowerShape(1024, 4096, 24, 16), TowerShape(1280, 5120, 32, 16), 49408, 14, 224, 1024)
SMALL = ClipShape(TowerShape(64, 256, 2, 1), TowerShape(192, 768, 4, 3), 49408, 14, 224, 64)
DEMO = ROOT / "spo" / "demo" / "demo.safetensors"


def random_weights(shape: ClipShape, seed: int) -> dict[str, Tensor]:
    """By the published names. Modulations are drawn, too, so that the timestep matters."""
    torch.manual_seed(seed)
    model = StepAwareCLIP(shape)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "adaLN_modulation" in name and name.endswith("weight"):
                value.normal_(std=0.01)
        model.logit_scale.fill_(4.6052)  # 100, as trained
    return {f"model.{name}": value.detach() for name, value in model.state_dict().items()}


def child(work: Path, *arguments: str) -> dict[str, Any]:
    """Measure in a process of its own, so that the peak of memory is its own."""
    command = [sys.executable, str(Path(__file__)), "--folder", str(work), *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def resident_gb(field: str = "VmRSS") -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(field))


PRODUCTS = (torch.nn.functional.linear, torch.nn.functional.conv2d, torch.nn.functional.scaled_dot_product_attention)


class RoundedProducts(TorchFunctionMode):
    """Half-precision products as a GPU makes them: factors and result rounded, summed in float32.

    A CPU without instructions for them takes four (bfloat16) to twelve times (float16) as long as in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = args[0].dtype if args and isinstance(args[0], Tensor) else torch.float32
        if func not in PRODUCTS or dtype == torch.float32:
            return func(*args, **kwargs)
        wide = [value.float() if isinstance(value, Tensor) else value for value in args]
        others = {name: value.float() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        return func(*wide, **others).to(dtype)


def one_load(path: Path, precision: str) -> dict[str, Any]:
    """Load; in float32 also score a pool of four pictures of 512 px twice, the second time with prompt and timestep at
    hand."""
    before = resident_gb()
    began = time.perf_counter()
    model = load(path, precision=precision)
    numbers: dict[str, Any] = {"load_s": time.perf_counter() - began, "before_gb": before}
    numbers["resident_after_load_gb"], numbers["of_it_not_the_file_gb"] = resident_gb(), resident_gb("RssAnon")
    numbers["peak_at_load_gb"] = resident_gb("VmHWM")
    if precision != "float32":  # which no CPU of users computes in
        return numbers
    pictures = torch.rand(4, 1, 3, 64, 64, generator=generator("pictures")).mul(2).sub(1)
    pictures = torch.nn.functional.interpolate(pictures.flatten(0, 1), (512, 512), mode="bilinear")
    pool = Candidates(torch.zeros(4, 1, 4, 64, 64), 1.0, 201.0, torch.zeros(4, 1, 4, 64, 64), lambda latents: pictures)
    for name in ("first_verdict_s", "next_verdict_s"):
        began = time.perf_counter()
        scores = model.score(pool, ["a red fox in the snow"])
        numbers[name] = time.perf_counter() - began
    numbers["peak_gb"] = resident_gb("VmHWM")
    numbers["finite"] = bool(torch.isfinite(scores).all())
    return numbers


def pools(count: int, side_px: int) -> list[Candidates]:
    """Pools of four as in a rollout of the demo checkpoint: predictions at one noise level, decoded by its VAE."""
    warnings.simplefilter("ignore")
    values = {"checkpoint": str(DEMO), "prompts": "x", "preference": "demo", "output": "x", "device": "cpu"}
    host = load_host(build_config({**values, "width": side_px, "height": side_px}, "sd15"))
    from spo.algorithm.diffusion import training_sigmas

    prompts = (ROOT / "spo" / "demo" / "prompts_heldout.txt").read_text().splitlines()
    made = []
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        host.prepare([prompt])
        timestep = (801, 601, 401, 201)[number % 4]
        clean = sampled(host, prompt, number)
        sigma = training_sigmas(host.alphas_cumprod)[timestep].float()
        x = clean + sigma * torch.randn(4, *clean.shape[1:], generator=generator("pool", number))
        steps = torch.zeros(4, dtype=torch.long)
        with torch.no_grad():
            denoised = host.denoise(x, sigma.expand(4), [prompt] * 4, steps)
        made.append(Candidates(x[:, None], float(sigma), float(timestep), denoised[:, None], host.decode))
    return made


def sampled(host: Any, prompt: str, seed: int) -> Tensor:
    """[1, 4, h, w]: the latents of an ordinary picture."""
    from spo.algorithm.rollout import RolloutSettings

    return host.rollout([prompt], [seed], RolloutSettings(candidates=1), None, None).x


def pictures_of(pool: Candidates, small_px: int = 0) -> Candidates:
    """The pool with its decode done, at full size or brought down first."""
    denoised = pool.prediction()
    flat = denoised.flatten(0, 1)
    with torch.no_grad():
        pixels = pool.decode(shrunk(flat, small_px) if small_px else flat)
    return Candidates(pool.x, pool.sigma, pool.timestep, denoised, lambda latents: pixels)


def agreement(exact: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """Shares of pools with the same best and the same worst, and the mean difference of scores by their spread."""

    def same(which: Callable[[Tensor], Tensor]) -> float:
        return sum(float((which(a) == which(b)).all()) for a, b in zip(exact, other, strict=True)) / len(exact)

    spread = sum(float(a.max() - a.min()) for a in exact) / len(exact)
    error = sum(float(((a - a.mean()) - (b - b.mean())).abs().mean()) for a, b in zip(exact, other, strict=True))
    return {
        "same_best": same(lambda scores: scores.argmax(0)),
        "same_worst": same(lambda scores: scores.argmin(0)),
        "error_by_spread": error / len(exact) / spread,
        "spread": spread,
        "pools": len(exact),
    }


def compare(path: Path, half: Path, count: int, side_px: int) -> dict[str, Any]:
    """Each shortcut alone against float32 over the full decode."""
    made = pools(count, side_px)
    prompts = [["a picture"]] * count
    full, small = [pictures_of(pool) for pool in made], [pictures_of(pool, 224) for pool in made]

    def scores(model: PreferenceModel, of: Sequence[Candidates]) -> list[Tensor]:
        return [model.score(pool, prompt) for pool, prompt in zip(of, prompts, strict=True)]

    model = load(path, precision="float32")
    exact = scores(model, full)
    found = {"small_decode": agreement(exact, scores(model, small))}
    for precision in ("float16", "bfloat16"):
        model = load(half, precision=precision)
        with RoundedProducts():
            found[precision] = agreement(exact, scores(model, full))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--load", nargs=2, metavar=("FILE", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    work: Path = options.folder
    if options.load:
        print(json.dumps(one_load(Path(options.load[0]), options.load[1])))
        return
    torch.set_num_threads(1)
    results = work / "full_size_scorer.json"
    numbers: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}

    def measured(name: str, measure: Callable[[], Any]) -> None:
        if name not in numbers:
            numbers[name] = measure()
            results.write_text(json.dumps(numbers, indent=1))
        print(name, json.dumps(numbers[name]), flush=True)

    def write(path: Path, shape: ClipShape) -> None:
        if not path.exists():
            torch.save(random_weights(shape, 0), path)

    small, full = work / "small_spm.bin", work / "random_spm.bin"
    half = work / "random_spm.half.safetensors"
    write(full, VIT_H)
    measured("convert_s", lambda: timed(lambda: convert(full, half, replace=True)))
    for path, precision in ((half, "float16"), (half, "bfloat16"), (full, "float32")):
        measured(f"{path.name}, {precision}", lambda p=path, d=precision: child(work, "--load", str(p), d))  # type: ignore[misc]
    write(small, SMALL)
    measured("ViT-H, 256 px", lambda: compare(full, half, 6, 256))
    measured("small, 256 px", lambda: compare(small, small, 40, 256))
    measured("small, 512 px", lambda: compare(small, small, 8, 512))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
