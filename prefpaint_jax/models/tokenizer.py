"""A CLIP tokenizer whose tokens are single bytes, for small models."""

import json


def byte_tokenizer(length: int = 77, pad_token: str = "<|endoftext|>") -> dict[str, bytes]:
  """Makes the files of a CLIP tokenizer without merges, whose tokens are single bytes.

  Args:
    length: number of tokens to which a text is padded or cut.
    pad_token: "!" for the second tokenizer of SDXL.

  Returns:
    File name -> content, for the folder `tokenizer/` of a pipeline.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in printable]
  # GPT-2's byte-level vocabulary writes bytes that do not print as characters from 256 on.
  symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
  marks = ["<|startoftext|>", "<|endoftext|>"]
  tokens = symbols + [symbol + "</w>" for symbol in symbols] + marks
  special = dict(zip(("bos_token", "eos_token"), marks, strict=True))
  special |= {"unk_token": marks[1], "pad_token": pad_token}
  config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
  config |= {"do_lower_case": True, "add_prefix_space": False, "errors": "replace"}
  to_bytes = lambda content: (json.dumps(content, ensure_ascii=False) + "\n").encode()
  return {
    "vocab.json": to_bytes({token: i for i, token in enumerate(tokens)}),
    "merges.txt": b"#version: 0.2\n",
    "special_tokens_map.json": to_bytes(special),
    "tokenizer_config.json": to_bytes(config),
  }
