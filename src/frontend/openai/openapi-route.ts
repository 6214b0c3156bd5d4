import type { FrontendLimits } from "../config.ts";
import type { Route } from "../http/server.ts";

/** `GET /openapi.json`. The schema library is loaded and the document built at the first request, then kept as text. */
export function openApiRoute(limits: FrontendLimits, version: string): Route {
  let document: Promise<string> | undefined;
  const build = async (): Promise<string> => {
    const { openApiDocument } = await import("./openapi.ts");
    return JSON.stringify(openApiDocument(limits, version));
  };
  return {
    method: "GET",
    path: "/openapi.json",
    family: "plain",
    handle: async (exchange) => exchange.jsonText(200, await (document ??= build())),
  };
}
