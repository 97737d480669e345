"""Text encoders of random weights that read chats, with images in them if a pipeline has some."""

from __future__ import annotations

import torch
from PIL import Image
from pipelines import diffusers
from torch import Tensor
from transformers import ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dense_attn.examples import _tiny_pipeline as tiny

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
SPECIAL += ["[IMG]"]  # FLUX.2's, which it takes out of prompts


def flow() -> object:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def louder(transformer: torch.nn.Module, *parts: str) -> torch.nn.Module:
    """A transformer whose attention counts for something beside the rest."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if any(part in name for part in parts):
                weight.mul_(6)
    return transformer


class LastHidden(torch.nn.Module):
    """A text encoder with the outputs of Qwen's: a token's embedding and the mean before it."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(tokens, width)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, input_ids: Tensor, *_: object, **__: object) -> object:
        x = self.embedding(input_ids)
        counts = torch.arange(1, x.shape[1] + 1).view(-1, 1)
        x = x + x.cumsum(1) / counts
        return BaseModelOutputWithPooling(x, x[:, -1], hidden_states=(x,) * 31)


def chat_tokenizer(**options: object) -> object:
    """Qwen's, of letters; every sign of a template but its special tokens is one token too."""
    from transformers import Qwen2Tokenizer

    letters = [*tiny.LETTERS, "Ċ", "Ġ", "<", "|", ">", "_"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], **options)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.pad_token = "<|im_end|>"
    return tokenizer


class Processor(ProcessorMixin):
    """A tokenizer beside which an image is as many tokens as it has patches of 8 x 8 pixels.

    Those of transformers want a package of theirs for images and for videos.
    """

    image_token = "<|image_pad|>"

    def __init__(self, tokenizer: object, chat_template: str | None = None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template

    def __call__(
        self,
        text: list[str],
        images: Image.Image | list[Image.Image] | None = None,
        videos: None = None,
        **options: object,
    ) -> object:
        given = [images] if isinstance(images, Image.Image) else list(images or ())
        parts = text[0].split(self.image_token)
        assert len(text) == 1 or not given
        assert len(given) == len(parts) - 1
        for i, image in enumerate(given):
            patches = (image.width // 8) * (image.height // 8)
            parts[i] += patches * self.image_token
        return self.tokenizer(["".join(parts), *text[1:]], **options)

    def apply_chat_template(
        self,
        conversation: list,
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        return_dict: bool = False,
        **options: object,
    ) -> object:
        texts = self.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        if not tokenize:
            return texts
        assert return_dict
        special = not texts[0].startswith(self.tokenizer.bos_token)  # as transformers does
        return self.tokenizer(texts, add_special_tokens=special, **options)
