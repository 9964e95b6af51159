"""From a request's prompts to what the UNet attends to, with the words that a bundle has learnt beside its own."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from .adapters.textual_inversion import load_textual_inversion
from .bundle.bundle import Bundle
from .bundle.safetensors_file import SafeTensors
from .engines.engines import Engines
from .errors import UsageError
from .networks.text_encoder import TOKEN_EMBEDDING
from .networks.unet import most_positions
from .prompt import PromptEmbeddings, TokenEmbeddings, TokenizedPrompts, Tokenizer, encode_prompts, tokenize_prompts
from .prompt.chunks import LENGTH
from .request import Request
from .tensor import Array


class PromptEncoder:
    """A bundle's tokenizer and text encoder; `inversions` are the words of textual inversions, each with its vectors
    (k, D)."""

    def __init__(self, bundle: Bundle, engines: Engines, tokenizer: Tokenizer) -> None:
        self._bundle, self._engines, self.tokenizer = bundle, engines, tokenizer
        self.inversions: dict[str, Array] = {}

    def learn(self, path: str | Path, token: str | None = None) -> str:
        """Learn the word of a file, see `Pipeline.load_textual_inversion`."""
        if not isinstance(path, (str, Path)):
            accepted = "the path of a .safetensors file"
            raise UsageError("textual inversion", got=type(path).__name__, accepted=accepted)
        word, vectors = load_textual_inversion(Path(path), token)
        inversions = {**self.inversions, word: vectors}
        if len(inversions) == len(self.inversions):
            raise UsageError("textual inversion: word", got=word, accepted="a word that is not taken")
        TokenEmbeddings(self._table(), inversions)  # checks them together
        self.inversions = inversions
        return word

    def tokenize(self, request: Request, *, negative: bool) -> TokenizedPrompts:
        """The request's prompts and, with `negative`, its negative prompts.  UsageError, as `tokenize_prompts`."""
        return tokenize_prompts(
            self.tokenizer,
            request.prompts,
            request.negative_prompts if negative else None,
            weighting=request.prompt_weighting,
            truncate=request.truncate,
            embeddings=self._learnt(),
            most_chunks=most_positions(self._engines.engine("unet")) // LENGTH,
        )

    def encode(self, request: Request, *, negative: bool) -> PromptEmbeddings:
        """The same, encoded."""
        learnt = self._learnt()
        text_encoder = self._engines.engine("text_encoder", "embeds" if learnt else "plain")
        return encode_prompts(text_encoder, self.tokenizer, self.tokenize(request, negative=negative), learnt)

    def _learnt(self) -> TokenEmbeddings | None:
        return TokenEmbeddings(self._table(), self.inversions) if self.inversions else None

    def _table(self) -> Array:
        """(V, D), the text encoder's own table, memory-mapped."""
        return self._weights[TOKEN_EMBEDDING]

    @cached_property
    def _weights(self) -> SafeTensors:
        return self._bundle.tensors(self._bundle.component("text_encoder").weights or "")
