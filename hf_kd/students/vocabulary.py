"""A smaller vocabulary: the tokens that a corpus uses, a tokenizer of them, and the way back.

What stays is enough for the corpus to be cut into the same tokens: WordPiece takes the longest match, which
is still there; Unigram takes the best path, which is still there and had no better rival; BPE needs the
merges inside each token, in their order, and meets no others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .depth import config_tree
from .memory import VOCABULARY

#: Columns that hold token ids.
ID_COLUMNS = ("input_ids", "decoder_input_ids", "labels")


def trim_vocabulary(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, ids: Iterable[Iterable[int]] = ()
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer of the tokens that some texts use.

    Special and other added tokens stay, and so do single bytes (byte-level BPE, byte fallback) and single
    ASCII characters, so that other texts are not lost.

    Args:
        tokenizer: A fast tokenizer whose model is WordPiece, BPE or Unigram.
        texts: The corpus.
        ids: More of it, that the tokenizer has cut already.

    Returns:
        The new tokenizer, which cuts the texts into the same tokens, and for each of its ids the id of that
        token in the old one: `vocab` of `init_student`.

    Raises:
        ValueError: If the tokenizer is of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no fast tokenizer, whose parts could be rebuilt")
    state = json.loads(backend.to_str())
    kind = state["model"].get("type")
    if kind not in _TRIM:
        raise ValueError(f"a tokenizer of kind {kind!r} is not known: use one of {', '.join(_TRIM)}")
    vocab = tokenizer.get_vocab()
    added = {entry["content"] for entry in state["added_tokens"]}
    used: set[int] = {i for row in ids for i in row}
    for text in texts:
        used.update(tokenizer(text)["input_ids"])
    tokens = {token for token, i in vocab.items() if i in used or token in added or _is_small(token, kind)}
    tokens |= _TRIM[kind].needs(state["model"], tokens)
    kept = sorted(vocab[token] for token in tokens)
    names = {i: token for token, i in vocab.items()}
    place = {names[old]: new for new, old in enumerate(kept)}
    _TRIM[kind].cut(state["model"], place)
    for entry in state["added_tokens"]:
        entry["id"] = place[entry["content"]]
    state["post_processor"] = _renumbered(state["post_processor"], place)
    if state.get("padding"):
        state["padding"]["pad_id"] = place[state["padding"]["pad_token"]]
    return _wrap(tokenizer, state), kept


def _is_small(token: str, kind: str) -> bool:
    """A byte, or an ASCII character, with or without the mark of a place in a word."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return True
    bare = token.removeprefix("##").removeprefix("\u2581")
    byte_like = kind == "BPE" and len(bare) == 1 and ord(bare) < 324  # the byte-level alphabet ends there
    return byte_like or (len(bare) == 1 and ord(bare) < 128)


class _WordPiece:
    @staticmethod
    def needs(model: dict[str, Any], _: set[str]) -> set[str]:
        return {model["unk_token"]} & set(model["vocab"])

    @staticmethod
    def cut(model: dict[str, Any], place: Mapping[str, int]) -> None:
        model["vocab"] = {token: place[token] for token in model["vocab"] if token in place}


class _Unigram:
    @staticmethod
    def needs(model: dict[str, Any], _: set[str]) -> set[str]:
        # The cost of an unknown character is measured from the least likely token.
        least = min(model["vocab"], key=lambda entry: entry[1])[0]
        unknown = model.get("unk_id")
        return {least} | ({model["vocab"][unknown][0]} if unknown is not None else set())

    @staticmethod
    def cut(model: dict[str, Any], place: Mapping[str, int]) -> None:
        unknown = model.get("unk_id")
        name = None if unknown is None else model["vocab"][unknown][0]
        entries = sorted((e for e in model["vocab"] if e[0] in place), key=lambda entry: place[entry[0]])
        if [place[entry[0]] for entry in entries] != list(range(len(entries))):
            raise ValueError("an added token stands between the tokens of a Unigram model: not supported")
        model["vocab"] = entries
        model["unk_id"] = None if name is None else place[name]


