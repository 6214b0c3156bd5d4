import type { EngineInfo } from "../engines/index.ts";
import { DynamoError } from "../errors/index.ts";
import { handoffConflict, isModelCard, type ModelCard, type WorkerRole } from "../protocol/index.ts";
import { watchCards } from "../runtime/component/index.ts";
import type { Discovery } from "../runtime/discovery/index.ts";

/**
 * What a worker finds out before it takes a role in disaggregated serving, so that a pair that cannot work is refused at
 * start with its reason and not found out by slow requests: its own engine, and each worker of the same model that is there.
 * Throws `invalid-config`.
 */
export async function checkRole(
  role: WorkerRole,
  card: ModelCard,
  info: EngineInfo,
  discovery: Discovery,
  namespace: string,
): Promise<void> {
  if (role === "agg") return;
  if (info.blockBytes === 0 && info.kvConnector === undefined) {
    throw refused(role, `the ${info.engine} engine cannot export or import KV blocks`);
  }
  for (const other of await cardsOf(card.name, discovery, namespace)) {
    if (other.role === "agg" && role === "decode") continue;
    const conflict = handoffConflict(other, card);
    if (conflict !== undefined) throw refused(role, conflict);
    if (role === "decode") refuseShortMemory(role, card, other);
    else if (other.role === "decode") refuseShortMemory(role, other, card);
  }
}

/** Whatever the other worker takes must fit the decode worker, whichever of the two comes later. */
function refuseShortMemory(role: WorkerRole, decode: ModelCard, other: ModelCard): void {
  if (other.contextLength <= decode.contextLength) return;
  const tokens = decode.totalBlocks * decode.blockSizeTokens;
  const holds = `KV memory of ${tokens} tokens holds ${Math.floor(tokens / other.contextLength)} sequences of the ${other.contextLength} tokens`;
  throw refused(
    role,
    role === "decode"
      ? `its ${holds} that the model's ${other.role} worker takes; raise --kv-cache-tokens`
      : `the model's decode worker's ${holds} that this one takes; raise its --kv-cache-tokens or lower --context-length`,
  );
}

/** Whole sequences of the longest length that fit the KV memory. */
export function sequencesThatFit({ totalBlocks, blockSizeTokens, contextLength }: EngineInfo): number {
  return Math.floor((totalBlocks * blockSizeTokens) / contextLength);
}

async function cardsOf(model: string, discovery: Discovery, namespace: string): Promise<ModelCard[]> {
  const cards = new Map<string, ModelCard>();
  const watch = await watchCards(discovery, { namespace }, (change) => {
    if (change.type === "delete") cards.delete(change.instanceId);
    else if (isModelCard(change.card) && change.card.name === model) cards.set(change.instanceId, change.card);
  });
  await watch.close();
  return [...cards.values()];
}

function refused(role: WorkerRole, why: string): DynamoError {
  return new DynamoError("invalid-config", `--disaggregation-mode ${role}: ${why}`);
}
