"""CLIP's byte-pair tokenizer: text → token ids, equal to those of transformers' CLIPTokenizer.

    "A Dog's ball!"
      → normalize   a dog's ball!                    NFC, white space to one blank, lower case
      → pieces      a  dog  's  ball  !              contractions, runs of letters, single digits, runs of the rest
      → symbols     d o g</w>                        one per UTF-8 byte, the last one marked as the end of a word
      → merges      do g</w> → dog</w>               the learnt pairs, most frequent first, until none applies
      → ids         320 1929 568 2420 256

Byte-pair encoding: Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016
(arXiv 1508.07909).  Bytes as its alphabet: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

from ..errors import BundleError, one_line
from ..fields import check_text
from .normalization import BLANKS, normalize
from .vocabulary import Vocabulary, read_folder, read_vocabulary

END_OF_WORD = "</w>"
CACHED_WORDS, CACHED_LENGTH = 1 << 14, 64  # how many words are remembered, and the longest of them in characters


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each of the 256 bytes: itself where Latin-1 prints it, else from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


ALPHABET = byte_alphabet()
BYTES = {char: bytes([byte]) for byte, char in ALPHABET.items()}


class Kinds(dict[int, str]):
    """Code point → one character that tells PIECE what it is: L a letter, N a number, blank, or ! anything else.

    A str.translate table that fills itself.  Python's re knows no \\p{L}, hence this detour."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))[0]
        self[code] = " " if BLANKS.match(chr(code)) else category if category in "LN" else "!"
        return self[code]


# Characters that PIECE must tell apart stand for themselves.
KINDS = Kinds({ord(c): c for c in "abcdefghijklmnopqrstuvwxyz'<|>"})
PIECE = re.compile(r"(<\|)((?:start|end)oftext)(\|>)|('(?:s|t|re|ve|m|ll|d)|[a-zL]+|N|[!'<|>]+)")


def pieces(text: str) -> Iterator[str]:
    """Cut normalised text into the runs within which pairs merge; white space falls out.

    "<|startoftext|>" comes in three: it gets here only where it is not a special token (because it was typed in
    capitals, say), and then the reference cuts it out as a whole before it cuts between letters and the rest."""
    for match in PIECE.finditer(text.translate(KINDS)):
        for group in range(1, 5) if match.lastindex == 3 else (4,):
            if match.start(group) >= 0:
                yield text[match.start(group) : match.end(group)]


def symbols(piece: str) -> list[str]:
    """A piece as BPE starts from it: one symbol per UTF-8 byte, the last marked as the end of a word."""
    word = list(piece.encode().decode("latin-1").translate(ALPHABET))
    word[-1] += END_OF_WORD
    return word


def spell(symbol: str) -> bytes:
    """The UTF-8 bytes that a symbol stands for, with a blank at the end of a word."""
    return b"".join(BYTES.get(char) or char.encode() for char in symbol.replace(END_OF_WORD, " "))


def merge(word: list[str], merges: Sequence[str], ranks: Mapping[str, int]) -> list[str]:
    """Join the symbols of one word by the learnt `merges` ("left right", first ones first), until none applies.

    The textbook loop, "find the best pair, join it everywhere, look again", is quadratic in the length of a word.  Here
    the places of every pair are kept by rank, and a join only looks at its two new neighbours: n symbols cost at most
    n joins, 3n look-ups in `ranks` and O(n log n) time, however hostile the word.  Relies on what training guarantees:
    one merge makes a token, and it ranks before those that use the token.
    """
    pairs: defaultdict[str, list[int]] = defaultdict(list)  # each pair → where it starts
    for place, pair in enumerate(map(" ".join, pairwise(word))):
        pairs[pair].append(place)
    places = {ranks[pair]: starts for pair, starts in pairs.items() if pair in ranks}
    queue = list(places)
    heapify(queue)
    # A symbol has as many characters as bytes, so its right neighbour starts that many places on.
    at = [*word, *[""] * len(END_OF_WORD), ""]  # the symbol that starts at each place; "" inside one and past the end
    left = list(range(-1, len(at) - 1))  # where the symbol starts that ends before each place; at[-1] is "", too

    def note(rank: int, start: int) -> None:
        if rank not in places:
            places[rank] = []
            heappush(queue, rank)
        places[rank].append(start)

    while queue:
        rank = heappop(queue)
        first, second = merges[rank].split(" ")
        joined, middle, end = first + second, len(first), len(first) + len(second)
        joins = []
        for place in places.pop(rank):  # ascending: all pairs of two symbols are noted when the later one is made
            if at[place] == first and at[place + middle] == second:  # else an earlier join took one of them
                at[place], at[place + middle], left[place + end] = joined, "", place
                joins.append(place)
        for place in joins:
            if (new := ranks.get(f"{joined} {at[place + end]}")) is not None:
                note(new, place)
            before = left[place]
            if at[before] != joined and (new := ranks.get(f"{at[before]} {joined}")) is not None:
                note(new, before)  # two of `joined` side by side are noted from the left one
    return [symbol for symbol in at if symbol]


