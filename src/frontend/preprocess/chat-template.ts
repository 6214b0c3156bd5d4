import * as library from "@huggingface/jinja";
import { DynamoError } from "../../errors/index.ts";
import type { ChatMessage } from "../../protocol/openai/index.ts";
import { systemClock, type Clock } from "../../std/index.ts";
import { strftime } from "./strftime.ts";

/**
 * A model's chat template: parsed once, rendered per request with the variables that Hugging Face's `apply_chat_template`
 * gives (`messages`, `add_generation_prompt`, `bos_token`, `eos_token`, `tools`, `documents`, `raise_exception`,
 * `strftime_now`, `range`) and the request's own. Templates see copies in the interpreter's own value types, maps and
 * strings without prototypes, so no JavaScript object can be reached from one.
 *
 * The box: the interpreter passes every node of the template through `evaluate`, where steps, the size of every value and
 * the clock are checked, so endless and exploding templates end with `template-failed`. What cannot be interrupted is one
 * built-in operation (a `replace`, a `tojson`); its input is at most the bounded values. A template is the operator's
 * choice, its input is anybody's. Cost: 5 to 150 us per render, see `benchmarks/tokenizer.ts`.
 */
export const TEMPLATE_LIMITS = {
  /** Real templates end near 20 kB. */
  sourceChars: 1024 * 1024,
  outputChars: 8 * 1024 * 1024,
  /** Work units: one per node, more for large values. Real templates need about a thousand per message. */
  steps: 20_000_000,
  /** The event loop stands still meanwhile; real renders stay far below 10 ms. */
  timeMs: 500,
  rangeLength: 100_000,
} as const;

/** The parts of the library that are used; its own declarations do not resolve under Node's rules. */
interface JinjaValue {
  readonly value: unknown;
}

interface JinjaEnvironment {
  set(name: string, value: unknown): unknown;
}

interface JinjaInterpreter {
  run(program: unknown): JinjaValue;
  evaluate(node: unknown, environment: JinjaEnvironment): JinjaValue;
}

const { Template, Environment, Interpreter } = library as unknown as {
  readonly Template: new (source: string) => { readonly parsed: unknown };
  readonly Environment: new () => JinjaEnvironment;
  readonly Interpreter: new (environment: JinjaEnvironment) => JinjaInterpreter;
};

/** Names that a request may not set: they are the template's own or ours. */
const RESERVED: ReadonlySet<string> = new Set([
  "messages",
  "add_generation_prompt",
  "bos_token",
  "eos_token",
  "raise_exception",
  "strftime_now",
  "range",
  "namespace",
  "true",
  "false",
  "none",
  "True",
  "False",
  "None",
]);

export interface TemplateSpecials {
  readonly bosToken: string | undefined;
  readonly eosToken: string | undefined;
}

export interface TemplateInput {
  readonly messages: readonly ChatMessage[];
  readonly addGenerationPrompt: boolean;
  /** More variables; see `ChatRequest.chatTemplateArgs`. */
  readonly args: Readonly<Record<string, unknown>>;
}

export class ChatTemplate {
  readonly #program: unknown;
  readonly #specials: TemplateSpecials;
  readonly #clock: Clock;

  /** The clock serves `strftime_now` and the limit of a render. Throws `model-file-invalid`. */
  constructor(source: string, specials: TemplateSpecials, clock: Clock = systemClock) {
    if (source.length > TEMPLATE_LIMITS.sourceChars) {
      throw invalidTemplate(`expected at most ${TEMPLATE_LIMITS.sourceChars} characters, got ${source.length}`);
    }
    try {
      this.#program = new Template(source).parsed;
    } catch (cause) {
      throw invalidTemplate("it does not parse", cause);
    }
    this.#specials = specials;
    this.#clock = clock;
  }

