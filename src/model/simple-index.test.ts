import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { readPipConfig } from "./pip-config.ts";
import { findWheel, normalizedProject, parseSimplePage } from "./simple-index.ts";

const sha256 = "ab".repeat(32);
const page = "https://index.test/simple/llm-demo/";

test("simple index: JSON and HTML pages give the same files", () => {
  const html = `<!doctype html><a href="https://old.test/llm_demo-0.1.tar.gz">x</a>
    <a data-requires-python="&gt;=3.9" href='../../files/llm_demo-0.2-py3-none-any.whl?a=1&amp;b=2#sha256=${sha256}'>llm_demo</a>`;
  const json = JSON.stringify({
    files: [
      { filename: "llm_demo-0.1.tar.gz", url: "https://old.test/llm_demo-0.1.tar.gz", hashes: {} },
      {
        filename: "llm_demo-0.2-py3-none-any.whl",
        url: "../../files/llm_demo-0.2-py3-none-any.whl?a=1&b=2",
        hashes: { sha256 },
      },
      { filename: 7, url: "x" },
    ],
  });
  const expected = [
    { filename: "llm_demo-0.1.tar.gz", url: "https://old.test/llm_demo-0.1.tar.gz" },
    {
      filename: "llm_demo-0.2-py3-none-any.whl",
      url: "https://index.test/files/llm_demo-0.2-py3-none-any.whl?a=1&b=2",
      sha256,
    },
  ];
  assert.deepEqual(parseSimplePage(html, "text/html; charset=utf-8", page), expected);
  assert.deepEqual(parseSimplePage(json, "application/vnd.pypi.simple.v1+json", page), expected);
  assert.equal(findWheel(expected, "LLM.Demo", "0.2"), expected[1]);
  assert.equal(findWheel(expected, "llm-demo", "0.1"), undefined, "a source archive is no wheel");
  assert.equal(findWheel(expected, "llm", "0.2"), undefined);
});

test("simple index: project names are normalized as PEP 503 says", () => {
  assert.equal(normalizedProject("LLM__Smol.-Lm2"), "llm-smol-lm2");
});

test("pip configuration: variables win over files, indexes that are no HTTP are left to pip", () => {
  const folder = mkdtempSync(join(tmpdir(), "pip-test-"));
  try {
    const file = join(folder, "pip.conf");
    writeFileSync(
      file,
      "; comment\n[install]\nindex-url = https://wrong.test\n[global]\nindex_url = https://a.test/simple\nextra-index-url =\n  https://b.test/simple\n  file:///srv/c\ncert: /etc/ca.pem\n",
    );
    const env = { PIP_CONFIG_FILE: file, HOME: folder };
    assert.deepEqual(readPipConfig(env).indexUrls.slice(0, 2), ["https://a.test/simple", "https://b.test/simple"]);
    assert.equal(readPipConfig(env).cert, "/etc/ca.pem");
    assert.equal(readPipConfig({ ...env, PIP_CERT: "/other.pem" }).cert, "/other.pem");
    assert.equal(readPipConfig({ ...env, PIP_INDEX_URL: "https://c.test" }).indexUrls[0], "https://c.test");
    const off = readPipConfig({ PIP_CONFIG_FILE: "/dev/null" });
    assert.equal(off.indexUrls.length, 0);
    assert.equal(off.cert, undefined);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
