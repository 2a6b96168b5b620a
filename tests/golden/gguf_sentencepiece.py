#!/usr/bin/env python3
"""usage: gguf_sentencepiece.py > gguf_sentencepiece.json      needs sentencepiece

Small SentencePiece BPE models, set up as Llama 2 has it (a space before the text) and as Gemma has it (none; runs of spaces
and markup as tokens of the user), with what a GGUF holds of them (tokens, scores, kinds) and the ids that the library gives.
"""
import io
import json
import sentencepiece as spm

TEXTS = [
    "", " ", "Hello, world!", "I'm sure they'LL say it's 'fine' — don't you?", "3.14159 and 1234567 in 2024",
    "  two  spaces   three\t\ttabs \n\n newlines\r\n\r\n end ", "naïve café, e\u0301 and é, Å and A\u030a",
    "日本語のテキスト、中文文本。", "한국어 텍스트 🙂👩‍👩‍👧‍👦🇩🇪", "שלום עולם مرحبا", "def f(x):\n    return x**2  # ²½Ⅷ٣",
    "a▁b", "<0x41>", "\u00a0\u200b\u3000x", "aaaaaaaaaaaaaaaaaaa aaaaa aaa", "the the The THE", "!!!???...,,,",
    "\x00\x01\x7f", "                          x       y", "ababababab bababa abaab",
]
USER_TEXTS = ["<table>a</table> <tr>  b", "x   <table>    y\n\n\n\nz"]
CORPUS = TEXTS + ["the cat and the other hat, 1234 5678", "it's that she'll they're don't", "return value for the text",
                  "ababab aaaa aaaaaa the"] * 5


def build(name, prefix, users):
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([t.replace("\x00", "").replace("\n", " ") for t in CORPUS if t.strip() and max(t) < "\u0600"]), model_writer=out,
        model_type="bpe", vocab_size=420, byte_fallback=True, character_coverage=1.0, add_dummy_prefix=prefix,
        remove_extra_whitespaces=False, normalization_rule_name="identity", user_defined_symbols=users, pad_id=-1,
        split_by_whitespace=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
    model = spm.SentencePieceProcessor(model_proto=out.getvalue())
    kind = lambda i: (2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i)
                      else 4 if model.id_to_piece(i) in users else 5 if model.is_unused(i) else 1)
    ids = range(model.vocab_size())
    kinds = [kind(i) for i in ids]
    # Converters to GGUF write the spaces of a user's token as spaces.
    tokens = [model.id_to_piece(i).replace("▁", " ") if kinds[i] == 4 else model.id_to_piece(i) for i in ids]
    texts = TEXTS + ([] if prefix else USER_TEXTS)
    return {"name": name, "add_space_prefix": prefix, "tokens": tokens, "kinds": kinds,
            "scores": [model.get_score(i) for i in ids], "texts": texts, "ids": [model.encode(t) for t in texts]}


print(json.dumps([build("llama", True, []),
                  build("gemma", False, ["<table>", "</table>", "<tr>", "▁▁", "▁▁▁▁", "\n", "\n\n"])], ensure_ascii=True))
