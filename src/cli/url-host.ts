/** An address as it stands in a URL: IPv6 in brackets, wildcards as what a client on this machine would type. */
export function urlHost(host: string): string {
  if (host === "0.0.0.0" || host === "::" || host === "") return "127.0.0.1";
  return host.includes(":") ? `[${host}]` : host;
}
