import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { SseCounter } from "../../../src/bench/sse-counter.ts";
import { MalformedResponse, ResponseReader } from "../../../src/bench/response-reader.ts";
import { resolveOptions } from "../../../src/cli/resolve-options.ts";
import { COMMAND_NAMES, OPTION_NAMES, specOf } from "../../../src/cli/options.ts";
import { readEngineArgs } from "../../../src/cli/mocker-engine-args.ts";
import { ChatTemplate } from "../../../src/frontend/preprocess/chat-template.ts";
import { parseInstance } from "../../../src/runtime/component/index.ts";
import { isModelCard } from "../../../src/protocol/index.ts";
import { FileDiscovery } from "../../../src/runtime/discovery/index.ts";
import { seal } from "../../../src/runtime/discovery/sealed-record.ts";
import type { JsonValue } from "../../../src/runtime/discovery/base.ts";
import type { Random } from "../../../src/std/index.ts";
import { allowing, allowingLater } from "../allowed.ts";
import { targetOf, type AnyTarget } from "../fuzzer.ts";
import { below, bytesTarget, mutateBytes, pick, showBytes, smallerBytes } from "../mutate-bytes.ts";
import { jsonTarget } from "../mutate-json.ts";

// ---- Chat templates ----

const EXPRESSIONS = [
  "messages", "messages[0]", "messages[0].content", "messages[0]['role']", "bos_token", "1", "0", "-1", "1.5", "99999999999",
  "'text'", "''", "true", "none", "[1, 2, 3]", "{'a': 1}", "range(10)", "range(100000)", "undefined_name", "loop.index",
  "messages.__proto__", "messages.constructor", "''.constructor.constructor", "x", "namespace(a=1)", "strftime_now('%Y')",
  "messages | length", "tools", "(1).toFixed", "range", "messages[::-1]", "messages[1:]", "'a' * 1000000",
] as const; // prettier-ignore
const FILTERS = [
  "length", "upper", "lower", "trim", "join(',')", "first", "last", "list", "tojson", "tojson(indent=4)", "string", "int",
  "float", "abs", "reverse", "sort", "unique", "default('d')", "replace('a', 'bb')", "map(attribute='content')", "items",
  "selectattr('role', 'equalto', 'user')", "rejectattr('a')", "dictsort", "indent(4)", "capitalize", "safe", "nothing",
] as const; // prettier-ignore
const OPERATORS = ["+", "-", "*", "/", "%", "~", "==", "!=", "<", ">", "and", "or", "in", "not in", "is", "is not", "//", "**"] as const; // prettier-ignore

function expression(random: Random, depth: number): string {
  if (depth <= 0 || random.nextFloat() < 0.35) return pick(random, EXPRESSIONS);
  const inner = (): string => expression(random, depth - 1);
  switch (below(random, 8)) {
    case 0:
      return `${inner()} | ${pick(random, FILTERS)}`;
    case 1:
      return `${inner()} ${pick(random, OPERATORS)} ${inner()}`;
    case 2:
      return `(${inner()})`;
    case 3:
      return `${inner()}[${inner()}]`;
    case 4:
      return `${inner()} if ${inner()} else ${inner()}`;
    case 5:
      return `${pick(random, ["range", "raise_exception", "namespace", "x", "strftime_now", "f"])}(${inner()}, ${inner()})`;
    case 6:
      return `${inner()}.${pick(random, ["split(' ')", "strip()", "items()", "startswith('a')", "__class__", "content", "upper()", "replace('a','b')", "get('a')"])}`;
    default:
      return `not ${inner()}`;
  }
}

function template(random: Random, depth: number): string {
  const parts: string[] = [];
  for (let i = 1 + below(random, 4); i > 0; i--) {
    const inside = (): string => (depth <= 0 ? "x" : template(random, depth - 1));
    const value = expression(random, 3);
    switch (below(random, 7)) {
      case 0:
        parts.push(`{% for ${pick(random, ["x", "m", "k, v", "loop"])} in ${value} %}${inside()}{% endfor %}`);
        break;
      case 1:
        parts.push(`{% if ${value} %}${inside()}{% else %}${inside()}{% endif %}`);
        break;
      case 2:
        parts.push(`{% set ${pick(random, ["x", "y", "ns.a", "messages"])} = ${value} %}`);
        break;
      case 3:
        parts.push(`{% macro f(x, y=1) %}${inside()}{{ f(x) }}{% endmacro %}{{ f(${value}) }}`);
        break;
      case 4:
        parts.push(`{%- generation -%}${inside()}{%- endgeneration -%}`);
        break;
      case 5:
        parts.push(
          pick(random, ["text", "{# comment #}", "{% raw %}{{", "{{", "{% break %}", "{% continue %}", "\ud800"]),
        );
        break;
      default:
        parts.push(`{{ ${value} }}`);
    }
  }
  return parts.join("");
}

