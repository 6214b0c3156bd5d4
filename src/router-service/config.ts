import type { RouterConfig, RouterMode } from "../router/index.ts";

/** What a router service needs to know; `cli/` fills it from flags, environment and file. */
export interface RouterServiceConfig {
  readonly namespace: string;
  /** One of ours, or the name of a policy that was registered. */
  readonly routerMode: RouterMode | (string & {});
  /** What is not given has Dynamo's default. */
  readonly router?: Partial<RouterConfig>;
  /** Router services tell each other what they have on the workers. @default false */
  readonly replicaSync?: boolean;
  /** Of `/health`, `/live` and `/metrics` on loopback; 0 = any free port, undefined = not served. */
  readonly systemPort: number | undefined;
}
