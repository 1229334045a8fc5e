"""Frozen text encoders of diffusers pipelines: prompts to token ids, token ids to what a diffusion model reads.

They belong to a network but are no part of it: no weights of theirs are trained, counted, copied or saved with it.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pantarhei.files import read_json
from pantarhei.naming import unknown

TextKind = Literal["clip", "sdxl", "sd3"]
ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
SUFFIXES = ("", "_2", "_3")
KEPT_BATCHES = 4  # a sampler asks for the same prompts at every step


class Encoded(NamedTuple):
    """Embeddings of each token (B, L, D), and of the whole prompt (B, P) where the model reads those too."""

    text: Tensor
    pooled: Tensor | None


class TextEncoders:
    """The tokenizers and text encoders in a pipeline's folder; loaded when they are first asked.

    A prompt's token ids are those of all tokenizers, one after another: (B, L1 + L2 + ...). The encoders are as wide as the
    widest type that was asked of them: a float32 student does not read its half-precision teacher's rounded embeddings.

    Args:
        folder: of the pipeline, with `tokenizer`, `text_encoder`, and the same with `_2` and `_3`.
        kind: how the embeddings are put together: "clip" takes the last layer of one encoder (Stable Diffusion), "sdxl" the
            last but one of each, side by side, "sd3" those of the two CLIPs, side by side and then in front of T5's.
        width: number of features that the model reads (of SD3, whose T5 may be left out).
        length: tokens for T5; CLIP's are fixed.
        zero_null: the empty prompt's embeddings are zeros (SDXL's `force_zeros_for_empty_prompt`).

    Raises:
        FileNotFoundError: there are no tokenizers in the folder.
    """

    def __init__(
        self, folder: str | Path, kind: TextKind, *, width: int = 0, length: int = 256, zero_null: bool = False
    ):
        self.folder, self.kind = Path(folder), kind
        self.width, self.length, self.zero_null = width, length, zero_null
        self._tokenizers: list[Any] = []
        self._encoders: list[Any] = []
        self._null: Tensor | None = None
        self._dtype = torch.float32  # of the encoders, once they are loaded
        self._kept: OrderedDict[Any, Encoded] = OrderedDict()
        self._seen: deque[tuple[Tensor, int, torch.dtype, Encoded]] = deque(maxlen=KEPT_BATCHES)

    def __deepcopy__(self, memo: Any) -> TextEncoders:
        return self  # an average or a student reads the same prompts through the same frozen encoders

    @property
    def null(self) -> Tensor:
        """The token ids of the empty prompt, (L,)."""
        if self._null is None:
            self._null = self.tokenize([""])[0]
        return self._null

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids int64 (B, L); longer prompts are cut.

        Raises:
            TypeError: a prompt is no text.
            FileNotFoundError: there are no tokenizers.
        """
        if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
            raise TypeError("prompts: a list of texts is needed")
        if not self._tokenizers:
            self._tokenizers = self._load_tokenizers()
        ids = [
            tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            for tokenizer, length in zip(self._tokenizers, self._lengths(), strict=True)
        ]
        return torch.cat([part.input_ids.long() for part in ids], dim=1)

    @torch.no_grad()
    def encode(self, tokens: Tensor, dtype: torch.dtype) -> Encoded:
        """Embeddings of token ids (B, L), on their device. Equal rows are encoded once, the last batches are kept.

        Raises:
            ValueError: the rows have another length than `tokenize` gives.
        """
        if tokens.is_inference():  # such tensors do not say whether they have been changed
            return self._encode(tokens, dtype)
        # A sampler brings the same tensor at every step; to look at its numbers would be to wait for the GPU each time.
        for seen, version, kind, kept in self._seen:
            if seen is tokens and version == tokens._version and kind == dtype:
                return kept
        found = self._encode(tokens, dtype)
        self._seen.append((tokens, tokens._version, dtype, found))
        return found

    def _encode(self, tokens: Tensor, dtype: torch.dtype) -> Encoded:
        key = (tuple(tokens.shape), tokens.device, dtype, tokens.cpu().numpy().tobytes())
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if tokens.ndim != 2 or tokens.shape[1] != len(self.null):
            raise ValueError(f"tokens: shape (B, {len(self.null)}) is needed, got {tuple(tokens.shape)}")
        rows, back = tokens.unique(dim=0, return_inverse=True)
        with torch.autocast(tokens.device.type, enabled=False):
            found = self._embed(rows, dtype)
        if self.zero_null:
            full = (rows != self.null.to(rows)).any(dim=1).to(dtype)
            pooled = None if found.pooled is None else found.pooled * full[:, None]
            found = Encoded(found.text * full[:, None, None], pooled)
        result = Encoded(found.text[back], None if found.pooled is None else found.pooled[back])
        self._kept[key] = result
        while len(self._kept) > KEPT_BATCHES:
            self._kept.popitem(last=False)
        return result

    def _embed(self, tokens: Tensor, dtype: torch.dtype) -> Encoded:
        wider = torch.promote_types(self._dtype, dtype)
        if not self._encoders or wider != self._dtype:
            self._dtype = wider if self._encoders else dtype
            self._encoders = []  # not two sets of them at once
            self._encoders = self._load_encoders(self._dtype)
        parts = tokens.split(self._lengths(), dim=1)
        outputs: list[Any] = [
            encoder.to(tokens.device)(part, output_hidden_states=True)
            for encoder, part in zip(self._encoders, parts, strict=True)
        ]
        if self.kind == "clip":
            return Encoded(outputs[0].last_hidden_state.to(dtype), None)
        clips = [o for o in outputs if hasattr(o, "text_embeds") or self.kind == "sdxl"]
        text = torch.cat([o.hidden_states[-2] for o in clips], dim=-1).to(dtype)
        if self.kind == "sdxl":
            return Encoded(text, clips[-1].text_embeds.to(dtype))
        pooled = torch.cat([o.text_embeds for o in clips], dim=-1).to(dtype)
        text = torch.nn.functional.pad(text, (0, self.width - text.shape[-1]))
        if len(outputs) == 3:
            t5 = outputs[2].last_hidden_state.to(dtype)
        else:  # SD3 without T5 reads zeros in its place
            t5 = text.new_zeros(len(text), self.length, self.width)
        return Encoded(torch.cat([text, t5], dim=1), pooled)

    def _lengths(self) -> list[int]:
        if self.kind != "sd3":
            return [int(t.model_max_length) for t in self._tokenizers]
        clip = int(self._tokenizers[0].model_max_length)
        return [clip, clip, self.length][: len(self._tokenizers)]

    def _load_tokenizers(self) -> list[Any]:
        transformers = import_transformers()
        loaded = []
        for suffix in SUFFIXES:
            folder = self.folder / f"tokenizer{suffix}"
            if folder.is_dir():
                kind = "T5TokenizerFast" if suffix == "_3" else "CLIPTokenizer"
                loaded.append(getattr(transformers, kind).from_pretrained(folder, local_files_only=True))
        if not loaded and not self.folder.is_dir():
            raise FileNotFoundError(f"the pipeline {self.folder}, which reads the prompts, is not there; give base=")
        if not loaded:
            raise FileNotFoundError(f"{self.folder} has no folder tokenizer: it turns no prompts into tokens")
        return loaded

    def _load_encoders(self, dtype: torch.dtype) -> list[Any]:
        transformers = import_transformers()
        loaded = []
        for suffix in SUFFIXES:
            folder = self.folder / f"text_encoder{suffix}"
            if not folder.is_dir():
                continue
            settings = read_json(folder / "config.json")
            name = (settings.get("architectures") or ["CLIPTextModel"])[0]
            if name not in ENCODERS:
                raise ValueError(f"{folder}: {unknown('text encoder', name, ENCODERS)}")
            if settings.get("use_attention_mask"):
                raise ValueError(f"{folder}: a text encoder with use_attention_mask is not known here")
            with _quiet(transformers):
                encoder = getattr(transformers, name).from_pretrained(folder, dtype=dtype, local_files_only=True)
            loaded.append(encoder.eval().requires_grad_(False))
        if len(loaded) != len(self._tokenizers):
            raise FileNotFoundError(
                f"{self.folder} has {len(self._tokenizers)} tokenizers and {len(loaded)} text encoders; one each is needed"
            )
        return loaded


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar for every encoder."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def import_transformers() -> Any:
    """The package transformers.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError("prompts need transformers: pip install 'pantarhei[diffusers]'") from None
    return transformers
