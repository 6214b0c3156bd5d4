import { DynamoError, toDynamoError } from "../../errors/index.ts";
import { decodeKvAnswer, encodeKvQuery, type KvAnswer, type KvQuery } from "../../protocol/index.ts";
import type { ClientStream, RequestPlaneClient } from "../../runtime/request-plane/index.ts";

/**
 * Asks a worker's rank what a router missed: one range query, and when a dump is the answer its further pages, one after
 * the other, so that neither side ever holds more than a page. Each request has a deadline; `cancel` ends the matter
 * without another call.
 */
export interface KvQueryOptions {
  readonly client: RequestPlaneClient;
  readonly address: string;
  /** `namespace.component.worker_kv_indexer_query_dp{rank}` */
  readonly endpoint: string;
  readonly dpRank: number;
  /** First event wanted; undefined = everything. */
  readonly start: number | undefined;
  /** Of one request. */
  readonly timeoutMs: number;
}

export interface KvQueryHandler {
  /** A whole answer, or the pages of a dump in order. */
  onAnswer(answer: KvAnswer): void;
  /** Nothing more comes. `error` undefined after a whole answer. */
  onEnd(error: DynamoError | undefined): void;
}

export function queryKvEvents(options: KvQueryOptions, handler: KvQueryHandler): { cancel(): void } {
  let stream: ClientStream | undefined;
  let cancelled = false;
  let dumpId: number | undefined;
  let nextPage = 0;

  const send = (query: KvQuery): void => {
    let answer: KvAnswer | undefined;
    let problem: DynamoError | undefined;
    const { client, address, endpoint, timeoutMs, dpRank } = options;
    const context = { endpoint, requestId: "kv-events", traceparent: "", timeoutMs, autoCredit: true };
    stream = client.open(address, encodeKvQuery(query), context, {
      onItem(bytes, start, end) {
        try {
          if (answer !== undefined) throw new DynamoError("malformed-frame", "KV query: expected one item, got more");
          answer = decodeKvAnswer(bytes.subarray(start, end), dpRank);
        } catch (thrown) {
          problem = toDynamoError(thrown);
        }
      },
      onTurnEnd: () => undefined,
      onEnd(end) {
        if (cancelled) return;
        if (end !== undefined || problem !== undefined || answer === undefined) {
          handler.onEnd(end ?? problem ?? new DynamoError("malformed-frame", "KV query: the worker sent no answer"));
        } else receive(answer);
      },
    });
  };

  const receive = (answer: KvAnswer): void => {
    if (answer.type === "tree-dump") {
      if (answer.page !== nextPage || (dumpId !== undefined && answer.dumpId !== dumpId)) {
        const diagnostic = `expected page ${nextPage}, got page ${answer.page} of dump ${answer.dumpId}`;
        handler.onEnd(
          new DynamoError("malformed-frame", "KV query: the worker sent another page of its dump", { diagnostic }),
        );
        return;
      }
      dumpId = answer.dumpId;
      nextPage++;
      handler.onAnswer(answer);
      if (cancelled) return;
      if (nextPage < answer.pageCount) send({ type: "page", dumpId, page: nextPage });
      else handler.onEnd(undefined);
      return;
    }
    if (dumpId !== undefined && answer.type !== "dump-gone") {
      handler.onEnd(new DynamoError("malformed-frame", `KV query: expected a page of a dump, got ${answer.type}`));
      return;
    }
    handler.onAnswer(answer);
    if (!cancelled) handler.onEnd(undefined);
  };

  send({ type: "range", start: options.start, end: undefined });
  return {
    cancel() {
      cancelled = true;
      stream?.cancel();
    },
  };
}
