import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { DynamoError } from "../errors/index.ts";
import type { S3Options } from "../transfer/s3/index.ts";
import type { KvObjectConfig, KvTiersConfig } from "../worker/index.ts";
import { parseByteSize } from "./byte-size.ts";
import { defaultDiscoveryFolder, type OptionValues } from "./options.ts";

/** What `--kv-host`, `--kv-disk` and `--kv-s3` ask for; undefined when none is given. Throws `invalid-config`. */
export function kvTiersConfig(values: OptionValues, env: NodeJS.ProcessEnv): KvTiersConfig | undefined {
  const hostBytes = parseByteSize(values["kv-host"] ?? "0", "kv-host");
  const diskBytes = parseByteSize(values["kv-disk"] ?? "0", "kv-disk");
  const store = storeOf(values, env);
  const hostBlocks = values["kv-host-blocks"];
  const diskBlocks = values["kv-disk-blocks"];
  const isAsked = hostBytes + diskBytes + hostBlocks + diskBlocks > 0 || store !== undefined;
  if (!isAsked) return undefined;
  const hostMinFrequency = values["kv-host-min-frequency"];
  return {
    hostBytes,
    ...(hostBlocks === 0 ? {} : { hostBlocks }),
    ...(hostMinFrequency === 0 ? {} : { hostMinFrequency }),
    ...(diskBytes === 0 && diskBlocks === 0
      ? {}
      : {
          disk: {
            bytes: diskBytes,
            ...(diskBlocks === 0 ? {} : { blocks: diskBlocks }),
            folder: resolve(values["kv-disk-path"] ?? join(defaultDiscoveryFolder(), "kv")),
            minSights: values["kv-disk-every-block"] ? 1 : 2,
            ...frequency(values["kv-disk-min-frequency"]),
          },
        }),
    ...(store === undefined ? {} : { object: { store, ...frequency(values["kv-s3-min-frequency"]) } }),
  };
}

function frequency(minFrequency: number): { readonly minFrequency?: number } {
  return minFrequency === 0 ? {} : { minFrequency };
}

function storeOf(values: OptionValues, env: NodeJS.ProcessEnv): KvObjectConfig["store"] | undefined {
  const bucket = values["kv-s3-bucket"];
  const address = values["kv-s3"] ?? (bucket === undefined ? undefined : `s3://${bucket}`);
  if (address === undefined) {
    const folder = values["kv-remote-path"];
    return folder === undefined ? undefined : { kind: "folder", folder: resolve(folder) };
  }
  const url = URL.parse(address);
  if (url?.protocol === "file:") return { kind: "folder", folder: fileURLToPath(url) };
  const isS3 = url?.protocol === "s3:";
  const name = isS3 ? url.hostname : url?.pathname.replace(/^\/|\/$/g, "");
  if (url === null || !/^(s3|https?):$/.test(url.protocol) || name === undefined || !/^[\w.-]{1,255}$/.test(name)) {
    throw new DynamoError(
      "invalid-config",
      `--kv-s3: expected s3://bucket, http(s)://host[:port]/bucket or file:///folder, got ${JSON.stringify(address)}`,
    );
  }
  return { kind: "s3", bucket: name, s3: s3Options(values, env, isS3 ? undefined : url.origin) };
}

function s3Options(values: OptionValues, env: NodeJS.ProcessEnv, origin: string | undefined): S3Options {
  const region = values["kv-s3-region"] ?? env["AWS_REGION"] ?? env["AWS_DEFAULT_REGION"] ?? "us-east-1";
  const endpoint =
    origin ??
    values["kv-s3-endpoint"] ??
    env["AWS_ENDPOINT_URL_S3"] ??
    env["AWS_ENDPOINT_URL"] ??
    `https://s3.${region}.amazonaws.com`;
  const accessKeyId = values["kv-s3-access-key"] ?? env["AWS_ACCESS_KEY_ID"] ?? "";
  const secretAccessKey = values["kv-s3-secret-key"] ?? env["AWS_SECRET_ACCESS_KEY"] ?? "";
  if (accessKeyId === "" || secretAccessKey === "") {
    throw new DynamoError(
      "invalid-config",
      "--kv-s3: expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or DYN_KVBM_OBJECT_ACCESS_KEY and DYN_KVBM_OBJECT_SECRET_KEY) in the environment, got none",
    );
  }
  return { endpoint, region, accessKeyId, secretAccessKey, sessionToken: env["AWS_SESSION_TOKEN"] };
}
