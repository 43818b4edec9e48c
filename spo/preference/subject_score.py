"""The subject score: how surely a small classifier of subjects finds the prompt's subject in a picture.

The demo's adherence judge, "demo-adherence", is one. Its network was trained with strong changes of saturation,
brightness and contrast (recipes/demo_checkpoint/classifier.py), so that it judges the subject and not the colours'
strength. It knows only the demo's subjects, on white, at 64 pixels, and a prompt must be one of their names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spo.algorithm.preference import Candidates
from spo.checkpoint.tensor_file import TensorFile, read_tensors
from spo.errors import SpoError, nearest
from spo.preference.placement import Placement

_AT_A_TIME = 256  # pictures


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class SubjectNetwork(nn.Module):
    """A convolutional network: pixels [N, 3, 64, 64] in [-1, 1] -> logits [N, classes]."""

    def __init__(self, classes: int):
        super().__init__()
        self.features = nn.Sequential(
            _convolution(3, 32, 2),
            _convolution(32, 64, 2),
            _convolution(64, 64, 1),
            _convolution(64, 128, 2),
            _convolution(128, 128, 1),
            _convolution(128, 160, 2),
        )
        self.classify = nn.Linear(160, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classify(self.picture_features(pixels))

    def picture_features(self, pixels: Tensor) -> Tensor:
        """[N, 160] what the classes are told apart by."""
        return self.features(pixels).mean((2, 3))


class SubjectScore:
    """A `PreferenceModel`: the log-probability of the prompt's subject, at most 0. No time.

    classes  the subjects by name: the prompts that it knows
    """

    needs_pixels = True
    needs_denoised = True

    def __init__(self, network: SubjectNetwork, classes: Sequence[str], name: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.classes, self.name = list(classes), name
        self._numbers = {subject: number for number, subject in enumerate(self.classes)}

    @torch.no_grad()
    def score(self, candidates: Candidates, prompts: Sequence[str]) -> Tensor:
        """[K, B] float32; see `PreferenceModel`. Raises SpoError for a prompt that is none of `classes`."""
        pixels = candidates.pixels()
        likely = self._logits(pixels.flatten(0, 1)).log_softmax(1).unflatten(0, pixels.shape[:2])
        wanted = self._numbers_of(prompts).to(likely.device).expand(len(likely), -1)
        return likely.gather(2, wanted[..., None])[..., 0].to(candidates.x.device)

    @torch.no_grad()
    def recognised(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N] bool: whether the prompt's subject is the likeliest of all in each picture [N, 3, 64, 64]. Raises as
        `score`."""
        likeliest = self._logits(pixels).argmax(1)
        return likeliest == self._numbers_of(prompts).to(likeliest.device)

    def _logits(self, pixels: Tensor) -> Tensor:
        flat = pixels.to(next(self.network.parameters()).device).float().clamp(-1, 1)
        return torch.cat([self.network(part) for part in flat.split(_AT_A_TIME)])

    def _numbers_of(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self._number(prompt) for prompt in prompts])

    def _number(self, prompt: str) -> int:
        if prompt not in self._numbers:
            raise SpoError(
                f'The judge "{self.name}" does not know the prompt "{prompt[:80]}", only the subjects of the demo, as '
                f"in spo/demo/prompts.txt{nearest(prompt, self.classes)}."
            )
        return self._numbers[prompt]


def is_subject_classifier(file: TensorFile) -> bool:
    """Whether the recipe's stage "classifier" wrote the file."""
    return "classes" in file.metadata and "classify.weight" in file.tensors


def subjects_in(file: TensorFile) -> list[str]:
    """The subjects that a classifier knows, from its file's header."""
    return json.loads(file.metadata["classes"])


def read_subject_score(file: TensorFile, name: str, place: Placement) -> SubjectScore:
    """The frozen classifier of a file, in float32. SpoError when it is damaged."""
    try:
        classes = subjects_in(file)
        network = SubjectNetwork(len(classes))
        tensors = {key: value.float() for key, value in read_tensors(file, file.tensors).items()}
        network.load_state_dict(tensors, strict=False)  # the file leaves out BatchNorm's batch counters
    except (ValueError, TypeError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise SpoError(f'"{file.path.name}" is a damaged subject classifier ({first}); fetch it again.') from error
    return SubjectScore(network.to(place.device), classes, name)
