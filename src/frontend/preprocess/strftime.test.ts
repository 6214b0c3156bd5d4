import assert from "node:assert/strict";
import { test } from "node:test";
import { strftime } from "./strftime.ts";

const date = new Date(2026, 6, 4, 9, 5, 7);

test("directives give what Python gives in the C locale", () => {
  assert.equal(strftime(date, "%d %b %Y"), "04 Jul 2026");
  assert.equal(
    strftime(date, "%A, %B %e, %Y (%a) day %j week day %w"),
    "Saturday, July  4, 2026 (Sat) day 185 week day 6",
  );
  assert.equal(strftime(date, "%Y-%m-%dT%H:%M:%S %I%p %y"), "2026-07-04T09:05:07 09AM 26");
  assert.equal(strftime(date, "%F %T %D %R %h"), "2026-07-04 09:05:07 07/04/26 09:05 Jul");
  assert.equal(strftime(date, "%-d/%-m/%-H %-j"), "4/7/9 185");
  assert.equal(strftime(new Date(2024, 11, 31, 12), "%j %I%p"), "366 12PM");
  assert.equal(strftime(new Date(2024, 0, 1, 0), "%j %I%p"), "001 12AM");
});

test("a percent sign, unknown directives and other text stay", () => {
  assert.equal(strftime(date, "100%% %q %Q x%"), "100% %q %Q x%");
});
