import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { Compile } from "typebox/compile";
import { DynamoError } from "../../errors/index.ts";
import { DEFAULT_LIMITS } from "../config.ts";
import { RawClient, startServer } from "../http/testing.ts";
import { openApiDocument } from "./openapi.ts";
import { openApiRoute } from "./openapi-route.ts";
import { chatRequestSchema, completionRequestSchema } from "./schemas.ts";
import { CHAT_FIELD_NAMES, readChatRequest } from "./validate-chat.ts";
import { COMPLETION_FIELD_NAMES, readCompletionRequest } from "./validate-completion.ts";

const limits = { ...DEFAULT_LIMITS, n: 4, stopStrings: 3, messages: 3, prompts: 8 };

/** Values near the edges of what any field takes. */
const scalars = fc.oneof(
  fc.constantFrom<unknown>(
    null,
    true,
    false,
    0,
    1,
    -1,
    2,
    0.5,
    -2,
    2.1,
    -2.1,
    3,
    4,
    5,
    20,
    21,
    1e10,
    2 ** 31,
    2 ** 31 - 1,
  ),
  fc.constantFrom<unknown>(
    "",
    "a",
    "text",
    "user",
    "none",
    "auto",
    "medium",
    "low",
    "24h",
    "default",
    "x".repeat(1_001),
  ),
  fc.integer({ min: -3, max: 70 }),
  fc.double({ noNaN: true, noDefaultInfinity: true }),
);
const keys = fc.constantFrom(
  "type",
  "text",
  "role",
  "content",
  "name",
  "include_usage",
  "1",
  "50256",
  "01",
  "messages",
  "enable_thinking",
  "a b",
  "constructor",
  "tool_call_id",
  "refusal",
  "annotations",
  "tool_calls",
);
const part = fc.record({ type: fc.constantFrom<unknown>("text", "image_url", 1), text: scalars }, { requiredKeys: [] });
const messageContent = fc.oneof(scalars, fc.array(part, { maxLength: 2 }));
const message = fc.record(
  {
    role: fc.constantFrom<unknown>("system", "developer", "user", "assistant", "tool", "bot", 1),
    content: messageContent,
    name: scalars,
    refusal: scalars,
    annotations: fc.oneof(scalars, fc.constant([])),
    tool_calls: fc.constantFrom<unknown>(null, [], [{}]),
    tool_call_id: scalars,
    extra: scalars,
  },
  { requiredKeys: ["role", "content"] },
);
const sensibleMessage = fc.record({
  role: fc.constantFrom("system", "user", "assistant", "tool"),
  content: fc.string(),
});
const { tree } = fc.letrec((tie) => ({
  tree: fc.oneof(
    { weight: 4, arbitrary: scalars },
    { weight: 1, arbitrary: fc.array(tie("tree"), { maxLength: 4 }) },
    { weight: 1, arbitrary: fc.dictionary(keys, tie("tree"), { maxKeys: 3 }) },
    {
      weight: 1,
      arbitrary: fc.constantFrom<unknown>(["text"], { type: "text" }, [1, 2], [[1], [2]], ["a", "b"], ["a", 1]),
    },
  ),
}));

const hint = fc.oneof(scalars, fc.constantFrom<unknown>(2 ** 32 - 1, 2 ** 32, -(2 ** 31), -(2 ** 31) - 1));
const nvext = fc.oneof(
  { weight: 1, arbitrary: tree },
  {
    weight: 4,
    arbitrary: fc.record(
      {
        agent_hints: fc.oneof(
          scalars,
          fc.record({ priority: hint, strict_priority: hint, osl: hint, other: hint }, { requiredKeys: [] }),
          fc.record({ priority: hint, osl: fc.integer({ min: 0, max: 9 }) }, { requiredKeys: [] }),
        ),
        extra_fields: fc.oneof(
          scalars,
          fc.array(fc.constantFrom<unknown>("routing", "worker_id", "routing", "timing", 1), { maxLength: 17 }),
        ),
        backend_instance_id: fc.constantFrom<unknown>(null, "0123456789abcdef", "0123456789ABCDEF", "0123", 7),
        cache_salt: fc.constantFrom<unknown>(null, "", "tenant", "x".repeat(256), "x".repeat(257), 7),
        other: scalars,
      },
      { requiredKeys: [] },
    ),
  },
);

function accepts(read: () => unknown): boolean {
  try {
    read();
    return true;
  } catch (thrown) {
    assert.ok(thrown instanceof DynamoError, String(thrown));
    assert.ok(["invalid-field", "unknown-field", "unsupported-field"].includes(thrown.reason));
    return false;
  }
}

