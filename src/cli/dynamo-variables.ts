/**
 * Variables of Dynamo's KVBM that are no options here: by which name, and why. Those who bring their environment along are
 * told, rather than left to believe that a setting works. The other `DYN_KVBM_*` are options (options.ts).
 */
const NO_LEADER = "a worker has its tiers in its own process: there is no leader to find";
const NO_GPU_PATH = "blocks move through host memory";
const ALWAYS = "`kvbm_*` metrics are always on the worker's system port";

export const DYNAMO_KVBM_VARIABLES: Readonly<Record<string, string>> = {
  DYN_KVBM_METRICS: ALWAYS,
  DYN_KVBM_METRICS_PORT: ALWAYS,
  DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS: NO_LEADER,
  DYN_KVBM_LEADER_ZMQ_HOST: NO_LEADER,
  DYN_KVBM_LEADER_ZMQ_PUB_PORT: NO_LEADER,
  DYN_KVBM_LEADER_ZMQ_ACK_PORT: NO_LEADER,
  DYN_KVBM_TRANSFER_BATCH_SIZE: "four blocks go between two steps of a busy engine, 16 of an idle one",
  DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY: "prompts go down before answers; use DYN_KVBM_HOST_OFFLOAD_MIN_FREQUENCY",
  DYN_KVBM_NCCL_MLA_MODE: NO_GPU_PATH,
  DYN_KVBM_REMOTE_DISK_USE_GDS: NO_GPU_PATH,
  DYN_KVBM_DISK_DISABLE_O_DIRECT: "the disk is read and written through the page cache",
  DYN_KVBM_DISK_ZEROFILL_FALLBACK: "the file grows with what is in it",
  DYN_KVBM_DISK_ALLOCATOR_TYPE: "the file grows with what is in it",
  DYN_KVBM_REMOTE_STORAGE_TYPE: "--kv-s3 says it with its address",
  DYN_KVBM_OBJECT_ENABLED: "a bucket or a folder is enough: --kv-s3",
  DYN_KVBM_OBJECT_NUM_BLOCKS: "the store's own rules bound it",
  DYN_KVBM_OBJECT_WRITE_THROUGH: "blocks are always written through",
};

/** A line for each of them that is set. */
export function ignoredVariables(env: NodeJS.ProcessEnv): string[] {
  return Object.entries(DYNAMO_KVBM_VARIABLES)
    .filter(([name]) => (env[name] ?? "") !== "")
    .map(([name, why]) => `${name} is ignored: ${why}`);
}
