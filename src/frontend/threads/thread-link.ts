import type { MessagePort } from "node:worker_threads";
import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import { KvFeedHealth, SharedKvIndex, type IndexHealth } from "../../router/index.ts";
import type { EventPlane } from "../../runtime/event-plane/index.ts";
import { BookingBus } from "./booking-bus.ts";
import type { Answer, HostMessage, PostedIndex, Question, ThreadMessage } from "./messages.ts";

/**
 * One serving thread's end of the frontend: the KV indexes that the host writes, what its router tells the others'
 * routers, and questions to all other threads. Made before the frontend of the thread, closed after it. Answers have a
 * deadline, kept by the host.
 */
/** A model's index as its router takes it. */
export class SharedModelIndex implements IndexHealth {
  readonly index = new SharedKvIndex();
  #health: KvFeedHealth | undefined;

  attach(posted: PostedIndex | undefined): void {
    this.index.attach(posted?.share);
    this.#health = posted && new KvFeedHealth(posted.health);
  }

  get degradation(): string | undefined {
    return this.#health?.degradation;
  }
}

interface Asked {
  readonly resolve: (answers: readonly Answer[]) => void;
  readonly reject: (error: DynamoError) => void;
}

/** Questions of one thread under way; they come from operators and scrapers. */
const MAX_QUESTIONS = 256;

export class ThreadLink {
  readonly bookings: EventPlane;
  /** The port to listen on; undefined when the host changed its mind. */
  readonly listen: Promise<number | undefined>;
  /** Set by the frontend. Until then this thread has nothing to add. */
  answer: ((question: Question) => Answer | Promise<Answer>) | undefined = undefined;
  /** Set by who runs the frontend; called once per wish. */
  onLeave:
    ((wish: { readonly type: "drain"; readonly timeoutMs: number } | { readonly type: "stop" }) => void) | undefined =
    undefined;
  readonly #port: MessagePort;
  readonly #logger: Logger;
  readonly #listen = Promise.withResolvers<number | undefined>();
  readonly #indexes = new Map<string, SharedModelIndex>();
  readonly #served = new Set<string>();
  readonly #listed = new Set<string>();
  readonly #asked = new Map<number, Asked>();
  #questionCount = 0;

  constructor(port: MessagePort, bookingsName: string, logger: Logger) {
    this.#port = port;
    this.#logger = logger;
    this.bookings = new BookingBus(bookingsName);
    this.listen = this.#listen.promise;
    port.on("message", (message: HostMessage) => this.#onMessage(message));
  }

  /** The index of a model, which may be empty still. */
  kvIndex(model: string): SharedModelIndex {
    let index = this.#indexes.get(model);
    if (index === undefined) this.#indexes.set(model, (index = new SharedModelIndex()));
    return index;
  }

  /** Whether this thread can answer for the model now. */
  setServed(model: string, isServed: boolean): void {
    if (this.#served.has(model) === isServed) return;
    if (isServed) this.#served.add(model);
    else this.#served.delete(model);
    this.tell({ type: "served", model, isServed });
  }

  /** Every thread can: whoever reads of the model here may ask for it on any connection. */
  isListed(model: string): boolean {
    return this.#listed.has(model);
  }

  /** What all others say, host included. Throws `request-deadline` when one does not answer, `too-many-requests`. */
  ask(question: Question): Promise<readonly Answer[]> {
    if (this.#asked.size >= MAX_QUESTIONS) {
      return Promise.reject(new DynamoError("too-many-requests", "too many questions to the server's other threads"));
    }
    const id = this.#questionCount++;
    const { promise, resolve, reject } = Promise.withResolvers<readonly Answer[]>();
    this.#asked.set(id, { resolve, reject });
    this.tell({ type: "ask", id, question });
    return promise;
  }

  tell(message: ThreadMessage): void {
    this.#port.postMessage(message);
  }

  async close(): Promise<void> {
    await this.bookings.close();
    for (const { reject } of this.#asked.values()) reject(new DynamoError("draining", "the server is shutting down"));
    this.#asked.clear();
    this.#port.close();
  }

  #onMessage(message: HostMessage): void {
    switch (message.type) {
      case "listen":
        this.#listen.resolve(message.port);
        return;
      case "kv-index":
        this.kvIndex(message.model).attach(message.index);
        return;
      case "kv-ranks":
        this.kvIndex(message.model).index.setWriterRanks(message.instanceId, message.ranks);
        return;
      case "listed":
        if (message.isListed) this.#listed.add(message.model);
        else this.#listed.delete(message.model);
        return;
      case "question":
        void this.#onQuestion(message.id, message.question);
        return;
      case "answers":
        this.#onAnswers(message.id, message.answers);
        return;
      case "drain":
      case "stop":
        this.#listen.resolve(undefined);
        this.onLeave?.(message);
    }
  }

  async #onQuestion(id: number, question: Question): Promise<void> {
    try {
      const answer = (await this.answer?.(question)) ?? { type: "done" };
      this.tell({ type: "answer", id, answer });
    } catch (thrown) {
      // Left without an answer: a part that is missing would make the whole false. The host's deadline tells who asked.
      this.#logger.error({ err: thrown, question: question.type }, "a question of another frontend thread failed");
    }
  }

  #onAnswers(id: number, answers: readonly Answer[] | undefined): void {
    const asked = this.#asked.get(id);
    this.#asked.delete(id);
    if (answers !== undefined) asked?.resolve(answers);
    else asked?.reject(new DynamoError("request-deadline", "the server's other threads did not answer in time"));
  }
}

/** A failure as a message. */
export function failedMessage(thrown: unknown): ThreadMessage {
  const { reason, publicMessage, diagnostic } = toDynamoError(thrown);
  return { type: "failed", reason, message: publicMessage, diagnostic };
}
