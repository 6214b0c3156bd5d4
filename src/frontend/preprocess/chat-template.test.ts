import assert from "node:assert/strict";
import { test } from "node:test";
import { Template } from "@huggingface/jinja";
import { packageArtifact } from "../../../test/fixtures/corpus/tokenizer-artifacts.ts";
import { DynamoError } from "../../errors/index.ts";
import { ManualClock } from "../../std/index.ts";
import { ChatTemplate, TEMPLATE_LIMITS } from "./chat-template.ts";

const SPECIALS = { bosToken: "<s>", eosToken: "</s>" } as const;
const USER = [{ role: "user", content: "hi" }] as const;

function render(
  source: string,
  args: Record<string, unknown> = {},
  messages: readonly { role: string; content: string }[] = USER,
): string {
  return new ChatTemplate(source, SPECIALS).render({ messages, addGenerationPrompt: true, args });
}

function assertFails(run: () => unknown, message: RegExp): void {
  assert.throws(run, (error) => {
    assert.ok(error instanceof DynamoError);
    assert.equal(error.reason, "template-failed");
    assert.match(error.message, message);
    return true;
  });
}

test("real templates render as the library renders them", () => {
  const messages = [
    { role: "system", content: "Be brief." },
    { role: "user", content: "  What is 2+2? " },
    { role: "assistant", content: "<think>\neasy\n</think>\n\n4" },
    { role: "user", content: "Sure?" },
  ];
  for (const name of ["qwen3", "llama3"] as const) {
    const { chatTemplate, bosToken } = packageArtifact(name);
    const template = new ChatTemplate(chatTemplate as string, { bosToken, eosToken: undefined });
    for (const args of [{}, { enable_thinking: false }]) {
      const variables = { messages, add_generation_prompt: true, bos_token: bosToken ?? "", ...args };
      const expected = new Template(chatTemplate as string).render(variables);
      assert.equal(template.render({ messages, addGenerationPrompt: true, args }), expected);
    }
  }
});

test("a template sees the variables that transformers gives it", () => {
  const source =
    "{{ bos_token }}|{{ eos_token }}|{{ add_generation_prompt }}|{{ tools is none }}|{{ documents is none }}|{{ custom.a[1] }}";
  assert.equal(render(source, { custom: { a: [1, "two"] } }), "<s>|</s>|true|true|true|two");
  assert.equal(render("{{ tools | length }}", { tools: [1, 2] }), "2");
  const dated = new ChatTemplate("{{ strftime_now('%d %b %Y') }}", SPECIALS, new ManualClock(Date.UTC(2026, 6, 4, 12)));
  assert.equal(dated.render({ messages: USER, addGenerationPrompt: true, args: {} }), "04 Jul 2026");
});

test("tojson keeps non-ASCII and Python's separators, and takes an indent", () => {
  assert.equal(render("{{ x | tojson }}", { x: { a: [1, "é"], b: null } }), '{"a": [1, "é"], "b": null}');
  assert.equal(render("{{ x | tojson(indent=2) }}", { x: { a: 1 } }), '{\n  "a": 1\n}');
});

test("raise_exception refuses the messages with the template author's text", () => {
  assertFails(
    () => render("{{ raise_exception('Roles must alternate') }}"),
    /refused the messages: Roles must alternate$/,
  );
});

test("what the interpreter complains about is a failed template, not a crash", () => {
  assertFails(() => render("{{ messages[0].content + none_such.x.y }}"), /could not be applied/);
  assertFails(() => render("{{ 1 + none }}"), /could not be applied/);
  assertFails(() => render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), /could not be applied|too long/);
});

test("an endless template ends within its time box", () => {
  const started = performance.now();
  assertFails(
    () => render("{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a + b %}{% endfor %}{% endfor %}"),
    /took too long/,
  );
  assert.ok(performance.now() - started < TEMPLATE_LIMITS.timeMs * 4);
});

