import { createHash } from "node:crypto";

/**
 * The hashes by which SGLang names the pages of its cache: SHA-256 over the digest of the page before and the page's tokens
 * as u32 little-endian, of which events show the first eight bytes as a signed number. After sglang/srt/mem_cache/utils.py;
 * the first page of a salted chain follows on a digest of the salt.
 */
export function sglangBlockDigest(parent: Buffer | undefined, tokenIds: readonly number[], cacheSalt?: string): Buffer {
  const hash = createHash("sha256");
  if (parent !== undefined) hash.update(parent);
  else if (cacheSalt !== undefined) hash.update(createHash("sha256").update(`sglang-cache-salt-v1\0${cacheSalt}`).digest());
  return hash.update(Uint8Array.from(new Uint8Array(Uint32Array.from(tokenIds).buffer))).digest();
} // prettier-ignore

export function sglangEventHash(digest: Buffer): bigint {
  return digest.readBigInt64BE(0);
}
