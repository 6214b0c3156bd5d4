import type { TokenizerArtifact } from "./tokenizer-artifact.ts";

/**
 * A tokenizer without a model: token id = byte, and three special tokens above them. It is a byte-level BPE without
 * merges, so it takes the same path as a real one. For the echo engine.
 */
export const BYTE_TOKENS = { imStart: 256, imEnd: 257, endOfText: 258, vocabularySize: 259 } as const;

const TEMPLATE =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}" +
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

export function byteArtifact(): TokenizerArtifact {
  const vocab: Record<string, number> = {};
  byteLevelCharacters().forEach((character, byte) => (vocab[character] = byte));
  const special = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
  return {
    version: 1,
    tokenizerJson: {
      version: "1.0",
      added_tokens: [
        { id: BYTE_TOKENS.imStart, content: "<|im_start|>", ...special },
        { id: BYTE_TOKENS.imEnd, content: "<|im_end|>", ...special },
        { id: BYTE_TOKENS.endOfText, content: "<|endoftext|>", ...special },
      ],
      normalizer: null,
      pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false },
      post_processor: null,
      decoder: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false },
      model: { type: "BPE", vocab, merges: [] },
    },
    chatTemplate: TEMPLATE,
    eosToken: "<|im_end|>",
    eosTokenIds: [BYTE_TOKENS.imEnd],
    addBosToken: false,
    addEosToken: false,
    source: "bytes",
  };
}

/** The printable character that stands for each byte in byte-level vocabularies (GPT-2's table), by byte. */
export function byteLevelCharacters(): string[] {
  const characters: string[] = [];
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    characters.push(String.fromCharCode(printable ? byte : next++));
  }
  return characters;
}
