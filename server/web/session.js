// Who is looking, and requests in its name.

const TOKEN_KEY = "statuswire.token";

// Relative addresses keep working when the server sits below a path of a proxy.
export const address = (path) => new URL(path, document.baseURI);

export const token = () => sessionStorage.getItem(TOKEN_KEY) ?? undefined;

export function setToken(text) {
  if (text) sessionStorage.setItem(TOKEN_KEY, text);
  else sessionStorage.removeItem(TOKEN_KEY);
}

/** A refusal, in the server's words where it has some. */
class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function authorization() {
  return token() ? { Authorization: `Bearer ${token()}` } : {};
}

/**
 * One request to the API; its answer as JSON, undefined if it has none.
 * Throws a Refusal; its status is 0 if the server was not reached.
 */
export async function call(path, { method = "GET", body, signal } = {}) {
  const headers = authorization();
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    const limit = AbortSignal.timeout(15_000);
    answer = await fetch(address(path), {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: signal ? AbortSignal.any([signal, limit]) : limit,
      cache: "no-store",
    });
  } catch {
    throw new Refusal(0, "unreachable", "the server cannot be reached");
  }
  const said = await answer.json().catch(() => undefined);
  if (answer.ok) return said;
  throw new Refusal(answer.status, said?.error?.code ?? "", said?.error?.message ?? `the server answers ${answer.status}`);
}

/** `{userId, admin, capabilities}` of whoever looks. Throws a Refusal: with 401 a token is needed, or another one. */
export async function whoAmI() {
  const me = await call("api/v2/me");
  return { ...me, can: (capability) => me.admin || me.capabilities.includes(capability) };
}
