"""Prompts: text → tokens → chunks of 77 → the text encoder's hidden states.

vocabulary         the files of a tokenizer folder
tokenizer          text → token ids, CLIP's byte-pair encoding
weights            (word:1.3), [word], BREAK: AUTOMATIC1111's syntax
chunks             77 tokens at a time
encode             chunks → encoder_hidden_states
"""

from ..adapters.textual_inversion import TokenEmbeddings, load_textual_inversion
from .chunks import Chunk, TokenizedPrompt
from .encode import PromptEmbeddings, encode_prompts
from .tokenizer import Tokenizer

__all__ = [
    "Chunk",
    "PromptEmbeddings",
    "TokenEmbeddings",
    "TokenizedPrompt",
    "Tokenizer",
    "encode_prompts",
    "load_textual_inversion",
]
