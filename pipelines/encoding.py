"""Prompts to text embeddings, as Automatic1111 makes them: weights, chunks for long prompts, edits between steps.

A prompt without any of that gives exactly the embeddings that diffusers' `encode_prompt` gives. What an encoder made of
a chunk is remembered beside it, so that the next pictures of the same words, or of the same negative prompt, need it no
more; see `_Memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from diptych.pipelines.prompts import Fragment, Prompt

_REMEMBERED = 32  # chunks for each text encoder: at most 7 MB for SDXL's larger one in half precision
_BACKTRACK = 20  # a chunk that would cut a phrase ends at a comma if there is one among its last tokens


_Encoded = tuple[torch.Tensor, torch.Tensor | None]  # hidden states (1, 77, width), and SDXL's pooled (1, width)
_Key = tuple[object, ...]


@dataclass(frozen=True)
class Embeddings:
    """What the UNet is told: (1, 77 * chunks, width) for prompt and negative prompt; SDXL's pooled (1, width) too."""

    prompt: torch.Tensor
    negative: torch.Tensor
    pooled: torch.Tensor | None = None
    negative_pooled: torch.Tensor | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    """The embeddings for each step (the same object where nothing changes), and how long the prompts are."""

    steps: tuple[Embeddings, ...]
    tokens: int
    """Tokens of the longer prompt, without start and end."""
    chunks: int


@dataclass(frozen=True)
class _Chunk:
    tokens: tuple[int, ...]
    weights: tuple[float, ...]


@torch.no_grad()
def encode_prompts(pipeline: Any, prompt: Prompt, negative: Prompt, steps: int, clip_skip: int = 1) -> EncodedPrompt:
    """Encodes a prompt and its negative for every one of `steps` steps, both with the same number of chunks.

    clip_skip: 1 takes the last layer of the text encoder, 2 the one before it, and so on (for SDXL, whose rule is
    the last but one, counted from there). Raises ValueError for more layers than there are.
    """
    encoders = _encoders(pipeline)
    for encoder in encoders:
        layers = encoder.model.config.num_hidden_layers - (len(encoders) - 1)
        if clip_skip > layers:
            raise ValueError(f"clip skip is {clip_skip}, and the text encoder of this model has {layers} layers")
    said = [(prompt.at(step, steps), negative.at(step, steps)) for step in range(steps)]
    every = {fragments for pair in said for fragments in pair}
    cut = {fragments: [encoder.chunks(fragments) for encoder in encoders] for fragments in every}
    longest = max(len(chunks) for per_encoder in cut.values() for chunks in per_encoder)
    encoded = {f: _encode(encoders, per_encoder, longest, clip_skip) for f, per_encoder in cut.items()}
    # SDXL was trained with zeros, not with an empty prompt, on the negative side.
    zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt")) and not negative.source.strip()
    made: dict[tuple[tuple[Fragment, ...], tuple[Fragment, ...]], Embeddings] = {}
    for pair in said:
        if pair not in made:
            (positive, pooled), (other, other_pooled) = encoded[pair[0]], encoded[pair[1]]
            if zeros:
                other = torch.zeros_like(positive)
                other_pooled = None if pooled is None else torch.zeros_like(pooled)
            made[pair] = Embeddings(positive, other, pooled, other_pooled)
    tokens = max(sum(len(c.tokens) for c in per_encoder[0]) for per_encoder in cut.values())
    return EncodedPrompt(tuple(made[pair] for pair in said), tokens, longest)


@dataclass(frozen=True)
class _Encoder:
    """One of the pipeline's text encoders with its tokenizer."""

    pipeline: Any
    tokenizer: Any
    model: Any

    @property
    def room(self) -> int:
        """Tokens in a chunk, besides start and end."""
        return int(self.tokenizer.model_max_length) - 2

    def chunks(self, fragments: Sequence[Fragment]) -> list[_Chunk]:
        """Cuts a prompt into chunks; an empty one if it has no tokens."""
        comma = self.tokenizer.convert_tokens_to_ids(",</w>")
        done: list[_Chunk] = []
        open_: list[tuple[int, float]] = []
        for fragment in fragments:
            if fragment.text is None:
                done.append(_chunk(open_))
                open_ = []
                continue
            # A word of textual inversion may stand for several tokens.
            text = self.pipeline.maybe_convert_prompt(fragment.text, self.tokenizer)
            for token in self.tokenizer(text, add_special_tokens=False).input_ids:
                if len(open_) == self.room:
                    keep = _last_comma(open_, comma) if token != comma else self.room
                    done.append(_chunk(open_[:keep]))
                    open_ = open_[keep:]
                open_.append((token, fragment.weight))
        if open_ or not done:
            done.append(_chunk(open_))
        return done

    def ids(self, chunk: _Chunk) -> tuple[list[int], list[float], list[int]]:
        """Token numbers, weights and attention mask of a whole chunk: start, tokens, end, padding."""
        fill = self.room - len(chunk.tokens)
        tokenizer = self.tokenizer
        ids = [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * fill]
        mask = [1] * (len(chunk.tokens) + 2) + [0] * fill
        return ids, [1.0, *chunk.weights, 1.0, *[1.0] * fill], mask


def _encoders(pipeline: Any) -> list[_Encoder]:
    pairs = [(pipeline.tokenizer, pipeline.text_encoder)]
    if hasattr(pipeline, "text_encoder_2"):
        pairs.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    return [_Encoder(pipeline, tokenizer, model) for tokenizer, model in pairs if model is not None]


