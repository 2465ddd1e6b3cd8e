"""Streams of text: pieces joined are the decoding of all tokens, however tokens are cut and characters are spelt."""

import json
import random
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from transmamba_jax import data
from transmamba_jax.generate.text import TextStream

# Characters of 1, 2, 3 and 4 bytes, U+FFFD itself, combining marks, and runs of each.
TEXTS = (
    "天地玄黄宇宙洪荒",
    "aé€😀z",
    "😀😀😀",
    "naïve café",
    "x\N{REPLACEMENT CHARACTER}天\N{REPLACEMENT CHARACTER}",
    "e\u0301👩‍🚀!",
    "  two\n\n",
)


def _with_end(tokenizer: tokenizers.Tokenizer) -> data.Tokenizer:
    tokenizer.add_special_tokens([data.tokenizers.END_OF_DOCUMENT])
    return data.tokenizer_from_json(tokenizer.to_str())


def byte_level() -> data.Tokenizer:
    """Byte-level BPE whose merges join parts of different characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spell = lambda *parts: tuple("".join(_BYTE_CHARACTERS[byte] for byte in part) for part in parts)
    raw = "天地".encode()
    merges = [spell(raw[2:3], raw[3:4]), spell(raw[1:2], raw[2:4]), spell("😀".encode()[:1], "😀".encode()[1:2])]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_end(tokenizer)


def byte_fallback() -> data.Tokenizer:
    """SentencePiece's form: known words, a first space that is dropped, bytes for what is not in the vocabulary."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "e", "z", "天", "▁two"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_end(tokenizer)


def word_pieces() -> data.Tokenizer:
    words = ["[UNK]", "two", "##o", "a", "!", "天"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return _with_end(tokenizer)


def _byte_characters() -> dict[int, str]:
    """Byte-level BPE's alphabet: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()
TOKENIZERS = {
    "bytes": data.load_tokenizer("bytes"),
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "word_pieces": word_pieces(),
}


def released(text: TextStream, tokens: Sequence[int], block: int) -> str:
    """Add tokens in blocks, the last of which is not known to be the last, and join what is released."""
    pieces = [text.add(tokens[start : start + block]) for start in range(0, len(tokens), block)]
    return "".join([*pieces, text.add([], last=True)])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("block", range(1, 17))
def test_pieces_joined_are_the_decoding_of_all_tokens(name: str, block: int) -> None:
    tokenizer = TOKENIZERS[name]
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert released(TextStream(tokenizer), tokens, block) == tokenizer.decode(tokens)
        if name in ("bytes", "byte_level"):
            assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
def test_any_tokens_in_any_cuts_behind_any_prompt(name: str, data: st.DataObject) -> None:
    """Tokens as an untrained model samples them: parts of characters in any order, ids without a token."""
    tokenizer = TOKENIZERS[name]
    ids = st.integers(1, tokenizer.vocab_size + 40).filter(lambda index: index != tokenizer.end_of_document)
    prompt, tokens = data.draw(st.lists(ids, max_size=6)), data.draw(st.lists(ids, max_size=40))
    before, whole = tokenizer.decode_stable(prompt), tokenizer.decode([*prompt, *tokens])
    text, pieces = TextStream(tokenizer, prompt), [before]
    while tokens:
        count = data.draw(st.integers(1, 9))
        pieces.append(text.add(tokens[:count]))
        tokens = tokens[count:]
        assert whole.startswith("".join(pieces))
    assert "".join([*pieces, text.add([], last=True)]) == whole


def test_characters_come_out_when_their_last_byte_is_there() -> None:
    text = TextStream(TOKENIZERS["bytes"])
    pieces = [text.add([byte]) for byte in "aé€😀z".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "z"]
    broken = TextStream(TOKENIZERS["bytes"])
    assert broken.add([0xF0]) == ""
    assert broken.add([], last=True) == "\N{REPLACEMENT CHARACTER}"


def test_a_character_that_the_prompt_has_begun_is_whole() -> None:
    raw = "天".encode()
    text = TextStream(TOKENIZERS["bytes"], raw[:2])
    assert text.add(list(raw[2:])) == "天"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_kept_does_not_grow_with_the_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens, text, kept = tokenizer.encode("two a 天! " * 30), TextStream(tokenizer), []
    for token in tokens:
        text.add([token])
        kept.append(len(text._tokens))
    assert max(kept) < 12


@pytest.mark.parametrize("name", ["bytes", "byte_level"])
@pytest.mark.parametrize("block", range(1, 17))
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["宙"], "天地玄黄宇"),
        (["黄宇", "玄黄宇宙洪"], "天地玄"),  # the one that is complete first
        (["玄黄", "地玄黄"], "天"),  # complete together: the longer one
        (["黄天"], "天地玄黄宇宙洪荒"),
        (["荒"], "天地玄黄宇宙洪"),
        (["天"], ""),
    ],
)
def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(
    name: str, block: int, stop: list[str], expected: str
) -> None:
    tokenizer = TOKENIZERS[name]
    text = TextStream(tokenizer, stop=stop)
    assert released(text, tokenizer.encode(TEXTS[0]), block) == expected
    assert text.ended == (expected != TEXTS[0])
    assert text.add(tokenizer.encode("more"), last=True) == ("" if text.ended else "more")


def test_the_end_of_the_document_ends_the_text() -> None:
    for tokenizer in TOKENIZERS.values():
        text, end = TextStream(tokenizer), tokenizer.end_of_document
        tokens = tokenizer.encode("a 天")
        assert text.add([*tokens, end, *tokens]) == tokenizer.decode(tokens)
        assert text.ended
        assert text.add(tokens, last=True) == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop\[1\] is empty; it needs at least one character"):
        TextStream(TOKENIZERS["bytes"], stop=["a", ""])


def test_ids_without_a_token_decode_to_nothing() -> None:
    for tokenizer in TOKENIZERS.values():
        tokens = tokenizer.encode("a 天")
        padded = [
            index for token in tokens for index in (token, tokenizer.vocab_size + random.Random(token).randrange(99))
        ]
        assert tokenizer.decode(padded) == tokenizer.decode_stable(padded) == tokenizer.decode(tokens)


def test_the_form_of_byte_fallback_is_that_of_the_library() -> None:
    fallback = json.loads(TOKENIZERS["byte_fallback"].to_json())["decoder"]["decoders"]
    assert {"type": "ByteFallback"} in fallback
    # A run of bytes that is not UTF-8 becomes one U+FFFD per byte, its whole characters too.
    ids = TOKENIZERS["byte_fallback"].encode("é")
    assert TOKENIZERS["byte_fallback"].decode([*ids[-2:], ids[-2]]) == "\N{REPLACEMENT CHARACTER}" * 3
