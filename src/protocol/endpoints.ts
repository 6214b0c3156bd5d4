/** Names of what a worker serves and publishes; frontends and `dynamo status` use the same. */
export const GENERATE_ENDPOINT = "generate";
/** Answers with the tokenizer artifact in items of at most 256 KiB. */
export const TOKENIZER_ENDPOINT = "tokenizer";
/** Drops the unused blocks of the engine's cache; answers with their number as JSON. */
export const CLEAR_BLOCKS_ENDPOINT = "clear_kv_blocks";

/** Event-plane topics. A publisher's id is the instance id of the worker. */
export const KV_EVENTS_TOPIC = "kv-events";
export const LOAD_TOPIC = "load";
