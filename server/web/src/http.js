// Requests with the user's token: asked for once, renewed before it expires, and once more when it is refused.

export class StatusError extends Error {
  /**
   * @param {string} code as the server names it, or one of ours, see client.d.ts
   * @param {string} [message] the server's, where it has said something
   * @param {{status?: number, delay?: number, final?: boolean, token?: boolean}} [more] `delay`: milliseconds to stay away;
   *   `final`: trying again is of no use; `token`: it would be with another token
   */
  constructor(code, message, more) {
    super(message || code);
    Object.assign(this, { name: "StatusError", code }, more);
  }
}

/** What a request or an answer failed by, in our words. */
export const asError = (error) =>
  error instanceof StatusError ? error : new StatusError(/Time/.test(error) ? "timeout" : "unreachable");

// The shorter of these before its end a token is renewed.
const EARLY_MS = 30_000;
const EARLY_SHARE = 0.2;
// What does not come must not be waited for by all that is asked later.
const TOKEN_MS = 15_000;
const REQUEST_MS = 30_000;

/** What a JWT says of itself; nothing of other tokens. */
export function claims(token) {
  try {
    return JSON.parse(atob(token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/")));
  } catch {
    return {};
  }
}

/** @param {URL} base @param {((why: {refused: boolean}) => string | Promise<string>) | undefined} getToken */
export function createHttp(base, getToken) {
  let token;
  let refused = false; // the last one was
  let renewAt = Infinity;
  let asking;

  async function ask() {
    try {
      token = await new Promise((resolve, reject) => {
        AbortSignal.timeout(TOKEN_MS).onabort = reject;
        Promise.resolve(getToken({ refused })).then(resolve, reject);
      });
    } catch (error) {
      // No other way to the server would help.
      throw new StatusError("no_token", error?.message, { delay: 0 });
    }
    refused = false;
    const now = Date.now();
    const left = claims(token).exp * 1000 - now;
    // A clock that is behind or ahead must not make us ask in circles.
    renewAt = left > 0 ? now + left - Math.min(EARLY_MS, left * EARLY_SHARE) : Infinity;
  }

  /** The token to use now. */
  async function bearer() {
    if (getToken && (refused || !token || Date.now() >= renewAt)) await (asking ??= ask().finally(() => (asking = undefined)));
    return token;
  }

  /** Where a path of the server's is. */
  function locate(path, query = {}) {
    const url = new URL(path, base);
    for (const name in query) if (query[name] !== undefined) url.searchParams.set(name, query[name]);
    return url;
  }

  async function request(path, { method, query, body, accept = "application/json", signal = AbortSignal.timeout(REQUEST_MS) } = {}) {
    const url = locate(path, query);
    const go = (bearer) => {
      const headers = { accept };
      if (bearer) headers.authorization = `Bearer ${bearer}`;
      if (body) headers["content-type"] = "application/json";
      // Without a token it is a cookie that says who asks; with one, a page may be allowed to ask that may not use cookies.
      const credentials = bearer ? "same-origin" : "include";
      return fetch(url, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store", credentials });
    };
    const first = await bearer();
    let answer = await go(first);
    if (answer.status === 401 && getToken) {
      refused ||= token === first;
      answer = await go(await bearer());
    }
    if (answer.ok) return answer;
    const { status } = answer;
    const said = (await answer.json().catch(() => {}))?.error;
    const after = answer.headers.get("retry-after");
    throw new StatusError(said?.code ?? "blocked", said?.message ?? `answer ${status}`, {
      status,
      // A number of seconds, or a date.
      delay: after ? after * 1000 || Date.parse(after) - Date.now() || 0 : undefined,
      // A refusal in the server's own words; a proxy's is a matter of the way there.
      final: said && !/401|429|5../.test(status),
    });
  }

  return {
    bearer,
    locate,
    fetch: request,
    json: (path, options) =>
      request(path, options)
        .then((answer) => answer.status === 204 || answer.json())
        .catch((error) => Promise.reject(asError(error))),
    /** Milliseconds until the token should be renewed; Infinity if it needs not. */
    renewIn: () => renewAt - Date.now(),
    /** The token was not accepted: the next one has to be another. */
    refuse: () => (refused = true),
  };
}