/** What makes the rules between fields hold, so that only the field itself decides. */
function companions(field: string, value: unknown): Record<string, unknown> {
  switch (field) {
    case "stream_options":
      return { stream: true };
    case "top_logprobs":
      return { logprobs: true };
    case "min_tokens":
      return { max_tokens: 2 ** 31 - 1 };
    case "best_of":
      return typeof value === "number" && value >= 1 && value <= limits.n ? { n: value } : {};
    default:
      return {};
  }
}

test("openapi: the chat validator and the published schema accept the same fields and values", () => {
  const schema = chatRequestSchema(limits);
  assert.deepEqual(
    Object.keys((schema as unknown as { properties: object }).properties).sort(),
    [...CHAT_FIELD_NAMES].sort(),
  );
  const checker = Compile(schema);
  const field = fc.constantFrom(...CHAT_FIELD_NAMES, "nvext", "nvext", "unknown", "messages", "messages", "messages");
  const messages = fc.oneof(
    tree,
    fc.array(message, { minLength: 1, maxLength: 2 }),
    fc.array(sensibleMessage, { maxLength: 4 }),
  );
  let accepted = 0;
  fc.assert(
    fc.property(field, tree, messages, nvext, (name, other, messageList, extension) => {
      const fieldValue = name === "messages" ? messageList : name === "nvext" ? extension : other;
      // Keys below the first level are a rule that the schema cannot say.
      fc.pre(!name.startsWith("chat_template") || !JSON.stringify(other).includes('"constructor"'));
      const base = { model: "m", messages: [{ role: "user", content: "hi" }] };
      const body = { ...base, ...companions(name, fieldValue), [name]: fieldValue };
      const taken = accepts(() => readChatRequest(body, limits));
      assert.equal(taken, checker.Check(body), JSON.stringify({ [name]: fieldValue }));
      if (taken) accepted++;
    }),
    { numRuns: 6_000 },
  );
  assert.ok(accepted > 500, "the generator reaches both sides");
});

test("openapi: the completion validator and the published schema accept the same fields and values", () => {
  const schema = completionRequestSchema(limits);
  assert.deepEqual(
    Object.keys((schema as unknown as { properties: object }).properties).sort(),
    [...COMPLETION_FIELD_NAMES].sort(),
  );
  const checker = Compile(schema);
  const prompt = fc.oneof(
    fc.array(fc.oneof(fc.string(), fc.nat()), { maxLength: 9 }),
    fc.array(fc.string({ minLength: 1 }), { maxLength: 9 }),
    fc.array(fc.array(fc.oneof({ weight: 9, arbitrary: fc.nat() }, { weight: 1, arbitrary: scalars })), {
      maxLength: 9,
    }),
  );
  let accepted = 0;
  fc.assert(
    fc.property(
      fc.constantFrom(...COMPLETION_FIELD_NAMES, "prompt", "unknown"),
      tree,
      prompt,
      (field, other, prompts) => {
        const fieldValue = field === "prompt" ? prompts : other;
        // best_of over n is a rule between fields.
        fc.pre(field !== "best_of" || typeof fieldValue !== "number" || !(fieldValue > limits.n));
        const body = { model: "m", prompt: "hi", ...companions(field, fieldValue), [field]: fieldValue };
        const taken = accepts(() => readCompletionRequest(body, limits));
        assert.equal(taken, checker.Check(body), JSON.stringify({ [field]: fieldValue }));
        if (taken) accepted++;
      },
    ),
    { numRuns: 6_000 },
  );
  assert.ok(accepted > 500, "the generator reaches both sides");
});

test("openapi: the document is served once built, and every reference in it leads somewhere", async (t) => {
  const { port } = await startServer(t, [openApiRoute(limits, "1.2.3")]);
  const client = await RawClient.open(t, port);
  const answer = await client.get("/openapi.json").answer();
  assert.equal(answer.status, 200);
  const document = JSON.parse(answer.body) as ReturnType<typeof openApiDocument>;
  assert.equal(document.openapi, "3.1.0");
  assert.equal(document.info.version, "1.2.3");
  for (const [, name] of answer.body.matchAll(/"#\/components\/schemas\/(\w+)"/g)) {
    assert.ok(name! in document.components.schemas, name!);
  }
  assert.deepEqual(document, JSON.parse(JSON.stringify(openApiDocument(limits, "1.2.3"))));
  assert.equal((await client.get("/openapi.json").answer()).body, answer.body);
});
