import { createHash } from "node:crypto";
import type { Logger } from "../observability/index.ts";
import {
  artifactFromPath,
  byteArtifact,
  chooseChatTemplate,
  encodeArtifact,
  vocabularySizeOf,
  type TokenizerArtifact,
} from "../model/index.ts";
import type { WorkerConfig } from "./config.ts";

/**
 * What a worker tells of its model's tokenizer: the bytes that frontends fetch, and what its card says about them. Reading
 * it takes up to half a second of CPU and 10 MB for a vocabulary of 150,000 tokens, so workers that share a process share
 * one: read a hundred times it kept the loop of a hundred mock workers busy for 40 s while the first of them served.
 */
export interface ServedTokenizer {
  readonly bytes: Uint8Array;
  readonly sha256: string;
  /** Highest token id plus one. */
  readonly vocabularySize: number;
  readonly bosTokenId: number | undefined;
  readonly hasChatTemplate: boolean;
}

/** Async so that it runs beside an engine's start, and so that its failure is one of both. Throws `model-file-invalid`. */
export async function loadServedTokenizer(
  config: Pick<WorkerConfig, "engine" | "chatTemplatePath">,
  logger: Logger,
): Promise<ServedTokenizer> {
  const artifact = loadArtifact(config, logger);
  const bytes = encodeArtifact(artifact);
  return {
    bytes,
    sha256: createHash("sha256").update(bytes).digest("hex"),
    vocabularySize: vocabularySizeOf(artifact),
    bosTokenId: artifact.bosTokenId,
    hasChatTemplate: artifact.chatTemplate !== undefined,
  };
}

function loadArtifact(
  { engine, chatTemplatePath }: Pick<WorkerConfig, "engine" | "chatTemplatePath">,
  logger: Logger,
): TokenizerArtifact {
  if (engine.modelPath === undefined) return byteArtifact();
  const own = artifactFromPath(engine.modelPath);
  const { artifact, from } = chooseChatTemplate(own, engine.modelPath, chatTemplatePath);
  if (from !== "model file") logger.info(`chat template: ${from}`);
  return artifact;
}
