import { readFileSync, statSync } from "node:fs";
import { DynamoError } from "../errors/index.ts";
import { CATALOGUE } from "./model-catalogue.ts";
import type { TokenizerArtifact } from "./tokenizer-artifact.ts";

/** A template is a page of text; llama.cpp and we stop at this. */
const MAX_TEMPLATE_BYTES = 1024 * 1024;

export interface ChosenTemplate {
  readonly artifact: TokenizerArtifact;
  readonly from: "model file" | "catalogue" | "custom file" | "none";
}

/**
 * The artifact with the chat template that will be used: the operator's file, else what our catalogue says of this very
 * model file (known by its size and template), else the model's own. Throws `model-file-invalid`.
 */
export function chooseChatTemplate(
  artifact: TokenizerArtifact,
  modelPath: string,
  customPath?: string,
): ChosenTemplate {
  if (customPath !== undefined)
    return { artifact: { ...artifact, chatTemplate: readTemplate(customPath) }, from: "custom file" };
  if (artifact.chatTemplate === undefined) return { artifact, from: "none" };
  const bytes = statSync(modelPath).size;
  const known = CATALOGUE.find((model) => model.bytes === bytes)?.chatTemplate;
  if (known === undefined || known === artifact.chatTemplate) return { artifact, from: "model file" };
  return { artifact: { ...artifact, chatTemplate: known }, from: "catalogue" };
}

function readTemplate(path: string): string {
  try {
    if (statSync(path).size > MAX_TEMPLATE_BYTES) throw new Error(`over the limit of ${MAX_TEMPLATE_BYTES} bytes`);
    return readFileSync(path, "utf8");
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new DynamoError("model-file-invalid", `chat template ${path}: ${why}`, { cause });
  }
}
