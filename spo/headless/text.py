"""Prompts as a network reads them: chunks of token ids, text features, and those features at rest until they are used.

Prompts follow the WebUI, but emphasis, BREAK, prompt editing and embeddings are WebUI syntax that is not interpreted
here: parentheses are text. An empty negative prompt of SDXL is zeroed row by row; the WebUI does so when all rows of a
batch are empty.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo.algorithm.denoiser import Conditioning
from spo.checkpoint.kinds import Architecture
from spo.errors import SpoError
from spo.training.memory import retry_with_less

CHUNK_TOKENS = 75  # of a prompt; with the start and end tokens a chunk is 77 places long
PLACES = CHUNK_TOKENS + 2
COMMA_BACKTRACK_TOKENS = 20  # the WebUI's default for "Prompt word wrap length limit"
OUT_OF_MEMORY_ADVICE = "take device cpu, or free memory that other programs hold"
CHUNK_ROWS = 32  # chunks that a text encoder sees at once
PROMPTS_AT_A_TIME = 256  # whose features are together before each goes its own way


class TextEncoders:
    """The text encoders of one checkpoint, frozen, in eval mode: one for SD1.5, two for SDXL.

    chunk_rows  chunks that an encoder sees at once; halved when memory runs out
    """

    def __init__(self, architecture: Architecture, networks: Sequence[nn.Module], device: torch.device) -> None:
        self.architecture = architecture
        self.networks: list[Any] = list(networks)
        self.device = device
        self.chunk_rows = CHUNK_ROWS

    def to(self, device: torch.device) -> TextEncoders:
        """Move the networks there, to compute there."""
        for network in self.networks:
            network.to(device)
        self.device = device
        return self

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        clip_skip: int = 1,
        width: int,
        height: int,
        chunks: int | None = None,
        negative: bool = False,
    ) -> Conditioning:
        """Prompts -> the UNet's conditioning, N rows on the CPU in the encoders' dtype; no gradient.

        width, height  of the pictures in pixels: SDXL is told (height, width, 0, 0, height, width)
        clip_skip      1: the last layer; n: the n-th last, then the final norm (SD1.x). SDXL always takes both
                       encoders' penultimate layers without norm, as the WebUI does whatever its clip skip
        chunks         encode in this many chunks; default: as many as the longest of these prompts needs. Prompts that
                       meet in one batch (positive and negative) need the same number: see `count_chunks`
        negative       these are negative prompts: SDXL's empty ones become zeros (features and pooled), as sgm and the
                       WebUI do; an empty prompt otherwise, and any of SD1.x, is encoded like every other

        Longer prompts are split into chunks of 75 tokens, each with its own start and end token, encoded one by one,
        and joined along L: cross_attention is [N, 77 * chunks, D]. As in the WebUI a chunk that would end within 20
        tokens after a comma ends at that comma, missing chunks are empty ones, and SDXL's pooled features are those of
        the first chunk.

        Of every layer's output only the one that is used leaves an encoder, portion by portion.

        Raises SpoError for no prompts, for a clip skip that the encoder has not, and for too few chunks.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one string; a sequence of strings is wanted")
        layers = self.networks[0].config.num_hidden_layers
        if not prompts or not 1 <= clip_skip <= layers:
            problem = "no prompts to encode" if not prompts else f"clip skip {clip_skip} (accepted: 1 to {layers})"
            raise SpoError(problem)
        parts = prompt_chunks(prompts)
        needed = max(map(len, parts))
        if chunks is not None and chunks < needed:
            raise SpoError(f"The prompts need {needed} chunks of {CHUNK_TOKENS} tokens, not {chunks} as asked")
        rows = [chunk for part in parts for chunk in part + [[]] * ((chunks or needed) - len(part))]
        end = tokenizer().eos_token_id
        if self.architecture == "sd15":
            features, _ = self._features(self.networks[0], rows, end, clip_skip, with_norm=clip_skip > 1)
            return Conditioning(_by_prompt(features, len(prompts)))
        narrow, _ = self._features(self.networks[0], rows, end, 2)
        wide, pooled = self._features(self.networks[1], rows, 0, 2)
        is_zero = torch.tensor([negative and prompt == "" for prompt in prompts])
        features = torch.cat([_by_prompt(narrow, len(prompts)), _by_prompt(wide, len(prompts))], dim=-1)
        return Conditioning(
            features.masked_fill(is_zero[:, None, None], 0.0),
            pooled.unflatten(0, (len(prompts), -1))[:, 0].masked_fill(is_zero[:, None], 0.0),
            torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(len(prompts), 1),
        )

    def _features(
        self, network: Any, rows: Sequence[Sequence[int]], pad: int, layer: int, *, with_norm: bool = False
    ) -> tuple[Tensor, Tensor]:
        """([chunks, 77, D] features, [chunks, P] pooled) on the CPU.

        layer  counted from the end: 1 is the last, after the final norm; others without it unless `with_norm`
        """
        features: list[Tensor] = []
        pooled: list[Tensor] = []
        first = 0
        while first < len(rows):
            work = partial(self._run, network, rows[first:], pad, layer, with_norm)
            chosen, text_embeds = retry_with_less(work, self._lessen, warnings.warn, OUT_OF_MEMORY_ADVICE)
            features.append(chosen)
            pooled.append(text_embeds)
            first += len(chosen)
        return torch.cat(features), torch.cat(pooled)

    def _run(
        self, network: Any, rows: Sequence[Sequence[int]], pad: int, layer: int, with_norm: bool
    ) -> tuple[Tensor, Tensor]:
        """(features, pooled) of the first `chunk_rows` rows."""
        rows = rows[: self.chunk_rows]
        tokens = _token_ids(rows, pad).to(self.device)
        output = network(input_ids=tokens, output_hidden_states=layer > 1)
        chosen = output.last_hidden_state if layer == 1 else output.hidden_states[-layer]
        if with_norm:
            chosen = getattr(network, "text_model", network).final_layer_norm(chosen)
        pooled = getattr(output, "text_embeds", None)  # of encoders with a projection
        return chosen.cpu(), torch.zeros(len(rows), 0) if pooled is None else pooled.cpu()

    def _lessen(self) -> str | None:
        if self.chunk_rows == 1:
            return None
        self.chunk_rows //= 2
        return f"{self.chunk_rows} prompts at a time through the text encoders"

    def memory_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(t.numel() * t.element_size() for network in self.networks for t in network.parameters())


