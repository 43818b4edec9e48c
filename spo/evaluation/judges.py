"""Models of the catalogue as judges of finished pictures: those that training follows, and those that it never sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.algorithm.preference import Candidates, PreferenceModel
from spo.errors import SpoError
from spo.preference.clip.scores import ClipScore
from spo.preference.load import check_made_for, load
from spo.preference.subject_score import SubjectScore


@dataclass(frozen=True)
class Judge:
    """A preference model over finished pictures.

    name       what was asked for: "demo-judge", or a file
    model      the model, frozen, on its device
    adherence  in what `adherence_of` says how well a picture shows its prompt ("cosine"); "" where it does not say
    prefers    whether its score says which picture is better; off for one that measures adherence alone
    """

    name: str
    model: PreferenceModel
    adherence: str = ""
    prefers: bool = True

    @torch.no_grad()
    def scores(self, pixels: Tensor, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N] float32 on the CPU: the score of each finished picture for its prompt; a higher one is preferred.

        pixels  [N, 3, H, W] in [-1, 1]; latents: [N, 4, h, w] they were decoded from, on the model's device or the CPU

        All N at once: whoever calls takes fewer at a time when memory runs out. Raises SpoError for a score that is not
        finite.
        """
        pool = Candidates(latents[None], 0.0, 0.0, latents[None], lambda _: pixels.float().clamp(-1, 1))
        scores = self.model.score(pool, prompts)[0].float().cpu()
        if not scores.isfinite().all():
            raise SpoError(f'The judge "{self.model.name}" gave a score that is not finite.')
        return scores

    def recognised(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor | None:
        """[N] bool on the CPU: whether the picture shows its prompt's subject rather than another; None of a model that
        does not tell subjects apart. pixels, prompts: as for `scores`."""
        return self.model.recognised(pixels, prompts).cpu() if isinstance(self.model, SubjectScore) else None

    def adherence_of(self, scores: Tensor) -> Tensor:
        """What `scores` say of the prompt alone, in `adherence`: of a CLIP the cosine of picture and prompt."""
        if isinstance(self.model, ClipScore):
            return scores / float(self.model.clip.logit_scale.exp())
        return scores


def load_judge(
    name: str,
    device: torch.device | str,
    architecture: str,
    *,
    checkpoint_name: str = "",
    precision: str = "auto",
    rest_on_cpu: bool = False,
) -> Judge:
    """The judge of that name or in that file: any that `preference.load.load` takes, a mix too.

    device, architecture  the host's: where it computes, and whose latents it may have to read
    checkpoint_name       the host's; "demo-judge" and the like are refused on another checkpoint than the demo's
    precision, rest_on_cpu  see `preference.placement.placement`

    Raises SpoError as `preference.load.load` does.
    """
    if checkpoint_name:
        check_made_for(name, checkpoint_name)
    model = load(
        name,
        device=device,
        precision=precision,
        rest_on_cpu=rest_on_cpu,
        architecture=architecture,
        finished=True,
    )
    return as_judge(name, model)


def as_judge(name: str, model: PreferenceModel) -> Judge:
    """A model that is loaded already, as a judge."""
    if isinstance(model, SubjectScore):
        return Judge(name, model, "log-probability", prefers=False)
    return Judge(name, model, "cosine" if isinstance(model, ClipScore) else "")
