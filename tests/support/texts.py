"""Tokenizers made of a few sentences, of every kind, and pipelines that read with them."""

from __future__ import annotations

import inspect
import json
import warnings
from typing import Any

import pytest
import torch
from pipelines import MODELS, REGIONS, diffusers, latents
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import apply_layout

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SENTENCES = [
    "a catfish and a cat", (
"a red cat on the "
"left of two dogs"
), 'a "cat" (dog, mat), the sky', "Katzen und Katze",
    "une café au lait", "一只红猫在左边", "red cats, blue cats", "a dog's cat-house",
]  # fmt: skip
TOKENS = 32
BOX = (0.0, 0.0, 0.5, 1.0)


def clip(padding_side: str = "right") -> Any:
    """Pairs of bytes, words of small letters that end with </w>."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    blank = transformers.CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [])
    trained.normalizer, trained.pre_tokenizer = (
        blank._tokenizer.normalizer,
        blank._tokenizer.pre_tokenizer,
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(SENTENCES * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"]
    for letter in alphabet:
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.CLIPTokenizer(
        vocabulary, merges, model_max_length=TOKENS, padding_side=padding_side
    )


def t5() -> Any:
    """Pieces of words, of which the first is marked and the last is not."""
    trained = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=160,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    trained.train_from_iterator(SENTENCES * 3, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    pieces += [("▁cat", -1.0)] * ("▁cat" not in dict(pieces))
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


class Glm(transformers.PreTrainedTokenizer):
    """Slow, it tells no characters; two tokens of its own and padding stand before the text."""

    def __init__(self, **options: Any) -> None:
        pieces = [
            "<unk>",
            "</s>",
            "[gMASK]",
            "sop",
            "▁",
            "▁a",
            "▁red",
            "▁cat",
            "cat",
            "▁dog",
            "fish",
            "▁on",
            "▁the",
        ]
        pieces += ["一只", "红", "猫在", "猫", *"abcdefghijklmnopqrstuvwxyz(),.2"]
        self.pieces = {piece: i for i, piece in enumerate(pieces)}
        super().__init__(
            pad_token="<unk>",
            unk_token="<unk>",
            eos_token="</s>",
            padding_side="left",
            model_max_length=TOKENS,
            **options,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.pieces)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        text, found = "▁" + text.replace(" ", "▁"), []
        while text:
            sizes = [size for size in range(1, 6) if text[:size] in self.pieces]
            found.append(text[: max(sizes, default=1)])
            text = text[len(found[-1]) :]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.pieces)[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ").strip()

    def build_inputs_with_special_tokens(
        self, ids: list[int], _second: list[int] | None = None
    ) -> list[int]:
        return [self.pieces["[gMASK]"], self.pieces["sop"], *ids]


KINDS = {"clip": clip, "clip, left": lambda: clip("left"), "t5": t5, "glm": Glm}


def with_tokenizer(tokenizer: object) -> object:
    """Stable Diffusion that reads with another tokenizer, and an encoder as large as it needs."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    config = pipe.text_encoder.config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), TOKENS
    config.pad_token_id, config.eos_token_id = None, 1
    torch.manual_seed(0)
    pipe.tokenizer, pipe.text_encoder = tokenizer, type(pipe.text_encoder)(config).eval()
    return pipe


def painted(pipe: object, prompt: str, regions: list, calls: list, **options: object) -> list[str]:
    """The words that each region's text tokens decode to, in the pipeline's own call."""
    calls.clear()
    with apply_layout(pipe, prompt, regions, self_weight=0, active=1.0, **options):
        latents(pipe, prompt, steps=1)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=TOKENS, truncation=True).input_ids
    found = []
    for bit in range(len(regions)):
        of_region = [token for token, word in zip(ids, calls[0][4][0].tolist()) if word == 1 << bit]
        found.append(pipe.tokenizer.decode(of_region).strip())
    return found


def text_of(pipe: object, prompt: str, phrase: str) -> Tensor:
    """The text tokens that the U-Net gets for a prompt."""
    texts: list[Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _unet, args: texts.append(args[2][1]))
    with apply_layout(pipe, prompt, [(phrase, BOX)]):
        latents(pipe, prompt, steps=1)
    handle.remove()
    return texts[0]


def deep(model: str) -> object:
    """A pipeline whose CLIP encoders have layers to skip."""
    pipe = tiny_pipeline(MODELS[model][0])
    for suffix in ["", "_2"][: 1 if model in ("sd", "flux") else 2]:
        encoder = getattr(pipe, f"text_encoder{suffix}")
        encoder.config.num_hidden_layers = 4
        torch.manual_seed(0)
        setattr(pipe, f"text_encoder{suffix}", type(encoder)(encoder.config).eval())
    return pipe


def encoded(pipe: object, text: str, **options: object) -> Tensor:
    """The tokens of a prompt as the pipeline encodes it."""
    known = inspect.signature(pipe.encode_prompt).parameters
    given = {
        "prompt_2": None,
        "prompt_3": None,
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        **options,
    }
    with torch.no_grad():
        return pipe.encode_prompt(
            text, **{name: value for name, value in given.items() if name in known}
        )[0]


def told(pipe: object, layout: object, run: object, regions: object = REGIONS) -> list[str]:
    """The words of a block around a run."""
    with warnings.catch_warnings(record=True) as all_of_them:
        warnings.simplefilter("always")
        with apply_layout(pipe, layout, regions):
            run()
    messages = [str(warning.message) for warning in all_of_them]
    return [message for message in messages if "the layout's" in message]