class EncodedPrompts:
    """Conditioning of many prompts at rest on the CPU, each in as many chunks as it needs; filled up when taken.

    All rows that are taken have the same number of chunks, that of the longest prompt, so that what a prompt gives
    does not depend on the prompts beside it. What is filled up with are the features of an empty chunk.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Conditioning] = {}
        self._empty: Tensor | None = None
        self._chunks = 1

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._rows

    @property
    def chunks(self) -> int:
        """Of every row that is taken."""
        return self._chunks

    def fill(self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Conditioning], chunks: int) -> None:
        """Hold these prompts and no others; those that are not here yet come from `encode`, in portions.

        chunks  of the longest of them, or of a negative prompt that meets them
        """
        self._rows = {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}
        self._chunks = chunks
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        for first in range(0, len(missing), PROMPTS_AT_A_TIME):
            portion = missing[first : first + PROMPTS_AT_A_TIME]
            encoded = encode(portion)
            for number, (prompt, parts) in enumerate(zip(portion, prompt_chunks(portion), strict=True)):
                row = encoded.rows([number])
                own = row.cross_attention[:, : PLACES * len(parts)].clone()  # no view, which would hold the portion
                self._rows[prompt] = Conditioning(own, row.pooled, row.size_ids)
        is_short = (row.cross_attention.shape[1] < PLACES * chunks for row in self._rows.values())
        if self._empty is None and any(is_short):
            self._empty = encode([""]).cross_attention

    def keep(self, prompts: Sequence[str]) -> None:
        """Hold these of the prompts and no others."""
        self._rows = {prompt: self._rows[prompt] for prompt in prompts}

    def take(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """[N] rows on `device`, all of `chunks` chunks."""
        return Conditioning.cat([self._filled_up(self._rows[prompt]) for prompt in prompts]).to(device)

    def means(self, prompts: Sequence[str]) -> Tensor:
        """[N, D] float32 means over each prompt's first chunk, so that they do not depend on the prompts beside it."""
        return torch.stack([self._rows[prompt].cross_attention[0, :PLACES].float().mean(0) for prompt in prompts])

    def _filled_up(self, row: Conditioning) -> Conditioning:
        lacking = self._chunks - row.cross_attention.shape[1] // PLACES
        if not lacking or self._empty is None:
            return row
        features = torch.cat([row.cross_attention, *[self._empty] * lacking], dim=1)
        return Conditioning(features, row.pooled, row.size_ids)


# ---------------------------------------------------------------------------------------------- tokens


@cache
def tokenizer() -> Any:
    """CLIP's, as the package ships it."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(Path(__file__).parents[1] / "clip_tokenizer"))


def count_chunks(prompts: Sequence[str]) -> int:
    """How many chunks of 75 tokens the longest of the prompts takes, at least 1."""
    return max((len(chunks) for chunks in prompt_chunks(prompts)), default=1)


def prompt_chunks(prompts: Sequence[str]) -> list[list[list[int]]]:
    """Per prompt its chunks, at least one, of at most 75 token ids each, without start and end tokens."""
    if not prompts:
        return []
    words = tokenizer()
    ids = words(list(prompts), truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
    comma = words.convert_tokens_to_ids(",</w>")
    return [split_tokens(tokens, comma) for tokens in ids]


def split_tokens(tokens: Sequence[int], comma: int) -> list[list[int]]:
    """Chunks of 75 tokens; one that is full carries what stands after a comma, if it is 20 tokens or fewer, over."""
    chunks: list[list[int]] = []
    chunk: list[int] = []
    for token in tokens:
        if len(chunk) == CHUNK_TOKENS:
            after_comma = 0
            if token != comma and comma in chunk:
                after_comma = chunk[::-1].index(comma)
            carried = after_comma if after_comma < COMMA_BACKTRACK_TOKENS else 0
            chunks.append(chunk[: CHUNK_TOKENS - carried])
            chunk = chunk[CHUNK_TOKENS - carried :]
        chunk.append(token)
    return [*chunks, chunk] if chunk or not chunks else chunks


def _token_ids(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """[N, 77] token ids of chunks, each between its start and end token."""
    start, end = tokenizer().bos_token_id, tokenizer().eos_token_id
    return torch.tensor([[start, *row, end] + [pad] * (CHUNK_TOKENS - len(row)) for row in rows])


def _by_prompt(features: Tensor, prompts: int) -> Tensor:
    """[chunks, 77, D] -> [prompts, 77 * chunks of each, D]."""
    return features.unflatten(0, (prompts, -1)).flatten(1, 2)
