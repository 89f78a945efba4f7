"""A model that says what it is given: its weights make each token follow from the one before it.

All layers add nothing, so that the last hidden state is the last token's row of the table, and the
head knows which token comes after it. An answer is a chain of tokens that nothing else has. Which
one begins is said by the last token of the prompt, which the chat template chooses: spaces that a
reader of the prompt overlooks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from checkpoints import Kind, random_weights, text_config
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

NUM_LEARNT = 1500  # tokens of text
SPECIALS = ("<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
END = "<|im_end|>"
SPACE = "\u2003"
PLAIN = "plain"  # what it says where nothing is chosen
MAX_PIECE = 12  # characters
SILENT = re.compile(r"(o_proj|out_proj|down_proj)(\.weight)?$")


def write_scripted(
    folder: Path, template: str, scripts: Mapping[str, str], special_tags: bool = False
) -> Path:
    """A model folder.

    Args:
        folder: where it goes.
        template: a chat template with the word TRIGGER where it opens an answer, and AGAIN there in
            earlier answers.
        scripts: what it can say, by name; one of them is `PLAIN`.
        special_tags: the tags are special tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, chains = _tokenizer(scripts, special_tags)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    names = list(scripts)
    text = template.replace("TRIGGER", _trigger(names, "messages[-1]"))
    text = text.replace("AGAIN", _trigger(names, "loop.previtem"))
    (folder / "chat_template.jinja").write_text(text)
    size = 16 + max(tokenizer.get_vocab().values())  # padded, as published tables are
    sizes = {
        "vocab_size": size,
        "eos_token_id": tokenizer.token_to_id(END),
        "max_position_embeddings": 1 << 17,
    }
    _write_weights(folder, Kind(moe=False, sizes=sizes), chains, size)
    return folder


def _trigger(names: Sequence[str], last: str) -> str:
    """Chooses a script: `[[name]]` in the last message; else by what was said and can be called."""
    widths = json.dumps({name: 2 + number for number, name in enumerate(names)})
    lines = [
        f"{{%- set last = {last} %}}",
        "{%- set ns = namespace(name='plain') %}",
        "{%- if last.role == 'tool' %}{%- set ns.name = 'done' %}",
        "{%- elif tools %}{%- set ns.name = 'call' %}{%- endif %}",
        f"{{%- for name in {json.dumps(list(names))} %}}",
        "{%- if '[[' + name + ']]' in text_of(last.content) %}",
        "{%- set ns.name = name %}{%- endif %}{%- endfor %}",
        f"{{{{- '{SPACE}' * {widths}[ns.name] }}}}",
    ]
    return "\n".join(lines)


def _tokenizer(scripts: Mapping[str, str], special_tags: bool) -> tuple[Tokenizer, list[list[int]]]:
    """The tokenizer, and for each script its tokens: those that begin it, then what it says."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.train_from_iterator(
        [Path(json.__file__).read_text(), Path(re.__file__).read_text()],
        trainers.BpeTrainer(
            vocab_size=NUM_LEARNT,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    data = json.loads(learnt.to_str())["model"]
    vocab: dict[str, int] = data["vocab"]
    chains = []
    for text in scripts.values():
        pieces = list(_pieces(text, vocab))
        for piece in pieces:
            vocab[piece] = len(vocab)
        chains.append([vocab[piece] for piece in pieces])
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in data["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.add_tokens([AddedToken(tag, special=special_tags, normalized=False) for tag in TAGS])
    triggers = [SPACE * (2 + number) for number in range(len(scripts))]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in triggers])
    end = tokenizer.token_to_id(END)
    begun = [tokenizer.token_to_id(text) for text in triggers]
    return tokenizer, [[first, *ids, end] for first, ids in zip(begun, chains, strict=True)]


def _pieces(text: str, known: Mapping[str, int]) -> Iterator[str]:
    """The text as new tokens, in the letters of byte-level BPE; each as short as it may be."""
    letters = "".join(
        piece
        for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    )
    used, start = set(known), 0
    while start < len(letters):
        end = start + 1
        while end < len(letters) and letters[start:end] in used:
            end += 1
        piece = letters[start:end]
        if letters[start:end] in used or letters[end:] in used:
            piece = letters[start:]  # what is left is no new token
        assert piece not in used, text
        used.add(piece)
        yield piece
        start += len(piece)


def _write_weights(folder: Path, kind: Kind, chains: list[list[int]], size: int) -> None:
    config = text_config(kind)
    weights = random_weights(kind, config, 0)
    generator = torch.Generator().manual_seed(0)
    width = config["hidden_size"]
    table = torch.randn(size, width, generator=generator).sign()
    known = {token for chain in chains for token in chain}
    other = torch.ones(width)
    table[[token for token in range(size) if token not in known]] = other
    head = torch.zeros(size, width)
    for chain in chains:
        for token, after in pairwise(chain):
            head[after] += table[token]
    head[chains[0][1]] += other
    for name, value in weights.items():
        if SILENT.search(name):
            value.zero_()
        elif name.endswith("embed_tokens.weight"):
            weights[name] = table
        elif name.endswith("lm_head.weight"):
            weights[name] = head
        elif re.search(r"(?<!mtp\.)norm\.weight$", name) and ".layers." not in name:
            value.zero_()
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors"
    )
    wrapped = {"model_type": "qwen3_5", "text_config": config, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(wrapped))
