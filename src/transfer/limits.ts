/** Every bound of the transfer library, with its reason. Those of a wire format belong to the protocol. */

/** Agent names, labels and bucket names: enough for a namespace, a component and an instance id. */
export const MAX_NAME_BYTES = 128;
/** Regions of one agent. A worker registers a pool per tier, not a region per block. */
export const MAX_REGIONS = 4_096;
/** Peers an agent knows. Above any cluster we plan for; each costs some hundred bytes until it is used. */
export const MAX_PEERS = 16_384;
/** Metadata from a peer: 4,096 regions with labels and what each back end adds. */
export const MAX_METADATA_BYTES = 4 * 1024 * 1024;
/** Descriptors of one table: 262,144 blocks of 33 kB are 8 GB. */
export const MAX_TABLE_DESCRIPTORS = 1 << 20;
/** Descriptors of one transfer after neighbours were merged. Keeps a write request under 2 MiB on the wire. */
export const MAX_TRANSFER_DESCRIPTORS = 1 << 16;
/** A descriptor's bytes: lengths are u32. */
export const MAX_DESCRIPTOR_BYTES = 0xffff_ffff;
/** Transfers in progress per agent. */
export const MAX_ACTIVE_TRANSFERS = 4_096;
/** A notification: a request id and a block table, not data. */
export const MAX_MESSAGE_BYTES = 64 * 1024;
/** Notifications nobody has taken yet; further ones are refused to their sender. */
export const MAX_QUEUED_NOTIFICATIONS = 4_096;
export const DEFAULT_TIMEOUT_MS = 30_000;
/** How long a back end has to let go of a transfer that was cancelled or ran out of time. */
export const STOP_GRACE_MS = 2_000;
/** Bytes copied on the event loop before others get a turn: under half a millisecond at 5 GB/s. */
export const COPY_SLICE_BYTES = 2 * 1024 * 1024;
