import { createServer } from "node:http";

/** An OTLP/HTTP receiver of traces that keeps what it gets; reads the protobuf form by its field numbers. */
export interface ReceivedSpan {
  readonly service: string;
  readonly name: string;
  readonly traceId: string;
  readonly spanId: string;
  /** Empty: the first of its trace. */
  readonly parentSpanId: string;
  readonly startNs: bigint;
  readonly endNs: bigint;
  readonly attributes: Readonly<Record<string, unknown>>;
  readonly events: readonly string[];
  readonly isError: boolean;
}

export interface OtlpReceiver {
  readonly endpoint: string;
  readonly spans: ReceivedSpan[];
  close(): Promise<void>;
}

export async function startOtlpReceiver(): Promise<OtlpReceiver> {
  const spans: ReceivedSpan[] = [];
  const server = createServer((request, response) => {
    const chunks: Buffer[] = [];
    request.on("data", (chunk: Buffer) => chunks.push(chunk));
    request.on("end", () => {
      const isTraces =
        request.url === "/v1/traces" &&
        request.method === "POST" &&
        request.headers["content-type"] === "application/x-protobuf";
      if (isTraces) spans.push(...spansOf(Buffer.concat(chunks)));
      response.writeHead(isTraces ? 200 : 404, { "content-type": "application/x-protobuf" }).end();
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  const port = typeof address === "object" && address !== null ? address.port : 0;
  return {
    endpoint: `http://127.0.0.1:${port}`,
    spans,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

/** Field number to its values, in order: bytes of length-delimited fields, numbers of the others. */
type Message = Map<number, (Buffer | bigint)[]>;

function read(bytes: Buffer): Message {
  const fields: Message = new Map();
  let at = 0;
  const varint = (): bigint => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = bytes[at++]!;
      value |= BigInt(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
  };
  while (at < bytes.length) {
    const key = Number(varint());
    let value: Buffer | bigint;
    if ((key & 7) === 0) value = varint();
    else if ((key & 7) === 1) {
      value = bytes.readBigUInt64LE(at);
      at += 8;
    } else if ((key & 7) === 5) {
      value = BigInt(bytes.readUInt32LE(at));
      at += 4;
    } else {
      const length = Number(varint());
      value = bytes.subarray(at, at + length);
      at += length;
    }
    fields.set(key >> 3, [...(fields.get(key >> 3) ?? []), value]);
  }
  return fields;
}

const messages = (message: Message, field: number): Message[] =>
  (message.get(field) ?? []).map((bytes) => read(bytes as Buffer));
const text = (message: Message, field: number): string => ((message.get(field)?.[0] as Buffer) ?? "").toString();
const hex = (message: Message, field: number): string =>
  ((message.get(field)?.[0] as Buffer) ?? Buffer.alloc(0)).toString("hex");
const number = (message: Message, field: number): bigint => (message.get(field)?.[0] as bigint) ?? 0n;

function spansOf(body: Buffer): ReceivedSpan[] {
  return messages(read(body), 1).flatMap((resource) => {
    const service = attributesOf(messages(resource, 1)[0]!, 1)["service.name"];
    return messages(resource, 2).flatMap((scope) =>
      messages(scope, 2).map((span) => ({
        service: String(service),
        name: text(span, 5),
        traceId: hex(span, 1),
        spanId: hex(span, 2),
        parentSpanId: hex(span, 4),
        startNs: number(span, 7),
        endNs: number(span, 8),
        attributes: attributesOf(span, 9),
        events: messages(span, 11).map((event) => text(event, 2)),
        isError: messages(span, 15).some((status) => number(status, 3) === 2n),
      })),
    );
  });
}

function attributesOf(message: Message, field: number): Record<string, unknown> {
  return Object.fromEntries(
    messages(message, field).map((pair) => [text(pair, 1), valueOf(messages(pair, 2)[0] ?? new Map())]),
  );
}

function valueOf(value: Message): unknown {
  if (value.has(1)) return text(value, 1);
  if (value.has(2)) return number(value, 2) === 1n;
  if (value.has(3)) return Number(BigInt.asIntN(64, number(value, 3)));
  if (value.has(4)) {
    const bits = Buffer.alloc(8);
    bits.writeBigUInt64LE(number(value, 4));
    return bits.readDoubleLE();
  }
  if (value.has(5)) return messages(messages(value, 5)[0]!, 1).map(valueOf);
  return undefined;
}