class _BPE:
    @staticmethod
    def needs(model: dict[str, Any], tokens: set[str]) -> set[str]:
        """The parts that each token is merged from."""
        ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
        found = {model["unk_token"]} if model.get("unk_token") else set()
        for token in tokens & set(model["vocab"]):
            found.update(part for pair in _merges_in(token, ranks) for part in (*pair, "".join(pair)))
        return found & set(model["vocab"])

    @staticmethod
    def cut(model: dict[str, Any], place: Mapping[str, int]) -> None:
        ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
        wanted = {pair for token in place for pair in _merges_in(token, ranks)}
        model["merges"] = [merge for merge in model["merges"] if _pair(merge) in wanted]
        model["vocab"] = {token: place[token] for token in model["vocab"] if token in place}


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _merges_in(token: str, ranks: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges that BPE makes within one token, in their order."""
    parts, made = list(token), []
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:], strict=False))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        made.append(best)
        i = pairs.index(best)
        parts[i : i + 2] = ["".join(best)]
    return made


_TRIM: dict[str, Any] = {"WordPiece": _WordPiece, "BPE": _BPE, "Unigram": _Unigram}


def _renumbered(part: Any, place: Mapping[str, int]) -> Any:
    """A post-processor with the new ids of the special tokens that it adds."""
    if isinstance(part, dict):
        new = {key: _renumbered(value, place) for key, value in part.items()}
        if "ids" in part and "tokens" in part:
            new["ids"] = [place[token] for token in part["tokens"]]
        return new
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int:
            return [part[0], place[part[0]]]
        return [_renumbered(item, place) for item in part]
    return part


def _wrap(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    names = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "chat_template")
    options = {name: getattr(tokenizer, name, None) for name in names}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **{name: value for name, value in options.items() if value is not None},
        **tokenizer.special_tokens_map,
    )


def cut_config(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Set the size of the vocabulary and the ids of special tokens, and remember the map.

    Raises:
        ValueError: If ids repeat, don't exist, or a special token of the config is not kept.
    """
    sizes = [part for _, part in config_tree(config) if type(getattr(part, "vocab_size", None)) is int]
    if not sizes:
        raise ValueError(f"vocab: {type(config).__name__} has no vocabulary to cut")
    ids = [int(i) for i in kept]
    full = max(part.vocab_size for part in sizes)
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= full:
        raise ValueError(f"vocab: give ids from 0 to {full - 1}, each once; got {len(ids)} of them")
    for part in sizes:
        part.vocab_size = len(ids)
    for _, part in config_tree(config):
        map_ids(part, ids)
    setattr(config, VOCABULARY, ids)


def map_ids(config: Any, kept: Sequence[int]) -> None:
    """Turn ids of special tokens in a config from the teacher's into the student's."""
    place = {old: new for new, old in enumerate(kept)}

    def mapped(name: str, value: Any) -> Any:
        if type(value) is int:
            if value >= 0 and value not in place:
                raise ValueError(f"vocab leaves out {name}={value}, which the model needs: add it")
            return place.get(value, value)
        return [mapped(name, item) for item in value] if isinstance(value, list) else value

    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and value is not None:
            setattr(config, name, mapped(name, value))
        elif name in ("suppress_tokens", "begin_suppress_tokens") and value:
            setattr(config, name, [place[i] for i in value if i in place])


def to_student(batch: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any] | None:
    """A batch of the teacher's ids in the student's; None where it has a token that the student has not."""
    place = torch.full((max(kept) + 1,), -1)
    place[torch.tensor(kept)] = torch.arange(len(kept))
    own = dict(batch)
    for name in ID_COLUMNS:
        ids = batch.get(name)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or (name == "labels" and ids.ndim < 2):
            continue
        inside = (ids >= 0) & (ids < len(place))
        new = place.to(ids.device)[ids.clamp(0, len(place) - 1)]
        if bool(((ids >= 0) & (~inside | (new < 0))).any()):
            return None
        own[name] = torch.where(ids < 0, ids, new)
    return own