class AddedTokens:
    """Finds added tokens in text: the leftmost first, of several there the longest.

    `whole_words` passes over those that are part of a longer word."""

    def __init__(self, ids: Mapping[str, int], *, whole_words: bool = False) -> None:
        self.ids = ids
        longest_first = sorted(ids, key=len, reverse=True)
        patterns = [_whole(token) if whole_words else re.escape(token) for token in longest_first]
        self._pattern = re.compile(f"({'|'.join(patterns)})") if ids else None

    def split(self, text: str) -> Iterator[str | int]:
        """The ids of added tokens, and the text before, between and after them."""
        for i, part in enumerate(self._pattern.split(text) if self._pattern else [text]):
            yield self.ids[part] if i % 2 else part


def _whole(token: str) -> str:
    """A pattern for `token` where neither of its ends continues a word."""
    before, after = r"(?<!\w)" if token[0].isalnum() else "", r"(?!\w)" if token[-1].isalnum() else ""
    return before + re.escape(token) + after


class Tokenizer:
    """Text → token ids.  Immutable once made, and safe to use from several threads.

    `bos_id` and `eos_id` frame a prompt, `pad_id` fills it up (SD 1.x pads with the end token, SD 2.x with "!"), and
    `unk_id` stands for bytes that the vocabulary lacks.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        ids, added = vocabulary.ids, vocabulary.added
        self._ids, self._merges = ids, vocabulary.merges
        self._ranks = dict(zip(self._merges, range(len(self._merges)), strict=True))
        roles = (vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.unk)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (ids[token] for token in roles)
        self._typed = AddedTokens({t.content: ids[t.content] for t in added if not t.normalized})
        self._normalized = AddedTokens({normalize(t.content): ids[t.content] for t in added if t.normalized})
        self._words, self._spelt = AddedTokens({}), dict[int, bytes]()
        self._remembered_word = lru_cache(CACHED_WORDS)(self._word)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer folder as transformers and diffusers write it."""
        return cls.from_bytes(read_folder(Path(folder)))

    @classmethod
    def from_bytes(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """File name → content of a tokenizer folder; names other than `vocabulary.FILES` are ignored."""
        return cls(read_vocabulary(files))

    def check_ids(self, limit: int) -> None:
        """BundleError if a token of the vocabulary has an id from `limit` on, which the text encoder does not take.

        Tokens that were added beside the vocabulary may: no prompt need hold them."""
        if max(self._ids.values()) < limit:
            return
        own = {**self._ids}
        for added in (self._typed, self._normalized):
            for token in added.ids:
                own.pop(token, None)
        token = max(own, key=own.__getitem__)
        if own[token] >= limit:
            what = f"tokenizer: id of '{one_line(token, 30)}'"
            raise BundleError(what, got=own[token], accepted=f"0 … {limit - 1}, as the text encoder has embeddings for")

    def with_words(self, ids: Mapping[str, int]) -> Tokenizer:
        """This tokenizer, with further words as single tokens: word → id.

        They are found whatever their case, but not within longer words: not `sks` in `asks`."""
        extended = copy(self)
        extended._words = AddedTokens({normalize(word): ids[word] for word in ids}, whole_words=True)
        extended._spelt = {ids[word]: f"{word} ".encode() for word in ids}
        return extended

    def encode(self, text: str) -> list[int]:
        """`text` as token ids, without the begin and end tokens.  UsageError for non-text and lone surrogates."""
        check_text(text)
        ids: list[int] = []
        for part in self._split(text):
            ids.extend([part] if isinstance(part, int) else self._plain(part))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids as readable text: lower case, one blank after each word."""
        data = b"".join(self._spelt[index] if index in self._spelt else spell(self._tokens[index]) for index in ids)
        return data.decode("utf-8", "replace").strip()

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {index: token for token, index in self._ids.items()}

    def _split(self, text: str) -> Iterator[str | int]:
        """The ids of added tokens, and the text between them, normalised."""
        for typed in self._typed.split(text):
            if isinstance(typed, int):
                yield typed
                continue
            for part in self._normalized.split(normalize(typed)):
                yield from [part] if isinstance(part, int) else self._words.split(part)

    def _plain(self, text: str) -> Iterator[int]:
        """Ids of normalised text that holds no added token."""
        for piece in pieces(text):
            yield from self._remembered_word(piece) if len(piece) <= CACHED_LENGTH else self._word(piece)

    def _word(self, piece: str) -> tuple[int, ...]:
        return tuple(map(self._id, merge(symbols(piece), self._merges, self._ranks)))

    def _id(self, symbol: str) -> int:
        """A symbol's id.  A byte may be unknown; a join that is shows that vocabulary and merges do not match."""
        if symbol in self._ids:
            return self._ids[symbol]
        if len(symbol.removesuffix(END_OF_WORD)) > 1:
            raise BundleError(f"tokenizer: merges.txt makes the token {symbol!r}, which vocab.json lacks")
        return self.unk_id
