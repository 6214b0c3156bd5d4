import { createHmac, randomBytes, timingSafeEqual } from "node:crypto";

/**
 * Mutual proof that two processes hold the same secret: each sends a fresh nonce and an HMAC-SHA256 over a label, its role
 * and both nonces, so that neither a recorded nor a mirrored proof is worth anything. It authenticates a hello and encrypts
 * nothing. The label names the protocol, so that a proof of one is no proof of another. No secret: no proofs.
 */
export const NONCE_BYTES = 16;
export const PROOF_BYTES = 32;

const NO_PROOF = Buffer.alloc(0);

export interface ProofInput {
  readonly role: "client" | "server";
  readonly serverNonce: Buffer;
  readonly clientNonce: Buffer;
}

export function newNonce(): Buffer {
  return randomBytes(NONCE_BYTES);
}

/** Empty without a secret. */
export function secretProof(
  label: string,
  secret: string | undefined,
  { role, serverNonce, clientNonce }: ProofInput,
): Buffer {
  if (secret === undefined) return NO_PROOF;
  const hmac = createHmac("sha256", secret);
  return hmac.update(label).update(role).update("\n").update(serverNonce).update(clientNonce).digest();
}

/** With a secret the right proof is needed; without one anything passes. */
export function provesSecret(label: string, secret: string | undefined, proof: Buffer, input: ProofInput): boolean {
  if (secret === undefined) return true;
  return proof.length === PROOF_BYTES && timingSafeEqual(proof, secretProof(label, secret, input));
}
