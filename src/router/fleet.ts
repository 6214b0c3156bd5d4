import { handoffConflict, type ModelCard } from "../protocol/index.ts";

/**
 * Which workers serve a model together. Engines and versions may differ; what a request means may not. Every frontend and
 * router service sees the same cards and must come to the same answer, whatever order they came in: so it follows from the
 * set alone.
 *
 *     one kind     tokenizer and chat template, vocabulary, KV block size
 *     which kind   that of most workers; of as many, that with the oldest worker (`created`, then instance id)
 *     the leader   the oldest worker of that kind: its context length is the model's
 *     left out     other kinds, shorter contexts, and beside a split pool whoever cannot hand KV blocks to it
 *
 * A fleet that is changed worker by worker so goes over at its middle. Pure; `naiveFleet` in the tests says it once more.
 */
export interface FleetMember {
  readonly instanceId: string;
  readonly card: ModelCard;
}

export interface Fleet {
  readonly leader: ModelCard;
  /** By instance id: why it is left out, with what to do about it. */
  readonly problems: ReadonlyMap<string, string>;
}

/** Cards of one name; at least one. */
export function electFleet(members: readonly FleetMember[]): Fleet {
  const kinds = new Map<string, FleetMember[]>();
  for (const member of members.toSorted(byAge)) {
    const key = fleetKind(member.card);
    const kind = kinds.get(key);
    if (kind === undefined) kinds.set(key, [member]);
    else kind.push(member);
  }
  // Kinds stand in the order of their oldest workers: of as many, the first wins.
  let chosen: FleetMember[] = [];
  for (const kind of kinds.values()) if (kind.length > chosen.length) chosen = kind;
  const leader = chosen[0]!.card;
  const problems = new Map<string, string>();
  for (const { instanceId, card } of members) {
    const problem = fleetConflict(leader, card);
    if (problem !== undefined) problems.set(instanceId, problem);
  }
  return { leader, problems };
}

/** Equal for cards of one kind. */
export function fleetKind({ tokenizerSha256, vocabularySize, blockSizeTokens }: ModelCard): string {
  return `${tokenizerSha256}/${vocabularySize}/${blockSizeTokens}`;
}

function byAge(a: FleetMember, b: FleetMember): number {
  return a.card.created - b.card.created || (a.instanceId < b.instanceId ? -1 : 1);
}

/** Why a worker is left out of the fleet that `leader` stands for. */
export function fleetConflict(leader: ModelCard, card: ModelCard): string | undefined {
  if (leader.tokenizerSha256 !== card.tokenizerSha256) {
    return `its tokenizer or chat template (SHA-256 ${card.tokenizerSha256.slice(0, 12)}) is another than that of most of the model's workers (${leader.tokenizerSha256.slice(0, 12)}); give it the same --model and --custom-jinja-template, or another --model-name`;
  }
  if (leader.vocabularySize !== card.vocabularySize) {
    return `its vocabulary has ${card.vocabularySize} tokens, that of most of the model's workers ${leader.vocabularySize}; give it the same model, or another --model-name`;
  }
  if (leader.blockSizeTokens !== card.blockSizeTokens) {
    return `its KV blocks have ${card.blockSizeTokens} tokens, those of most of the model's workers ${leader.blockSizeTokens}; start it with --kv-cache-block-size=${leader.blockSizeTokens}`;
  }
  if (card.contextLength < leader.contextLength) {
    return `its context of ${card.contextLength} tokens is shorter than the model's ${leader.contextLength}, which its oldest worker has; start it with --context-length=${leader.contextLength}, or all of them with ${card.contextLength}`;
  }
  return leader.role === "agg" && card.role === "agg" ? undefined : handoffConflict(leader, card);
}