  /** Throws `template-failed` or, for a variable that a request may not set, `invalid-field`. */
  render(input: TemplateInput): string {
    let chars = 0;
    for (const message of input.messages) chars += message.content.length;
    if (chars > TEMPLATE_LIMITS.outputChars) throw failed(OVER_SIZE);
    try {
      const interpreter = new BoxedInterpreter(this.#environment(input), this.#clock);
      const { value } = interpreter.run(this.#program);
      if (typeof value !== "string") throw failed("the chat template gave no text");
      return value;
    } catch (thrown) {
      if (thrown instanceof DynamoError) throw thrown;
      // The interpreter's own complaints name types and variables of the template, not message texts.
      throw failed("the chat template could not be applied to these messages", thrown);
    }
  }

  #environment({ messages, addGenerationPrompt, args }: TemplateInput): JinjaEnvironment {
    const environment = new Environment();
    for (const [name, value] of CONSTANTS) environment.set(name, value);
    environment.set("raise_exception", raiseException);
    environment.set("range", range);
    environment.set("strftime_now", (format: unknown) => strftime(new Date(this.#clock.wallMs()), String(format)));
    environment.set("messages", messages);
    environment.set("add_generation_prompt", addGenerationPrompt);
    environment.set("bos_token", this.#specials.bosToken ?? "");
    environment.set("eos_token", this.#specials.eosToken ?? "");
    for (const name of ["tools", "documents"]) if (!Object.hasOwn(args, name)) environment.set(name, null);
    for (const [name, value] of Object.entries(args)) {
      if (RESERVED.has(name)) {
        const param = `chat_template_kwargs.${name}`;
        throw new DynamoError("invalid-field", `${param}: expected a variable that is not set already`, { param });
      }
      environment.set(name, value);
    }
    return environment;
  }
}

/** The interpreter with a budget; good for one render. */
class BoxedInterpreter extends Interpreter {
  #steps = 0;
  #nextClockCheck = CLOCK_CHECK_STEPS;
  readonly #clock: Clock;
  readonly #deadlineMs: number;

  constructor(environment: JinjaEnvironment, clock: Clock) {
    super(environment);
    this.#clock = clock;
    this.#deadlineMs = clock.monotonicMs() + TEMPLATE_LIMITS.timeMs;
  }

  override evaluate(node: unknown, environment: JinjaEnvironment): JinjaValue {
    const result = super.evaluate(node, environment);
    const { value } = result;
    let size = 0;
    if (typeof value === "string" || Array.isArray(value)) size = value.length;
    else if (value instanceof Map) size = value.size;
    if (size > TEMPLATE_LIMITS.outputChars) throw failed(OVER_SIZE);
    // Work on a large value is charged where the value comes up, at 64 characters a step.
    this.#steps += 1 + (size >>> 6);
    if (this.#steps > this.#nextClockCheck) this.#checkBudget();
    return result;
  }

  #checkBudget(): void {
    this.#nextClockCheck = this.#steps + CLOCK_CHECK_STEPS;
    if (this.#steps > TEMPLATE_LIMITS.steps || this.#clock.monotonicMs() > this.#deadlineMs) {
      throw failed("the chat template took too long for these messages");
    }
  }
}

/** Well under a millisecond of ordinary work. */
const CLOCK_CHECK_STEPS = 4_096;
const OVER_SIZE = `the chat template's text is over ${TEMPLATE_LIMITS.outputChars} characters`;

const CONSTANTS: readonly (readonly [string, boolean | null])[] = [
  ["true", true],
  ["True", true],
  ["false", false],
  ["False", false],
  ["none", null],
  ["None", null],
];

/** What templates call to refuse messages; the text is the template author's and is meant for the caller. */
function raiseException(message: unknown): never {
  throw failed(`the model's chat template refused the messages: ${String(message).slice(0, 500)}`);
}

/** Python's `range`, bounded. */
function range(start: number, stop?: number, step = 1): number[] {
  const [from, to] = stop === undefined ? [0, start] : [start, stop];
  const length = Math.max(0, Math.ceil((to - from) / step));
  if (!(length <= TEMPLATE_LIMITS.rangeLength)) {
    throw failed(`the chat template asked for a range of more than ${TEMPLATE_LIMITS.rangeLength} numbers`);
  }
  return Array.from({ length }, (_, index) => from + index * step);
}

function failed(message: string, cause?: unknown): DynamoError {
  return new DynamoError("template-failed", message, { param: "messages", ...causeOf(cause) });
}

function invalidTemplate(detail: string, cause?: unknown): DynamoError {
  return new DynamoError("model-file-invalid", `chat template: ${detail}`, causeOf(cause));
}

function causeOf(cause: unknown): { cause?: unknown; diagnostic?: string } {
  return cause instanceof Error ? { cause, diagnostic: cause.message } : {};
}