def _chunk(tokens: list[tuple[int, float]]) -> _Chunk:
    return _Chunk(tuple(t for t, _ in tokens), tuple(w for _, w in tokens))


def _last_comma(tokens: list[tuple[int, float]], comma: int) -> int:
    """How many tokens to keep in a full chunk: up to its last comma, if that is near the end."""
    for kept in range(len(tokens), len(tokens) - _BACKTRACK, -1):
        if kept > 0 and tokens[kept - 1][0] == comma:
            return kept
    return len(tokens)


def _encode(
    encoders: list[_Encoder], per_encoder: list[list[_Chunk]], longest: int, clip_skip: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    is_xl = hasattr(encoders[0].pipeline, "text_encoder_2")
    widths, pooled = [], None
    for encoder, chunks in zip(encoders, per_encoder, strict=True):
        filled = [*chunks, *[_Chunk((), ())] * (longest - len(chunks))]
        made = {chunk: _run(encoder, chunk, clip_skip, is_xl) for chunk in dict.fromkeys(filled)}  # each but once
        outputs = [made[chunk] for chunk in filled]
        widths.append(torch.cat([hidden for hidden, _ in outputs], dim=1))
        pooled = outputs[0][1]  # of the second encoder, where there are two; of the first chunk, which leads
    return torch.cat(widths, dim=-1), pooled if is_xl else None


def _run(encoder: _Encoder, chunk: _Chunk, clip_skip: int, is_xl: bool) -> _Encoded:
    ids, weights, mask = encoder.ids(chunk)
    model, device = encoder.model, torch.device(encoder.pipeline._execution_device)
    memory = _MEMORIES.setdefault(model, _Memory())
    key = (*ids, *weights, clip_skip, is_xl, str(device))
    encoded = memory.recall(model, key)
    if encoded is None:
        encoded = memory.keep(key, _compute(model, device, ids, weights, mask, clip_skip, is_xl))
    return encoded


def _compute(
    model: Any,
    device: torch.device,
    ids: list[int],
    weights: list[float],
    mask: list[int],
    clip_skip: int,
    is_xl: bool,
) -> _Encoded:
    wants_mask = getattr(model.config, "use_attention_mask", False)
    output = model(
        torch.tensor([ids], device=device),
        attention_mask=torch.tensor([mask], device=device) if wants_mask else None,
        output_hidden_states=is_xl or clip_skip > 1,
    )
    if is_xl:
        hidden = output.hidden_states[-(clip_skip + 1)]
    elif clip_skip > 1:
        hidden = _text_model(model).final_layer_norm(output.hidden_states[-clip_skip])
    else:
        hidden = output[0]
    hidden = hidden.to(model.dtype)
    if any(weight != 1 for weight in weights):
        # Weighted as in Automatic1111: the mean of the embedding stays what it was. Where it is nearly zero, as in
        # small encoders, that would multiply by anything: more than the weights themselves could ask for is not done.
        mean = hidden.mean()
        hidden = hidden * torch.tensor(weights, dtype=hidden.dtype, device=hidden.device)[None, :, None]
        ratio = (mean / hidden.mean()).item()
        if min(weights) > 0 and 1 / max(weights) <= ratio <= 1 / min(weights):
            hidden = hidden * ratio
    return hidden, output[0] if is_xl else None


def _text_model(model: Any) -> Any:
    return getattr(model, "text_model", model)


class _Memory:
    """What one text encoder made of its last chunks, for as long as the encoder is what it was.

    It is another encoder when a weight was changed in place or exchanged, as by textual inversions, fused LoRAs and
    other precisions, or when LoRA layers came, went, or were given other weights.
    """

    def __init__(self) -> None:
        self._chunks: dict[_Key, _Encoded] = {}  # the longest unused first
        self._weights: list[tuple[ref[torch.Tensor], int, torch.dtype]] = []
        self._adapters: list[object] = []

    def recall(self, model: torch.nn.Module, key: _Key) -> _Encoded | None:
        """The result for `key`, if there is one and the encoder is still the same."""
        weights, adapters = list(model.parameters()), _adapters(model)
        same = len(weights) == len(self._weights) and adapters == self._adapters
        # A reference, not an address: that of a weight which is gone may have been given to another.
        if not same or any(
            was() is not now or (version, dtype) != (_version(now), now.dtype)
            for now, (was, version, dtype) in zip(weights, self._weights, strict=True)
        ):
            self._chunks.clear()
            self._weights = [(ref(weight), _version(weight), weight.dtype) for weight in weights]
            self._adapters = adapters
        if key in self._chunks:
            self._chunks[key] = self._chunks.pop(key)
        return self._chunks.get(key)

    def keep(self, key: _Key, encoded: _Encoded) -> _Encoded:
        """Remembers a result in place of the longest unused one, and returns it."""
        while len(self._chunks) >= _REMEMBERED:
            del self._chunks[next(iter(self._chunks))]
        self._chunks[key] = encoded
        return encoded


def _version(weight: torch.Tensor) -> int:
    """How often it was changed in place."""
    return 0 if weight.is_inference() else weight._version


def _adapters(model: Any) -> list[object]:
    """How much of each LoRA acts in each layer, which peft keeps beside the weights."""
    layers = (layer for layer in model.modules() if isinstance(getattr(layer, "scaling", None), dict))
    return [(dict(layer.scaling), list(layer.active_adapters), layer.disable_adapters) for layer in layers]


_MEMORIES: WeakKeyDictionary[torch.nn.Module, _Memory] = WeakKeyDictionary()
