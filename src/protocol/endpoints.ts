/** Names of what a worker serves and publishes; frontends and `dynamo status` use the same. */
export const GENERATE_ENDPOINT = "generate";
/** Answers with the tokenizer artifact in items of at most 256 KiB. */
export const TOKENIZER_ENDPOINT = "tokenizer";
/** Drops the unused blocks of the engine's cache; answers with their number as JSON. */
export const CLEAR_BLOCKS_ENDPOINT = "clear_kv_blocks";
/** Of workers that prefill for others: a handoff's blocks are claimed and given back here, see handoff.ts. */
export const HANDOFF_ENDPOINT = "handoff";
/** Of workers that decode: fetches a prompt's blocks while it is still being computed elsewhere; held open until they are used. */
export const EARLY_PULL_ENDPOINT = "early_pull";
/** Turns the worker to another role, for operators and the planner; answers with the role it has then, as JSON. */
export const ROLE_ENDPOINT = "role";

/** Event-plane topics. A publisher's id is the instance id of the worker. */
export const KV_EVENTS_TOPIC = "kv-events";
export const LOAD_TOPIC = "load";
/** Of workers with a role in handoffs. */
export const TRANSFERS_TOPIC = "transfers";
