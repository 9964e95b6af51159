"""Prompts: text → tokens → chunks of 77 → the text encoder's hidden states.

vocabulary         the files of a tokenizer folder
tokenizer          text → token ids, CLIP's byte-pair encoding
weights            (word:1.3), [word], BREAK: AUTOMATIC1111's syntax
foreign            <lora:x:0.8>, [a:b:0.5], AND …: what is refused
chunks             77 tokens at a time
token_embeddings   words beside the checkpoint's own
encode             chunks → encoder_hidden_states
"""

from .chunks import Chunk, TokenizedPrompt
from .encode import PromptEmbeddings, TokenizedPrompts, encode_prompts, tokenize_prompts
from .token_embeddings import TokenEmbeddings
from .tokenizer import Tokenizer

__all__ = [
    "Chunk",
    "PromptEmbeddings",
    "TokenEmbeddings",
    "TokenizedPrompt",
    "TokenizedPrompts",
    "Tokenizer",
    "encode_prompts",
    "tokenize_prompts",
]
