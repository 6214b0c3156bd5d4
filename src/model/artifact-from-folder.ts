import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { DynamoError } from "../errors/index.ts";
import { artifactFromGguf } from "./artifact-from-gguf.ts";
import type { HfTokenizerJson } from "./hf-tokenizer.ts";
import { ARTIFACT_LIMITS, checkArtifact, type TokenizerArtifact } from "./tokenizer-artifact.ts";
import { checkTokenizerJson } from "./check-tokenizer.ts";

/**
 * The tokenizer of a model folder as the Hugging Face hub lays it out: `tokenizer.json`, and if present
 * `tokenizer_config.json`, `generation_config.json` and `chat_template.jinja`. Throws `model-file-invalid`.
 */
export function artifactFromFolder(folder: string): TokenizerArtifact {
  const path = join(folder, "tokenizer.json");
  const tokenizerJson = readJson(path);
  if (tokenizerJson === undefined) throw new DynamoError("model-file-invalid", `${path}: no such file`);
  for (const step of ["normalizer", "pre_tokenizer", "post_processor", "decoder"]) tokenizerJson[step] ??= null;
  tokenizerJson.added_tokens ??= [];
  const model = tokenizerJson.model as { type?: unknown; merges?: unknown } | null | undefined;
  // Files from before the field existed have no type; only BPE has merges.
  if (typeof model === "object" && model?.type === undefined && model?.merges !== undefined) model.type = "BPE";
  checkTokenizerJson(tokenizerJson, path);
  const config = readJson(join(folder, "tokenizer_config.json")) ?? {};
  const generation = readJson(join(folder, "generation_config.json")) ?? {};
  const idOf = tokenIds(tokenizerJson);
  const bosToken = tokenText(config.bos_token);
  const eosToken = tokenText(config.eos_token);
  const bosTokenId = bosToken === undefined ? undefined : idOf(bosToken);
  const eosTokenId = eosToken === undefined ? undefined : idOf(eosToken);
  const ends = new Set<number>();
  if (eosTokenId !== undefined) ends.add(eosTokenId);
  const listed = generation.eos_token_id;
  for (const id of Array.isArray(listed) ? (listed as unknown[]) : [listed]) if (typeof id === "number") ends.add(id);
  const chatTemplate = readText(join(folder, "chat_template.jinja")) ?? templateOf(config.chat_template);
  const framed = framedBy(tokenizerJson, bosToken, eosToken);
  return checkArtifact({
    version: 1,
    tokenizerJson,
    ...(chatTemplate === undefined ? {} : { chatTemplate }),
    ...(bosToken === undefined ? {} : { bosToken }),
    ...(eosToken === undefined ? {} : { eosToken }),
    ...(bosTokenId === undefined ? {} : { bosTokenId }),
    eosTokenIds: [...ends],
    addBosToken: bosTokenId !== undefined && framed.bos,
    addEosToken: eosTokenId !== undefined && framed.eos,
    source: "tokenizer.json",
  } satisfies TokenizerArtifact);
}

/**
 * Whether the post-processor puts the begin and end tokens round a text. It decides and not `add_bos_token` of the
 * configuration: that is the Python class's wish, which is written into the post-processor when the file is saved.
 */
function framedBy(
  json: HfTokenizerJson,
  bos: string | undefined,
  eos: string | undefined,
): { bos: boolean; eos: boolean } {
  const outer = json.post_processor;
  if (outer === null) return { bos: false, eos: false };
  const inner = outer.type === "Sequence" ? (outer.processors as readonly Record<string, unknown>[]) : [outer];
  const template = inner.find((step) => step.type === "TemplateProcessing");
  if (template === undefined || !Array.isArray(template.single)) return { bos: false, eos: false };
  const names = (template.single as unknown[]).map((part) => {
    const special = (part as { SpecialToken?: { id?: unknown } } | null)?.SpecialToken;
    return typeof special?.id === "string" ? special.id : undefined;
  });
  return { bos: bos !== undefined && names[0] === bos, eos: eos !== undefined && names.at(-1) === eos };
}

function tokenIds(json: HfTokenizerJson): (token: string) => number | undefined {
  return (token) => {
    const added = json.added_tokens.find(({ content }) => content === token);
    if (added !== undefined) return added.id;
    const { model } = json;
    if (model.type !== "Unigram") return Object.hasOwn(model.vocab, token) ? model.vocab[token] : undefined;
    const index = model.vocab.findIndex(([text]) => text === token);
    return index === -1 ? undefined : index;
  };
}

/** `"<s>"` or `{ "content": "<s>" }`. */
function tokenText(value: unknown): string | undefined {
  if (typeof value === "string") return value;
  const content = (value as { content?: unknown } | null | undefined)?.content;
  return typeof content === "string" ? content : undefined;
}

/** One template, or a list of named ones of which `default` is for chat. */
function templateOf(value: unknown): string | undefined {
  if (typeof value === "string") return value;
  if (!Array.isArray(value)) return undefined;
  const named = value as ({ name?: unknown; template?: unknown } | null)[];
  const chosen = named.find((one) => one?.name === "default");
  return typeof chosen?.template === "string" ? chosen.template : undefined;
}

function readJson(path: string): Record<string, unknown> | undefined {
  const text = readText(path);
  if (text === undefined) return undefined;
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === "object" && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  } catch (cause) {
    throw new DynamoError("model-file-invalid", `${path}: not JSON`, { cause });
  }
  throw new DynamoError("model-file-invalid", `${path}: expected an object`);
}

function readText(path: string): string | undefined {
  const info = statSync(path, { throwIfNoEntry: false });
  if (info === undefined) return undefined;
  if (info.size > ARTIFACT_LIMITS.bytes) {
    throw new DynamoError(
      "model-file-invalid",
      `${path}: ${info.size} bytes, over the limit of ${ARTIFACT_LIMITS.bytes}`,
    );
  }
  return readFileSync(path, "utf8");
}

/** The tokenizer of a GGUF file or of a model folder, whichever `path` is. Throws `model-file-invalid`. */
export function artifactFromPath(path: string): TokenizerArtifact {
  const isFolder = statSync(path, { throwIfNoEntry: false })?.isDirectory() === true;
  return isFolder ? artifactFromFolder(path) : artifactFromGguf(path);
}
