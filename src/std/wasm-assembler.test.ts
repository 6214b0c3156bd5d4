import assert from "node:assert/strict";
import { test } from "node:test";
import { WasmFunction, assembleWasm, doWhile, f32x4, i32, i64, instantiateWasm, v128, when } from "./wasm-assembler.ts";

void test("wasm assembler: a loop over memory runs and gives its result", () => {
  const sum = new WasmFunction("sum", ["i32"], "i32");
  const end = sum.parameter(0);
  const at = sum.local("i32");
  const total = sum.local("i32");
  sum.body(
    doWhile(
      [...total.set(i32.add(total.get, i32.load(at.get, 8))), ...at.set(i32.add(at.get, i32.const(4)))],
      i32.lessUnsigned(at.get, end.get),
    ),
    total.get,
  );
  const wasm = instantiateWasm<{ sum(end: number): number }>({ functions: [sum], memoryPages: 1 });
  assert.ok(wasm);
  new Int32Array(wasm.memory.buffer).set([0, 0, 5, -7, 100_000, 3]);
  assert.equal(wasm.functions.sum(16), 100_001);
});

void test("wasm assembler: constants of every size survive their encoding", () => {
  for (const value of [0n, 1n, 63n, 64n, -1n, -64n, -65n, 0x7fffffffffffffffn, -0x8000000000000000n, 1234567890123n]) {
    const constant = new WasmFunction("constant", [], "i64");
    constant.body(i64.const(value));
    const wasm = instantiateWasm<{ constant(): bigint }>({ functions: [constant], memoryPages: 0 });
    assert.equal(wasm?.functions.constant(), value);
  }
});

void test("wasm assembler: branches choose, and vector comparisons pass over NaN", () => {
  const choose = new WasmFunction("choose", ["i32"], "i32");
  const result = choose.local("i32");
  choose.body(when(choose.parameter(0).get, result.set(i32.const(-5)), result.set(i32.const(9))), result.get);
  const any = new WasmFunction("any", [], "i32");
  any.body(v128.isAnyTrue(f32x4.greater(v128.load(i32.const(0)), f32x4.splat([0x43, 0, 0, 0, 0]))));
  const wasm = instantiateWasm<{ choose(flag: number): number; any(): number }>({
    functions: [choose, any],
    memoryPages: 1,
  });
  assert.ok(wasm);
  assert.equal(wasm.functions.choose(1), -5);
  assert.equal(wasm.functions.choose(0), 9);
  const floats = new Float32Array(wasm.memory.buffer);
  floats.set([NaN, -1, 0, NaN]);
  assert.equal(wasm.functions.any(), 0);
  floats[2] = 1;
  assert.equal(wasm.functions.any(), 1);
});

void test("wasm assembler: a module with many functions has a valid header", () => {
  const functions = Array.from({ length: 200 }, (_, i) => {
    const each = new WasmFunction(`f${i}`, [], "i32");
    each.body(i32.const(i));
    return each;
  });
  assert.deepEqual([...assembleWasm({ functions, memoryPages: 1 }).subarray(0, 8)], [0, 0x61, 0x73, 0x6d, 1, 0, 0, 0]);
  const wasm = instantiateWasm<Record<string, () => number>>({ functions, memoryPages: 1 });
  assert.equal(wasm?.functions["f199"]?.(), 199);
});

void test("wasm assembler: what does not compile gives undefined", () => {
  const broken = new WasmFunction("broken", [], "i32");
  broken.body([0xff]);
  assert.equal(instantiateWasm({ functions: [broken], memoryPages: 1 }), undefined);
});
