import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { byteArtifact } from "../../src/model/index.ts";

/** A model folder of which only the tokenizer is there: bytes are tokens. */
export function byteModelFolder(root: string): string {
  const folder = join(root, "bytes-model");
  const { tokenizerJson, chatTemplate } = byteArtifact();
  mkdirSync(folder);
  writeFileSync(join(folder, "tokenizer.json"), JSON.stringify(tokenizerJson));
  const config = { bos_token: "<|endoftext|>", eos_token: "<|im_end|>", chat_template: chatTemplate };
  writeFileSync(join(folder, "tokenizer_config.json"), JSON.stringify(config));
  return folder;
}