function chatTemplate(): AnyTarget {
  return targetOf<Buffer>({
    name: "chat-template",
    about: "ChatTemplate: templates made by a grammar, and real ones with bytes changed",
    generate(random) {
      if (random.nextFloat() < 0.7) return Buffer.from(template(random, 3));
      const chatMl =
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>{% endfor %}";
      return mutateBytes(random, [Buffer.from(chatMl), Buffer.from(template(random, 2))]);
    },
    run(bytes) {
      const source = bytes.toString("utf8");
      const made = allowing(
        ["model-file-invalid"],
        () => new ChatTemplate(source, { bosToken: "<s>", eosToken: "</s>" }),
      );
      const text = allowing(["template-failed", "invalid-field"], () =>
        made?.render({
          messages: [
            { role: "system", content: "You are\u2028 kind" },
            { role: "user", content: "{{ bos_token }} <|im_end|> \ud800".repeat(20) },
          ],
          addGenerationPrompt: true,
          args: { x: "a value", tools: [{ name: "t" }] },
        }),
      );
      if (text !== undefined) assert.ok(text.length <= 8 * 1024 * 1024, `${text.length} characters`);
    },
    smaller: smallerBytes,
    show: (bytes) => JSON.stringify(bytes.toString("utf8")),
  });
}

// ---- Answers of servers ----

function sse(): AnyTarget {
  const event = 'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n';
  const stream = `${event.repeat(3)}: comment\r\ndata: {"error":{"message":"x"}}\n\ndata: [DONE]\n\n`;
  const chunked = (body: string): string =>
    `HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n${Buffer.byteLength(body).toString(16)}\r\n${body}\r\n0\r\n\r\n`; // prettier-ignore
  return bytesTarget({
    name: "sse",
    about: "SseCounter and ResponseReader: whole and byte by byte give the same",
    corpus: [
      Buffer.from(chunked(stream)),
      Buffer.from(stream),
      Buffer.from("HTTP/1.1 529 Busy\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"),
    ],
    run(bytes) {
      const read = (pieceBytes: number): string => {
        const counter = new SseCounter();
        const body: Buffer[] = [];
        const reader = new ResponseReader((piece, start, end) => {
          body.push(Buffer.from(piece.subarray(start, end)));
          counter.write(piece, start, end);
        });
        let broken = "";
        try {
          for (let at = 0; at < bytes.length; at += pieceBytes) reader.write(bytes.subarray(at, at + pieceBytes));
          reader.end();
        } catch (thrown) {
          if (!(thrown instanceof MalformedResponse)) throw thrown;
          broken = "malformed";
        }
        const { tokenCount, errorCount, isDone } = counter;
        return JSON.stringify({ status: reader.status, tokenCount, errorCount, isDone, broken, body: Buffer.concat(body).toString("latin1") }); // prettier-ignore
      };
      const whole = read(bytes.length || 1);
      if (bytes.length < 4_096) assert.equal(read(1), whole);
      assert.equal(read(7), whole);
      const counter = new SseCounter();
      counter.write(bytes, 0, bytes.length);
    },
  });
}

// ---- Discovery ----

const INSTANCE = {
  namespace: "dynamo",
  component: "backend",
  endpoint: "generate",
  instanceId: "00000000000000aa",
  address: "tcp://127.0.0.1:1234",
  pid: 1,
  host: "h",
  startedMs: 1,
};
const CARD = {
  version: 1,
  name: "echo",
  engine: "echo",
  engineVersion: "1",
  contextLength: 4096,
  blockSizeTokens: 16,
  totalBlocks: 256,
  maxSequences: 64,
  maxBatchedTokens: 512,
  dataParallelSize: 1,
  vocabularySize: 259,
  tokenizerSha256: "0".repeat(64),
  tokenizerBytes: 10,
  types: ["chat"],
  created: 1,
};

function discoveryRecords(): AnyTarget {
  return jsonTarget({
    name: "discovery-records",
    about: "instances and model cards as other processes wrote them",
    corpus: [INSTANCE, CARD],
    run(text) {
      let value: JsonValue;
      try {
        value = JSON.parse(text) as JsonValue;
      } catch {
        return;
      }
      const instance = parseInstance(value);
      if (instance !== undefined) {
        assert.match(instance.instanceId, /^[0-9a-f]{16}$/);
        assert.ok(instance.address.length <= 512);
      }
      isModelCard(value);
    },
  });
}

