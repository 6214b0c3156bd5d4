import assert from "node:assert/strict";
import { test } from "node:test";
import { until } from "../helpers/in-process-cluster.ts";
import { RoleProcesses, streamCompletion, type RoleProcess } from "../helpers/role-processes.ts";

/**
 * Every process of a cluster is told to leave and started anew, one after the other, while clients go on asking: not one
 * answer is lost or changed. Workers and routers are nobody's concern but ours. A frontend is: clients are sent to the other
 * one from its first 503 on, which says that nothing of the request was begun, as a load balancer does that looks at /health.
 */
const CLIENTS = 12;
const NOT_BEGUN = /^503 .*shutting down/;

test(
  "rolling restart of every process under load: no request fails, no answer changes",
  { timeout: 170_000 },
  async (t) => {
    const roles = new RoleProcesses();
    try {
      const startRouter = (): Promise<RoleProcess> => roles.start("router", "--router-mode=kv");
      const startWorker = (): Promise<RoleProcess> =>
        roles.start("mocker", "--model-name=mock", "--graceful-shutdown-timeout-secs=0.5");
      const startFrontend = (): Promise<RoleProcess> =>
        roles.start("frontend", "--http-port=0", "--router-service", "--graceful-shutdown-grace-period-secs=5");
      const [routers, workers, frontends] = await Promise.all([
        Promise.all([startRouter(), startRouter()]),
        Promise.all([startWorker(), startWorker()]),
        Promise.all([startFrontend(), startFrontend()]),
      ]);
      const urlOf = ({ facts }: RoleProcess): string => `http://127.0.0.1:${facts["port"]}`;
      let urls = frontends.map(urlOf);
      const serves = async (url: string, count: number): Promise<void> =>
        until(async () => {
          const health = (await (await fetch(`${url}/health`)).json()) as { instances: { problem?: string }[] };
          return health.instances.filter(({ problem }) => problem === undefined).length === count;
        }, `${count} workers at ${url}`);
      await Promise.all(urls.map((url) => serves(url, workers.length)));

      const body = (i: number): object => ({
        model: "mock",
        prompt: `Prompt ${i % 5} ${"about the sea ".repeat(4)}`,
        max_tokens: i % 3 === 0 ? 120 : 20,
        ...(i % 2 === 0 ? { temperature: 0 } : { temperature: 1, seed: i % 10 }),
      });
      const expected = new Map<string, string>();
      const undisturbed = async (i: number): Promise<void> => {
        const answer = await streamCompletion(urls[0]!, body(i));
        assert.equal(answer.error, undefined);
        expected.set(JSON.stringify(body(i)), answer.text);
      };
      await Promise.all(Array.from({ length: 30 }, (_, i) => undisturbed(i)));

      let isOver = false;
      let served = 0;
      let elsewhere = 0;
      const client = async (first: number): Promise<void> => {
        for (let i = first; !isOver; i += CLIENTS) {
          for (let attempt = 0; ; attempt++) {
            const url = urls[(i + attempt) % urls.length]!;
            const answer = await streamCompletion(url, body(i));
            if (answer.error !== undefined && NOT_BEGUN.test(answer.error) && attempt < 4) {
              elsewhere++;
              urls = urls.filter((other) => other !== url);
              continue;
            }
            assert.equal(answer.error, undefined, roles.output);
            assert.equal(answer.text, expected.get(JSON.stringify(body(i % 30))));
            break;
          }
          served++;
        }
      };
      const clients = Array.from({ length: CLIENTS }, (_, i) => client(i));
      const load = Promise.all(clients);
      load.catch(() => undefined);

      const leave = async (role: RoleProcess): Promise<void> => {
        role.child.kill("SIGTERM");
        assert.equal(await Promise.race([role.exited, load.then(() => -1)]), 0, roles.output);
      };
      const more = async (count: number): Promise<void> => {
        const from = served;
        await Promise.race([until(() => served >= from + count, `${count} more answers`, 60_000), load]);
      };
      for (const [i, worker] of workers.entries()) {
        await more(10);
        await leave(worker);
        workers[i] = await startWorker();
        await Promise.all(urls.map((url) => serves(url, workers.length)));
      }
      for (const router of routers) {
        await more(10);
        await leave(router);
        await startRouter();
      }
      for (const frontend of frontends) {
        await more(10);
        await leave(frontend);
        const next = await startFrontend();
        await serves(urlOf(next), workers.length);
        urls = [...urls, urlOf(next)];
      }
      await more(10);
      isOver = true;
      await load;
      t.diagnostic(`${served} answers through six restarts, ${elsewhere} of them asked again at the other frontend`);
    } finally {
      await roles.stop();
    }
  },
);
