import { parseArgs } from "node:util";
import { failureText } from "./fuzzer.ts";
import { TARGETS } from "./targets/index.ts";
import { Watchdog } from "./watchdog.ts";

/** `npm run fuzz -- [--target=NAME[,NAME]] [--seconds=N] [--seed=N] [--case=N]`; without a target, each for N seconds. */
const { values } = parseArgs({
  options: {
    target: { type: "string" },
    seconds: { type: "string", default: "10" },
    seed: { type: "string" },
    case: { type: "string" },
  },
});
const names = values.target === undefined ? Object.keys(TARGETS) : values.target.split(",");
const seed = values.seed === undefined ? Math.floor(Math.random() * 2 ** 31) : Number(values.seed);
let failed = 0;
for (const name of names) {
  const make = TARGETS[name];
  if (make === undefined) {
    console.error(`no target ${name}; there are: ${Object.keys(TARGETS).join(", ")}`);
    process.exit(2);
  }
  const target = await make();
  const watchdog = new Watchdog(name, seed);
  const report = await target.fuzz({
    seed,
    durationMs: Number(values.seconds) * 1_000,
    ...(values.case === undefined ? {} : { onlyCase: Number(values.case) }),
    onCase: (index) => watchdog.at(index),
  });
  await watchdog.close();
  await target.close();
  const { caseCount, slowestMs } = report;
  console.log(
    `${name.padEnd(24)} seed ${seed}  ${String(caseCount).padStart(8)} cases  slowest ${slowestMs.toFixed(1)} ms`,
  );
  if (report.failure !== undefined) {
    failed++;
    console.log(`\n${failureText(report)}\n`);
  }
}
process.exit(failed === 0 ? 0 : 1);