/** A whole store with one damaged file in it. */
async function discoveryStore(): Promise<AnyTarget> {
  const root = join(mkdtempSync(join(tmpdir(), "dynamo-fuzz-")), "store");
  const store = new FileDiscovery({ root, pollMs: 50 });
  const lease = await store.openLease();
  await lease.put("v1/good", 1);
  const reader = new FileDiscovery({ root, pollMs: 50 });
  const hash = "0".repeat(32);
  const folder = join(root, "leases", lease.id);
  const corpus = [
    seal("lease", { leaseId: lease.id, ttlMs: 10_000, holder: { pid: 1, host: "h", machine: "m", startTicks: 1 } }),
    seal("entry", { key: "v1/x", leaseId: lease.id, version: 1, value: INSTANCE }),
    Buffer.from(`${lease.id}\n`.repeat(3)),
  ];
  return targetOf<{ readonly name: string; readonly bytes: Buffer }>({
    name: "discovery-store",
    about: "a store folder with damaged files: what is whole stays listed",
    generate: (random) => ({
      name: pick(random, [
        `${hash}.1`,
        `${hash}.99999999999999999999`,
        "lease",
        "changes",
        "beat",
        "x.y.z",
        `${hash}.-1`,
      ]),
      bytes: mutateBytes(random, corpus),
    }),
    async run({ name, bytes }) {
      const path = name === "changes" ? join(root, "changes") : join(folder, name);
      writeFileSync(path, bytes, name === "changes" ? { flag: "a" } : {});
      const entries = await allowingLater(["discovery-unavailable"], () => reader.list("v1/"));
      assert.ok(entries?.some(({ key }) => key === "v1/good") ?? true, "the whole entry is gone");
      if (name !== "changes" && name !== "lease") rmSync(path, { force: true });
    },
    smaller: function* ({ name, bytes }) {
      for (const smaller of smallerBytes(bytes)) yield { name, bytes: smaller };
    },
    show: ({ name, bytes }) => `${name}: ${showBytes(bytes)}`,
    async close() {
      await reader.close();
      await lease.close();
      await store.close();
      rmSync(join(root, ".."), { recursive: true, force: true });
    },
  });
}

// ---- Command line and configuration ----

const WORDS = ["true", "false", "0", "-1", "1e9", "NaN", "", "8000", "kv", "auto", "😀", "--", "-", "=", "null", "0x10", "99999999999999999999"]; // prettier-ignore

function commandLine(): AnyTarget {
  const folder = mkdtempSync(join(tmpdir(), "dynamo-fuzz-"));
  const path = join(folder, "config.yaml");
  const yaml = [
    "http-port: 8000\nrouter-mode: kv\n",
    'namespace: "a"\nworkers: 2\n# comment\n',
    "a: &a [*a]\n",
    "a: &a [x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\n",
    "__proto__: {http-port: 1}\n",
    "? [complex]\n: key\n",
    "!!js/function 'x'\n",
    "- list\n- of: things\n",
    "http-port: 1\nhttp-port: 2\n",
  ].map((text) => Buffer.from(text));
  return targetOf<{ readonly argv: readonly string[]; readonly env: Record<string, string>; readonly file: Buffer }>({
    name: "command-line",
    about: "resolveOptions: flags, DYN_ variables and YAML; engine arguments as JSON",
    generate(random) {
      const name = pick(random, OPTION_NAMES);
      const flag = (): string =>
        pick(random, [
          `--${pick(random, OPTION_NAMES)}`,
          `--${pick(random, OPTION_NAMES)}=${pick(random, WORDS)}`,
          `--no-${pick(random, OPTION_NAMES)}`,
          `--${pick(random, ["__proto__", "constructor", "x", "help=1"])}`,
          pick(random, WORDS),
          "-x",
        ]);
      return {
        argv: Array.from({ length: below(random, 6) }, flag),
        env: { [specOf(name).env]: pick(random, WORDS), DYN___PROTO__: "1" },
        file: mutateBytes(random, yaml),
      };
    },
    async run({ argv, env, file }) {
      writeFileSync(path, file);
      for (const command of COMMAND_NAMES) {
        await allowingLater(["invalid-config"], () =>
          resolveOptions({ command, argv: [...argv, `--config=${path}`], env }),
        );
      }
      await allowingLater(["invalid-config"], () => readEngineArgs(path));
    },
    smaller: function* ({ argv, env, file }) {
      for (let at = 0; at < argv.length; at++) yield { argv: argv.toSpliced(at, 1), env, file };
      if (Object.keys(env).length > 0) yield { argv, env: {}, file };
      for (const smaller of smallerBytes(file)) yield { argv, env, file: smaller };
    },
    show: ({ argv, env, file }) => JSON.stringify({ argv, env, file: file.toString("utf8") }),
    close: () => rmSync(folder, { recursive: true, force: true }),
  });
}

export const TEXT_TARGETS: Record<string, () => AnyTarget | Promise<AnyTarget>> = {
  "chat-template": chatTemplate,
  sse,
  "discovery-records": discoveryRecords,
  "discovery-store": discoveryStore,
  "command-line": commandLine,
};
