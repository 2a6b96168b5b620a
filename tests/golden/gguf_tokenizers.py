#!/usr/bin/env python3
"""usage: gguf_tokenizers.py > gguf_tokenizers.json      needs tokenizers

Small byte-level BPE tokenizers, cut as the original tokenizer.json files of gpt2, SmolLM2, Qwen2 and Llama 3 cut their
text, with what a GGUF holds of them (tokens, kinds, merges) and the ids that the `tokenizers` library gives. Text is not
normalized: a GGUF does not say that Qwen2's own tokenizer.json asks for NFC, and llama.cpp's ids are those without it.
"""
import json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
byte_level = lambda use_regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
split = lambda regex: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level(False)])
KINDS = {
    "gpt-2": (byte_level(True), False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]), False),
    "qwen2": (split(QWEN2), False),
    "llama-bpe": (split(LLAMA3), True),
}
TEXTS = [
    "", " ", "Hello, world!", "I'm sure they'LL say it's 'fine' — don't you?", "3.14159 and 1234567 in 2024",
    "  two  spaces   three\t\ttabs \n\n newlines\r\n\r\n end ", "naïve café, e\u0301 and é, Å and A\u030a",
    "日本語のテキスト、中文文本。", "한국어 텍스트 🙂👩‍👩‍👧‍👦🇩🇪", "שלום עולם مرحبا", "def f(x):\n    return x**2  # ²½Ⅷ٣",
    "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|><|im_start|>", "a<tool>b <tool> c", "<|im_start", "\u00a0\u200b\u3000x",
    "aaaaaaaaaaaaaaaa", "the the The THE", "!!!???...,,,", "\x00\x01\x7f",
]
CORPUS = TEXTS + ["the cat and the other hat, 1234 5678", "it's that she'll they're don't", "return value for the text"] * 5


def build(name):
    pre, ignore_merges = KINDS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=360, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    specials, users = ["<|im_start|>", "<|im_end|>"], ["<tool>"]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in users])
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    merges = [" ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    # Rows of the embedding beyond the tokenizer, as Qwen's files have them.
    kinds = [3 if t in specials else 4 if t in users else 1 for t in tokens] + [5, 5]
    return {"pre": name, "tokens": tokens + ["[PAD1]", "[PAD2]"], "kinds": kinds, "merges": merges,
            "ids": [tokenizer.encode(t, add_special_tokens=False).ids for t in TEXTS]}


print(json.dumps({"texts": TEXTS, "tokenizers": [build(name) for name in KINDS]}, ensure_ascii=True))