test("a loop over large texts is stopped by the clock too", () => {
  const started = performance.now();
  const big = [{ role: "user", content: "x".repeat(1_000_000) }];
  assertFails(
    () =>
      render(
        "{% for a in range(99999) %}{% set c = messages[0].content | upper | replace('X', 'y') %}{% endfor %}",
        {},
        big,
      ),
    /took too long/,
  );
  assert.ok(performance.now() - started < TEMPLATE_LIMITS.timeMs * 6);
});

test("a text that doubles, a range and a message beyond the limits are refused", () => {
  assertFails(
    () =>
      render(
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
      ),
    /over \d+ characters/,
  );
  assertFails(
    () =>
      render("{% for i in range(10000) %}{{ messages[0].content }}{% endfor %}", {}, [
        { role: "user", content: "x".repeat(10_000) },
      ]),
    /over \d+ characters/,
  );
  assertFails(() => render("{% for i in range(1000000000) %}{% endfor %}"), /range of more than/);
  assertFails(() => render("{{ range(0, 10, 0) }}"), /range of more than/);
  assertFails(
    () => render("x", {}, [{ role: "user", content: "x".repeat(TEMPLATE_LIMITS.outputChars + 1) }]),
    /over \d+ characters/,
  );
});

test("ranges count as Python's do", () => {
  assert.equal(
    render(
      "{{ range(3) | join(',') }} {{ range(1, 8, 3) | join(',') }} {{ range(3, 0, -1) | join(',') }} {{ range(3, 1) | join(',') }}",
    ),
    "0,1,2 1,4,7 3,2,1 ",
  );
});

test("no JavaScript object can be reached from a template", () => {
  for (const name of ["constructor", "__proto__", "prototype", "toString", "valueOf", "hasOwnProperty"]) {
    for (const value of [
      "messages",
      "messages[0]",
      "messages[0].content",
      "range",
      "raise_exception",
      "custom",
      "1",
      "true",
    ]) {
      assert.equal(render(`{{ ${value}.${name} is defined }}`, { custom: {} }), "false", `${value}.${name}`);
    }
    assert.equal(render(`{{ ${name} is defined }}`), "false");
  }
  assert.equal(
    render("{{ process is defined }} {{ globalThis is defined }} {{ require is defined }}"),
    "false false false",
  );
  const polluting = JSON.parse('{"__proto__": {"polluted": true}}') as Record<string, unknown>;
  render("{{ custom }}", { custom: polluting });
  assert.equal(({} as Record<string, unknown>).polluted, undefined);
});

test("a request cannot replace what the template is given", () => {
  for (const name of ["messages", "bos_token", "raise_exception", "range", "add_generation_prompt"]) {
    assert.throws(() => render("x", { [name]: 1 }), { reason: "invalid-field", param: `chat_template_kwargs.${name}` });
  }
});

test("variables nested without end are a failed template", () => {
  const deep = JSON.parse("[".repeat(100_000) + "]".repeat(100_000)) as unknown;
  assertFails(() => render("{{ deep | tojson }}", { deep }), /could not be applied/);
});

test("a template that does not parse or is too large is a damaged model file", () => {
  for (const source of [
    "{% for x in %}",
    "{% if a %}",
    "{{ 'x",
    "{{ a b }}",
    "x".repeat(TEMPLATE_LIMITS.sourceChars + 1),
  ]) {
    assert.throws(() => new ChatTemplate(source, SPECIALS), { reason: "model-file-invalid" });
  }
  const nested = "{{ " + "(".repeat(200_000) + "1" + ")".repeat(200_000) + " }}";
  assert.throws(() => new ChatTemplate(nested, SPECIALS), { reason: "model-file-invalid" });
});

test("renders do not share state", () => {
  const template = new ChatTemplate("{% set x = (x or 0) + 1 %}{{ x }}{{ messages[0].content }}", SPECIALS);
  const input = { messages: USER, addGenerationPrompt: true, args: {} };
  assert.equal(template.render(input), "1hi");
  assert.equal(template.render(input), "1hi");
});
