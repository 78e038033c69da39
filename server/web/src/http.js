// Requests with the user's token: asked for once, renewed before it expires, and once more when it is refused.

export class StatusError extends Error {
  /**
   * @param {string} code as the server names it, or one of ours: `unreachable`, `timeout`, `blocked`, `gave_up`
   * @param {string} message
   * @param {{status?: number, delay?: number, final?: boolean, token?: string}} [more] `delay`: milliseconds to stay away;
   *   `final`: trying again is of no use; `token`: the one that was refused
   */
  constructor(code, message, more) {
    super(message);
    this.name = "StatusError";
    this.code = code;
    Object.assign(this, more);
  }
}

// The shorter of these before its end a token is renewed.
const EARLY_MS = 30_000;
const EARLY_SHARE = 0.2;

/** What a JWT says of itself; nothing of other tokens. */
function claims(token) {
  try {
    return JSON.parse(atob(token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/")));
  } catch {
    return {};
  }
}

/** Milliseconds in `Retry-After`, which is a number of seconds or a date. */
function retryAfter(answer) {
  const text = answer.headers.get("retry-after");
  return text ? Math.max(0, text * 1000 || Date.parse(text) - Date.now() || 0) : undefined;
}

export function createHttp(base, getToken) {
  let token;
  let renewAt = Infinity;
  let asking;

  async function ask(refused) {
    token = await getToken({ refused });
    const now = Date.now();
    const end = claims(token).exp * 1000;
    // A clock that is behind or ahead must not make us ask in circles.
    renewAt = end > now ? end - Math.min(EARLY_MS, (end - now) * EARLY_SHARE) : Infinity;
  }

  const http = {
    /** Where a path of the server's is. */
    url(path, query = {}) {
      const url = new URL(path, base);
      for (const [name, value] of Object.entries(query)) if (value !== undefined) url.searchParams.set(name, value);
      return url;
    },

    /** The token to use now; `refused` is one that must not be it. */
    async bearer(refused) {
      if (!getToken) return;
      if (token === undefined || token === refused || Date.now() >= renewAt) {
        await (asking ??= ask(refused !== undefined).finally(() => (asking = undefined)));
      }
      return token;
    },

    /** Milliseconds until the token should be renewed; Infinity if it needs not. */
    renewIn: () => renewAt - Date.now(),
    user: () => claims(token).sub,

    async request(path, { method = "GET", query, body, accept = "application/json", signal } = {}) {
      const go = async (bearer) => {
        const headers = { accept };
        if (bearer) headers.authorization = `Bearer ${bearer}`;
        if (body) headers["content-type"] = "application/json";
        const credentials = base.origin === globalThis.location?.origin || !bearer ? "include" : "same-origin";
        try {
          return await fetch(http.url(path, query), { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store", credentials });
        } catch (error) {
          throw signal?.aborted ? error : new StatusError("unreachable", "the server cannot be reached");
        }
      };
      const first = await http.bearer();
      let answer = await go(first);
      if (answer.status === 401 && getToken) answer = await go(await http.bearer(first));
      const { status } = answer;
      if (answer.ok) return answer;
      const said = (await answer.json().catch(() => {}))?.error;
      throw new StatusError(said?.code ?? "blocked", said?.message ?? `the server answers ${status}`, {
        status,
        delay: retryAfter(answer),
        // A refusal in the server's own words; a proxy's is a matter of the way there.
        final: Boolean(said) && (status === 400 || status === 403 || status === 404 || status === 409 || status === 422),
      });
    },

    async json(path, options) {
      return (await http.request(path, options)).json();
    },
  };
  return http;
}
