import { DynamoError } from "../errors/index.ts";
import type { BackendChoice, BackendName } from "./base.ts";
import type { PairQuestion, TransferBackend } from "./backend.ts";

/**
 * Which back end moves a table's blocks: the first of this order that both agents have and that meets no obstacle. Between processes of one host mapped memory wins, then our own TCP, then NIXL, which between hosts goes first: there
 * it knows InfiniBand and NVLink. Storage comes last, as nothing else moves to it.
 */
const SAME_HOST: readonly BackendName[] = ["memory", "shm", "tcp", "nixl", "file", "s3"];
const OTHER_HOST: readonly BackendName[] = ["memory", "shm", "nixl", "tcp", "file", "s3"];

export interface Chosen extends BackendChoice {
  readonly handler: TransferBackend;
}

export interface ChooseOptions {
  readonly backends: ReadonlyMap<BackendName, TransferBackend>;
  readonly question: PairQuestion;
  readonly isSameHost: boolean;
  /** Those that were to be opened here and could not be. */
  readonly unavailable?: ReadonlySet<BackendName>;
  /** Use this one or fail. */
  readonly wanted: BackendName | undefined;
}

/** Throws `transfer-no-path` with what kept each back end from being used. */
export function chooseBackend({ backends, question, isSameHost, wanted, unavailable }: ChooseOptions): Chosen {
  const { peer } = question;
  const order = isSameHost ? SAME_HOST : OTHER_HOST;
  const passedOver: string[] = [];
  let isSlowPath = false;
  for (const name of order) {
    if (wanted !== undefined && name !== wanted) continue;
    const handler = backends.get(name);
    if (handler === undefined) {
      if (wanted !== undefined) passedOver.push(`${name}: not enabled here`);
      else if (unavailable?.has(name) === true && peer.metadata.backends.has(name)) {
        passedOver.push(`${name}: not available here, the peer has it`);
        isSlowPath = true;
      }
      continue;
    }
    if (!peer.isSelf && !peer.metadata.backends.has(name)) {
      if (isPeerBackend(name)) passedOver.push(`${name}: the peer does not have it`);
      continue;
    }
    const obstacle = handler.obstacle(question);
    if (obstacle === undefined) {
      const because = passedOver.length === 0 ? "the fastest that both agents have" : passedOver.join("; ");
      return { handler, backend: name, reason: because, isSlowPath };
    }
    passedOver.push(`${name}: ${obstacle.why}`);
    if (obstacle.isAvoidable) isSlowPath = true;
  }
  const what = `${question.localKind} memory here, ${question.remoteKind} memory of ${peer.name}`;
  throw new DynamoError("transfer-no-path", `no back end moves between ${what}`, {
    diagnostic: passedOver.join("; ") || "the agents have no back end in common",
  });
}

function isPeerBackend(name: BackendName): boolean {
  return name !== "file" && name !== "s3";
}
