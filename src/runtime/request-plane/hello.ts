import { DynamoError } from "../../errors/index.ts";
import {
  ByteReader,
  ByteWriter,
  NONCE_BYTES,
  TruncatedBytes,
  provesSecret,
  secretProof,
  type ProofInput,
} from "../../std/index.ts";
import { FRAME, MAGIC, PROTOCOL_VERSION, encodeError, encodeFrame, malformed } from "./frame.ts";

/**
 * Who may talk to whom, settled before the first stream:
 *
 *     server -> HELLO (versions, nonce S)
 *     client -> HELLO (versions, nonce C, proof of the secret over both nonces)
 *     server -> WELCOME (the version both know, proof of its own) | REFUSE (why)
 *
 * A proof covers the role and both nonces (`std/secret-proof.ts`). Both sides prove, so a client with a secret sends no
 * prompt to a server without it. No secret: no proofs, anybody on the network may connect, which is why the default
 * address is loopback. The proofs authenticate the hello; they do not encrypt what follows.
 */
export { newNonce } from "../../std/index.ts";

const PROOF_LABEL = "dynamo-ts request plane hello\n";

export type Role = "client" | "server";
const ROLE_CODES = { client: 1, server: 2 } as const;

export interface Hello {
  readonly minVersion: number;
  readonly maxVersion: number;
  readonly role: Role;
  readonly peerId: bigint;
  readonly nonce: Buffer;
  readonly proof: Buffer;
}

export interface Welcome {
  readonly version: number;
  readonly proof: Buffer;
}

/** Every refusal of a hello has this reason; the message says which. */
export function refusal(message: string, diagnostic?: string): DynamoError {
  return new DynamoError("protocol-version", message, diagnostic === undefined ? {} : { diagnostic });
}

/** Empty without a secret. */
export function proofOf(secret: string | undefined, input: ProofInput): Buffer {
  return secretProof(PROOF_LABEL, secret, input);
}

/** With a secret the right proof is needed; without one anything passes. */
export function proves(secret: string | undefined, proof: Buffer, input: ProofInput): boolean {
  return provesSecret(PROOF_LABEL, secret, proof, input);
}

/** The highest version both sides know. */
export function commonVersion(peer: Hello): number | undefined {
  return peer.minVersion <= PROTOCOL_VERSION && PROTOCOL_VERSION <= peer.maxVersion ? PROTOCOL_VERSION : undefined;
}

export function encodeHello(hello: Omit<Hello, "minVersion" | "maxVersion">): Buffer {
  const body = new ByteWriter(128);
  body.u32(MAGIC);
  body.u16(PROTOCOL_VERSION);
  body.u16(PROTOCOL_VERSION);
  body.u8(ROLE_CODES[hello.role]);
  body.u64(hello.peerId);
  body.bytes(hello.nonce);
  body.u8(hello.proof.length);
  body.bytes(hello.proof);
  return encodeFrame(FRAME.hello, body.view());
}

export function encodeWelcome({ version, proof }: Welcome): Buffer {
  const body = new ByteWriter(64);
  body.u16(version);
  body.u8(proof.length);
  body.bytes(proof);
  return encodeFrame(FRAME.welcome, body.view());
}

export function encodeRefuse(error: DynamoError): Buffer {
  return encodeFrame(FRAME.refuse, encodeError(error));
}

/** The peer's hello in the `expected` role. Throws `protocol-version` for a stranger. Fields of later versions are ignored. */
export function decodeHello(bytes: Buffer, start: number, end: number, expected: Role): Hello {
  return read(bytes, start, end, (body) => {
    if (body.u32() !== MAGIC) throw refusal("the peer does not speak the request-plane protocol", "wrong magic");
    const minVersion = body.u16();
    const maxVersion = body.u16();
    const roleCode = body.u8();
    if (roleCode !== ROLE_CODES[expected]) throw refusal("the peer has the wrong role", `role ${roleCode}`);
    const peerId = body.u64();
    const nonce = Buffer.from(body.bytes(NONCE_BYTES));
    return { minVersion, maxVersion, role: expected, peerId, nonce, proof: readProof(body) };
  });
}

export function decodeWelcome(bytes: Buffer, start: number, end: number): Welcome {
  return read(bytes, start, end, (body) => ({ version: body.u16(), proof: readProof(body) }));
}

function readProof(body: ByteReader): Buffer {
  return Buffer.from(body.bytes(body.u8()));
}

function read<T>(bytes: Buffer, start: number, end: number, decode: (body: ByteReader) => T): T {
  try {
    return decode(new ByteReader(bytes, start, end));
  } catch (thrown) {
    if (thrown instanceof TruncatedBytes) throw malformed(`hello: ${thrown.message}`);
    throw thrown;
  }
}
